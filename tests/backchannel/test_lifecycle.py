"""Every transition of a job: what it writes when its guard matches; else it writes nothing."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, select, text
from sqlalchemy.exc import IntegrityError

from backchannel import lifecycle
from backchannel.accept import accept
from backchannel.books import Doorbell, Finished
from backchannel.db import Database
from backchannel.lifecycle import Claim
from backchannel.tables import (
    CANCELLED,
    EXPIRED,
    FAILED,
    FOLLOWS,
    QUEUED,
    RUNNING,
    STATES,
    SUCCEEDED,
    TERMINAL,
    jobs,
    workers,
)
from tests.makers import (
    LEASE_S,
    SPENT,
    ago,
    calling,
    change,
    claimed,
    everything,
    finished,
    lapse,
    new_job,
    outcome,
    queued,
    row,
    rows,
    session,
    until_somebody_waits,
    webhook,
)

Step = Callable[[Connection], Any]


def claim_of(job_id: str, owner: str = "worker-2") -> Step:
    return lambda c: lifecycle.claim(c, job_id, owner, LEASE_S)


def retry_of(claim: Claim, **changes: Any) -> Step:
    usual: dict[str, Any] = {
        "delay_s": 0.0, "burns_attempt": True, "error_code": "disconnected",
        "error_message": "It broke.", "spent": SPENT,
    }  # fmt: skip
    return lambda c: lifecycle.retry_later(c, claim, **usual | changes)


def writes_of(claim: Claim) -> dict[str, Step]:
    """All that a worker can write for its attempt, by name."""
    return {
        "mark_call": lambda c: lifecycle.mark_call(c, claim),
        **{
            f"finish {state}": lambda c, state=state: lifecycle.finish(c, claim, outcome(state))
            for state in sorted(TERMINAL)
        },
        "retry_later": retry_of(claim),
        "hand_back": lambda c: lifecycle.hand_back(c, claim, SPENT),
        "heartbeat": lambda c: lifecycle.heartbeat(c, claim.owner, [claim.job_id], LEASE_S),
    }


def assert_writes_nothing(database: Database, step: Step) -> None:
    before = everything(database)
    assert not database.write_now(step)
    assert everything(database) == before


# ---------------------------------------------------------------- the states as data


def test_each_state_says_which_follow_and_a_terminal_one_has_none() -> None:
    assert set(FOLLOWS) == set(STATES)
    assert {state for state, next_ in FOLLOWS.items() if not next_} == TERMINAL


@pytest.mark.parametrize(
    ("here", "there"), [(a, b) for a in STATES for b in STATES if b not in FOLLOWS[a]]
)
def test_no_statement_can_be_made_for_a_move_that_does_not_follow(here: str, there: str) -> None:
    with pytest.raises(AssertionError, match="does not follow"):
        lifecycle._move(here, there)


def test_ids_are_ordered_by_time() -> None:
    made = [lifecycle.new_id("job") for _ in range(1000)]
    assert made == sorted(set(made))
    assert all(each.startswith("job_") and len(each) == 36 for each in made)


# ---------------------------------------------------------------- claim


def test_a_claim_starts_an_attempt(database: Database) -> None:
    job_id = queued(database)
    claim = claimed(database, job_id, "worker-1")
    assert (claim.attempt, claim.owner, claim.retries) == (1, "worker-1", 0)
    assert (claim.messages, claim.parameters) == (
        [{"role": "user", "content": "Hello?"}],
        {"max_tokens": 5},
    )
    assert 0 <= claim.age_ms < 60_000
    assert 3_540_000 < claim.left_ms <= 3_600_000
    job = row(database, job_id)
    assert (job.state, job.attempt, job.owner, job.rung_ms) == (RUNNING, 1, "worker-1", None)
    assert job.lease_ms - job.started_ms == pytest.approx(LEASE_S * 1000, abs=5_000)
    (attempt,) = rows(database, "attempts")
    assert (attempt["attempt"], attempt["owner"]) == (1, "worker-1")
    assert attempt["provider_call_ms"] is attempt["finished_ms"] is None


def test_a_second_claim_of_the_same_doorbell_gets_nothing(database: Database) -> None:
    job_id = queued(database)
    claimed(database, job_id)
    assert_writes_nothing(database, claim_of(job_id))


def test_claims_at_once_give_one_attempt(database_url: str) -> None:
    databases = [Database(database_url, name=f"worker-{number}") for number in range(3)]
    for _ in range(10):
        job_id = queued(databases[0])
        claims = [each.submit(claim_of(job_id)) for each in databases for _ in range(3)]
        assert sum(each.result(30) is not None for each in claims) == 1
    assert all(attempt["attempt"] == 1 for attempt in rows(databases[0], "attempts"))
    for each in databases:
        each.close()


@pytest.mark.parametrize("why", ["not due", "past its deadline", "cancelled", "unknown"])
def test_a_job_is_not_claimed_when_it_is(why: str, database: Database) -> None:
    job_id = queued(database)
    match why:
        case "not due":
            change(database, job_id, run_ms=ago(database, -60))
        case "past its deadline":
            change(database, job_id, deadline_ms=ago(database, 1))
        case "cancelled":
            database.write_now(lambda c: lifecycle.request_cancel(c, job_id, "alice"))
        case _:
            job_id = "job_of_nobody"
    assert_writes_nothing(database, claim_of(job_id))


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_a_finished_job_is_not_claimed(state: str, database: Database) -> None:
    assert_writes_nothing(database, claim_of(finished(database, state)))


def test_the_first_start_is_kept_over_attempts(database: Database) -> None:
    job_id = queued(database)
    claim = claimed(database, job_id)
    change(database, job_id, started_ms=12345)
    database.write_now(lambda c: lifecycle.hand_back(c, claim, None))
    assert claimed(database, job_id).attempt == 2
    assert row(database, job_id).started_ms == 12345


# ---------------------------------------------------------------- sessions


def test_a_session_answers_in_order(database: Database) -> None:
    session(database)
    first, second = (queued(database, session_id="sess_1") for _ in range(2))
    assert_writes_nothing(database, claim_of(second))
    claim = claimed(database, first)
    assert_writes_nothing(database, claim_of(second))
    done = database.write_now(lambda c: lifecycle.finish(c, claim, outcome()))
    assert done == Finished(next=Doorbell(second, "interactive", "echo:echo-1", 1))
    assert [message["content"] for message in claimed(database, second).messages] == [
        "Hello?",
        "Hello.",
        "Hello?",
    ]


@pytest.mark.parametrize("state", sorted(TERMINAL - {SUCCEEDED}))
def test_a_turn_without_an_answer_is_not_told_to_the_model(state: str, database: Database) -> None:
    session(database)
    finished(database, state, session_id="sess_1")
    later = queued(database, session_id="sess_1", messages=[{"role": "user", "content": "And?"}])
    assert claimed(database, later).messages == [{"role": "user", "content": "And?"}]
    assert [turn["seq"] for turn in rows(database, "turns")] == [1, 3]  # 2 was the answer's place


def test_other_sessions_do_not_wait(database: Database) -> None:
    for name in ("sess_1", "sess_2"):
        session(database, name)
    claimed(database, queued(database, session_id="sess_1"))
    claimed(database, queued(database, session_id="sess_2"))
    claimed(database, queued(database))


# ---------------------------------------------------------------- heartbeat, call mark


def test_a_heartbeat_renews_its_own_and_tells_what_is_lost(database: Database) -> None:
    mine, cancelled, other, back, done = (queued(database) for _ in range(5))
    for job_id in (mine, cancelled, back, done):
        claimed(database, job_id)
    claimed(database, other, "worker-2")
    database.write_now(lambda c: lifecycle.request_cancel(c, cancelled, "alice"))
    lapse(database, back)
    assert database.write_now(lambda c: lifecycle.reap(c, back, 1))
    finisher = Claim(**{**_blank(done), "attempt": 1})
    assert database.write_now(lambda c: lifecycle.finish(c, finisher, outcome()))
    for job_id in (mine, other):
        change(database, job_id, lease_ms=1)

    held = [mine, cancelled, other, back, done, "job_of_nobody"]
    beats = database.write_now(lambda c: lifecycle.heartbeat(c, "worker-1", held, LEASE_S))
    assert beats == {mine: (1, False), cancelled: (1, True)}
    assert row(database, mine).lease_ms > ago(database, 0)
    assert row(database, other).lease_ms == 1


def test_a_heartbeat_names_the_attempt_so_that_an_older_one_can_stop(database: Database) -> None:
    job_id = queued(database)
    claim = claimed(database, job_id)
    database.write_now(lambda c: lifecycle.hand_back(c, claim, None))
    claimed(database, job_id)
    beats = database.write_now(lambda c: lifecycle.heartbeat(c, "worker-1", [job_id], LEASE_S))
    assert beats[job_id].attempt == 2


def test_a_heartbeat_shows_the_process_alive(database: Database) -> None:
    database.write_now(lambda c: lifecycle.sign_on(c, "worker-1", "host", 7, 100))
    database.write_now(lambda c: lifecycle.heartbeat(c, "worker-1", [], LEASE_S))
    database.write_now(lambda c: lifecycle.heartbeat(c, "worker-1", ["job_of_nobody"], LEASE_S))
    (worker,) = rows(database, "workers")
    assert (worker["slots"], worker["in_flight"]) == (100, 1)
    database.write_now(lambda c: lifecycle.sign_off(c, "worker-1"))
    assert rows(database, "workers") == []


def _blank(job_id: str) -> dict[str, Any]:
    """A claim that knows only its fence."""
    return {
        "job_id": job_id, "attempt": 0, "owner": "worker-1", "caller": "", "lane": "",
        "provider": "", "model": "", "session_id": None, "session_seq": None, "stream": True,
        "retries": 0, "age_ms": 0, "left_ms": 0, "messages": [], "parameters": {},
    }  # fmt: skip


# ---------------------------------------------------------------- the fence


ZOMBIES = ["reaped", "taken by another", "wrong owner", "wrong attempt", "cancelled", "finished"]


@pytest.mark.parametrize("why", ZOMBIES)
def test_a_worker_that_lost_its_attempt_writes_nothing(why: str, database: Database) -> None:
    session(database)
    job_id = queued(database, session_id="sess_1")
    claim = calling(database, job_id)
    match why:
        case "reaped" | "taken by another" | "cancelled":
            lapse(database, job_id)
            assert database.write_now(lambda c: lifecycle.reap(c, job_id, 1))
            if why == "taken by another":
                calling(database, job_id, "worker-2")
            elif why == "cancelled":
                database.write_now(lambda c: lifecycle.request_cancel(c, job_id, "alice"))
                assert database.write_now(
                    lambda c: lifecycle.close_queued(c, job_id, 1, outcome(CANCELLED))
                )
        case "wrong owner":
            claim = replace(claim, owner="worker-2")
        case "wrong attempt":
            # the owner is right: the same process took the job again
            assert database.write_now(retry_of(claim))
            calling(database, job_id)
        case _:
            assert database.write_now(lambda c: lifecycle.finish(c, claim, outcome()))
    for name, step in writes_of(claim).items():
        if (why, name) != ("wrong attempt", "heartbeat"):  # which names the attempt that lives
            assert_writes_nothing(database, step)


def test_a_mark_that_waited_for_the_reaper_comes_too_late(postgres_url: str) -> None:
    worker, reaper = (Database(postgres_url, name=name) for name in ("worker", "reaper"))
    job_id = queued(worker)
    claim = claimed(worker, job_id)
    lapse(worker, job_id)
    reaped, may_commit = threading.Event(), threading.Event()

    def reap(connection: Connection) -> bool:
        done = lifecycle.reap(connection, job_id, 1)
        reaped.set()
        assert may_commit.wait(30)
        return done

    reaping = reaper.submit(reap)
    assert reaped.wait(30)
    marking: Future[bool] = worker.submit(lambda c: lifecycle.mark_call(c, claim))
    until_somebody_waits(reaper)
    may_commit.set()
    assert reaping.result(30) is True
    assert marking.result(30) is False
    assert rows(reaper, "attempts")[0]["provider_call_ms"] is None
    worker.close()
    reaper.close()


# ---------------------------------------------------------------- finish


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_a_finish_writes_all_of_it(state: str, database: Database) -> None:
    session(database)
    webhook(database)
    job_id = queued(database, session_id="sess_1")
    claim = calling(database, job_id)
    ending = outcome(state)
    assert database.write_now(lambda c: lifecycle.finish(c, claim, ending)) == Finished(None)

    job = row(database, job_id)
    assert (job.state, job.lease_ms, job.finish_reason) == (state, None, ending.finish_reason)
    assert (job.error_code, job.error_message) == (ending.error_code, ending.error_message)
    assert job.finished_ms >= job.started_ms >= job.created_ms
    (result,) = rows(database, "job_results")
    assert bytes(result["log"]) == ending.log
    assert (result["message"] is None) == (state != SUCCEEDED)
    (attempt,) = rows(database, "attempts")
    assert (attempt["outcome"], attempt["error_code"]) == (state, ending.error_code)
    assert attempt["finished_ms"] is not None
    (usage,) = rows(database, "usage")
    assert usage["billable"]
    assert (usage["source"], usage["cost_nanousd"]) == ("final", 1_700)
    assert (usage["input_tokens"], usage["cached_tokens"], usage["output_tokens"]) == (12, 4, 3)
    assert (usage["caller"], usage["session_id"]) == ("alice", "sess_1")
    (told,) = rows(database, "deliveries")
    assert (told["subject"], told["type"]) == (job_id, f"job.{state}")
    turns = sorted(rows(database, "turns"), key=lambda turn: turn["seq"])
    assert [turn["seq"] for turn in turns] == ([1, 2] if state == SUCCEEDED else [1])
    assert turns[-1]["model"] == ("echo-1" if state == SUCCEEDED else None)


@pytest.mark.parametrize("table", ["job_results", "usage", "deliveries", "turns"])
def test_a_finish_that_cannot_write_one_part_writes_none(table: str, database: Database) -> None:
    session(database)
    webhook(database)
    job_id = queued(database, session_id="sess_1")
    claim = calling(database, job_id)
    database.write_now(lambda c: c.exec_driver_sql(f'ALTER TABLE "{table}" RENAME TO "away"'))
    before = row(database, job_id), rows(database, "attempts"), rows(database, "away")
    with pytest.raises(Exception, match=table):
        database.write_now(lambda c: lifecycle.finish(c, claim, outcome()))
    assert (row(database, job_id), rows(database, "attempts"), rows(database, "away")) == before
    database.write_now(lambda c: c.exec_driver_sql(f'ALTER TABLE "away" RENAME TO "{table}"'))
    assert database.write_now(lambda c: lifecycle.finish(c, claim, outcome()))
    assert len(rows(database, table)) == (2 if table == "turns" else 1)


def test_the_database_itself_refuses_a_second_billable_row(database: Database) -> None:
    finished(database)
    (usage,) = rows(database, "usage")
    second = usage | {"attempt": 2, "billable": True}
    columns = ", ".join(second)
    marks = ", ".join(f":{name}" for name in second)
    with pytest.raises(IntegrityError):
        database.write_now(
            lambda c: c.execute(text(f"INSERT INTO usage ({columns}) VALUES ({marks})"), second)
        )


def test_a_call_that_said_nothing_of_its_usage_is_unknown_and_not_zero(database: Database) -> None:
    job_id = queued(database)
    claim = calling(database, job_id)
    database.write_now(lambda c: lifecycle.finish(c, claim, outcome(FAILED, spent=None)))
    (usage,) = rows(database, "usage")
    assert usage["source"] == "unknown"
    assert usage["input_tokens"] is usage["output_tokens"] is usage["cost_nanousd"] is None


def test_an_attempt_that_never_called_has_no_usage(database: Database) -> None:
    claim = claimed(database, queued(database))
    database.write_now(lambda c: lifecycle.finish(c, claim, outcome(FAILED)))
    assert rows(database, "usage") == []


# ---------------------------------------------------------------- back to the queue


@pytest.mark.parametrize(("burns", "retries"), [(True, 1), (False, 0)])
def test_a_retry_waits_and_is_on_the_books_but_not_billed(
    burns: bool, retries: int, database: Database
) -> None:
    job_id = queued(database)
    claim = calling(database, job_id)
    assert database.write_now(retry_of(claim, delay_s=30.0, burns_attempt=burns))
    job = row(database, job_id)
    assert (job.state, job.attempt, job.retries, job.crashes) == (QUEUED, 1, retries, 0)
    assert (job.owner, job.lease_ms, job.rung_ms, job.rank) == (None, None, None, 1)
    assert job.run_ms == pytest.approx(ago(database, -30), abs=10_000)
    (attempt,) = rows(database, "attempts")
    assert (attempt["outcome"], attempt["error_code"]) == ("retried", "disconnected")
    (usage,) = rows(database, "usage")
    assert (bool(usage["billable"]), usage["source"]) == (False, "final")
    assert_writes_nothing(database, claim_of(job_id))
    change(database, job_id, run_ms=ago(database, 1))
    assert claimed(database, job_id).attempt == 2


def test_what_is_handed_back_is_ahead_of_the_line_and_burns_nothing(database: Database) -> None:
    job_id = queued(database)
    claim = claimed(database, job_id)
    assert database.write_now(lambda c: lifecycle.hand_back(c, claim, None))
    job = row(database, job_id)
    assert (job.state, job.rank, job.retries, job.crashes) == (QUEUED, 0, 0, 0)
    assert rows(database, "usage") == []
    claimed(database, job_id)
    assert row(database, job_id).rank == 1


def test_only_the_attempt_that_ended_the_job_is_billed(database: Database) -> None:
    job_id = queued(database)
    for _ in range(2):
        claim = calling(database, job_id)
        database.write_now(retry_of(claim))
    claim = calling(database, job_id)
    database.write_now(lambda c: lifecycle.finish(c, claim, outcome()))
    billed = {usage["attempt"]: bool(usage["billable"]) for usage in rows(database, "usage")}
    assert billed == {1: False, 2: False, 3: True}


# ---------------------------------------------------------------- reap


@pytest.mark.parametrize("called", [True, False])
def test_a_reaped_job_goes_to_the_head_of_the_line(called: bool, database: Database) -> None:
    job_id = queued(database)
    (calling if called else claimed)(database, job_id)
    change(database, job_id, run_ms=ago(database, 100))
    lapse(database, job_id)
    # who had not called yet can hardly have been killed by the job
    assert [each[:3] for each in database.read_now(lifecycle.lapsed)] == [(job_id, 1, int(called))]
    assert database.write_now(lambda c: lifecycle.reap(c, job_id, 1))
    job = row(database, job_id)
    assert (job.state, job.attempt, job.crashes) == (QUEUED, 1, int(called))
    assert (job.retries, job.rank) == (0, 0)
    assert (job.owner, job.lease_ms, job.rung_ms) == (None, None, None)
    assert rows(database, "attempts")[0]["outcome"] == "reaped"
    usage = [(bool(each["billable"]), each["source"]) for each in rows(database, "usage")]
    assert usage == ([(False, "unknown")] if called else [])


@pytest.mark.parametrize("why", ["renewed", "another attempt", "queued", "finished"])
def test_a_job_is_not_reaped_when_it_is(why: str, database: Database) -> None:
    job_id = queued(database)
    attempt = 1
    if why == "queued":
        attempt = 0
    else:
        claim = calling(database, job_id)
        lapse(database, job_id)
        if why == "renewed":
            database.write_now(lambda c: lifecycle.heartbeat(c, "worker-1", [job_id], LEASE_S))
        elif why == "finished":
            database.write_now(lambda c: lifecycle.finish(c, claim, outcome()))
        else:
            attempt = 2
    if why != "another attempt":
        assert database.read_now(lifecycle.lapsed) == []
    assert_writes_nothing(database, lambda c: lifecycle.reap(c, job_id, attempt))
    assert_writes_nothing(
        database, lambda c: lifecycle.reap_poison(c, job_id, attempt, outcome(FAILED))
    )


def test_crashes_before_the_call_count_once_there_are_too_many(database: Database) -> None:
    job_id = queued(database)
    found = []
    for attempt in range(1, lifecycle.MOST_UNCALLED + 3):
        claimed(database, job_id)
        lapse(database, job_id)
        found += [each.crashes for each in database.read_now(lifecycle.lapsed)]
        assert database.write_now(lambda c, attempt=attempt: lifecycle.reap(c, job_id, attempt))
    assert found == [0] * (lifecycle.MOST_UNCALLED - 1) + [1, 2, 3]


def test_a_job_is_no_poison_while_most_workers_die_without_it(database: Database) -> None:
    job_id = queued(database)
    calling(database, job_id, "worker-0")
    lapse(database, job_id)
    change(database, job_id, crashes=2)

    def found(first: int, last: int) -> lifecycle.Lapsed:
        for number in range(first, last):
            database.write_now(
                lambda c, number=number: lifecycle.sign_on(c, f"dead-{number}", "host", 1, 1)
            )
        # heard of since the job began, and not lately
        seen = row(database, job_id).started_ms
        database.write_now(lambda c: c.execute(workers.update().values(seen_ms=seen)))
        return database.read_now(lambda c: lifecycle.lapsed(c, lease_s=0))[0]

    few, many = found(0, 6), found(6, 7)
    assert (few.crashes, few.deaths, few.is_suspect(3)) == (3, 6, True)
    assert many.deaths > 2 * many.crashes
    assert not many.is_suspect(3)
    # but it cannot loop
    assert many._replace(crashes=9).is_suspect(3)


def test_a_job_that_takes_its_workers_with_it_fails_as_poison(database: Database) -> None:
    webhook(database)
    job_id = queued(database)
    for crash in (1, 2):
        calling(database, job_id)
        lapse(database, job_id)
        assert database.write_now(lambda c, crash=crash: lifecycle.reap(c, job_id, crash))
    calling(database, job_id)
    lapse(database, job_id)
    assert [each[:3] for each in database.read_now(lifecycle.lapsed)] == [(job_id, 3, 3)]
    poison = outcome(FAILED, error_code="poison", spent=None)
    assert database.write_now(lambda c: lifecycle.reap_poison(c, job_id, 3, poison))
    job = row(database, job_id)
    assert (job.state, job.crashes, job.error_code, job.lease_ms) == (FAILED, 3, "poison", None)
    usage = [(each["attempt"], bool(each["billable"])) for each in rows(database, "usage")]
    assert usage == [(1, False), (2, False), (3, True)]
    assert {each["source"] for each in rows(database, "usage")} == {"unknown"}
    assert [told["type"] for told in rows(database, "deliveries")] == ["job.failed"]


# ---------------------------------------------------------------- cancel, expire


def test_a_queued_job_is_cancelled_without_an_attempt(database: Database) -> None:
    webhook(database)
    job_id = queued(database)
    asked = database.write_now(lambda c: lifecycle.request_cancel(c, job_id, "alice"))
    assert asked is not None
    assert asked[:2] == (QUEUED, 0)
    (due,) = database.read_now(lifecycle.overdue)
    assert due[:3] == (job_id, 0, CANCELLED)
    assert database.write_now(lambda c: lifecycle.close_queued(c, job_id, 0, outcome(CANCELLED)))
    job = row(database, job_id)
    assert (job.state, job.attempt) == (CANCELLED, 0)
    assert job.finished_ms is not None
    assert rows(database, "attempts") == rows(database, "usage") == []
    assert [told["type"] for told in rows(database, "deliveries")] == ["job.cancelled"]
    assert database.read_now(lifecycle.overdue) == []


def test_a_running_job_hears_of_its_cancel_and_ends_itself(database: Database) -> None:
    job_id = queued(database)
    claim = calling(database, job_id)
    asked = database.write_now(lambda c: lifecycle.request_cancel(c, job_id, "alice"))
    assert asked is not None
    assert asked[:2] == (RUNNING, 1)
    assert row(database, job_id).state == RUNNING
    assert_writes_nothing(
        database, lambda c: lifecycle.close_queued(c, job_id, 1, outcome(CANCELLED))
    )
    assert database.write_now(lambda c: lifecycle.finish(c, claim, outcome(CANCELLED)))
    assert row(database, job_id).state == CANCELLED


def test_a_cancelled_job_whose_worker_died_is_not_started_again(database: Database) -> None:
    job_id = queued(database)
    calling(database, job_id)
    database.write_now(lambda c: lifecycle.request_cancel(c, job_id, "alice"))
    lapse(database, job_id)
    assert database.write_now(lambda c: lifecycle.reap(c, job_id, 1))
    assert_writes_nothing(database, claim_of(job_id))
    (due,) = database.read_now(lifecycle.overdue)
    assert due[:3] == (job_id, 1, CANCELLED)
    assert database.write_now(lambda c: lifecycle.close_queued(c, job_id, 1, outcome(CANCELLED)))
    assert [bool(each["billable"]) for each in rows(database, "usage")] == [False]
    assert [each["outcome"] for each in rows(database, "attempts")] == ["reaped"]


def test_the_first_cancel_is_the_one_on_record(database: Database) -> None:
    job_id = queued(database)
    database.write_now(lambda c: lifecycle.request_cancel(c, job_id, "alice"))
    change(database, job_id, cancel_ms=12345)
    database.write_now(lambda c: lifecycle.request_cancel(c, job_id, "alice"))
    assert row(database, job_id).cancel_ms == 12345


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_a_finished_job_cannot_be_cancelled(state: str, database: Database) -> None:
    job_id = finished(database, state)
    assert_writes_nothing(database, lambda c: lifecycle.request_cancel(c, job_id, "alice"))


def test_nobody_cancels_anothers_job(database: Database) -> None:
    job_id = queued(database)
    assert_writes_nothing(database, lambda c: lifecycle.request_cancel(c, job_id, "mallory"))


def test_a_job_past_its_deadline_expires(database: Database) -> None:
    job_id = queued(database)
    assert database.read_now(lifecycle.overdue) == []
    change(database, job_id, deadline_ms=ago(database, 1))
    (due,) = database.read_now(lifecycle.overdue)
    assert due[:3] == (job_id, 0, EXPIRED)
    assert database.write_now(lambda c: lifecycle.close_queued(c, job_id, 0, outcome(EXPIRED)))
    assert row(database, job_id).state == EXPIRED


@pytest.mark.parametrize("state", [CANCELLED, EXPIRED])
@pytest.mark.parametrize("why", ["no reason", "another attempt", "running"])
def test_a_job_is_not_closed_when_there_is(why: str, state: str, database: Database) -> None:
    job_id = queued(database)
    if why == "running":
        claimed(database, job_id)
    if why != "no reason":
        reason = {CANCELLED: {"cancel_ms": 1}, EXPIRED: {"deadline_ms": 1}}
        change(database, job_id, **reason[state])
    attempt = row(database, job_id).attempt + (why == "another attempt")
    assert_writes_nothing(
        database, lambda c: lifecycle.close_queued(c, job_id, attempt, outcome(state))
    )


# ---------------------------------------------------------------- any order, and at once


class Chaos:
    """Workers, a reaper, a canceller and the clock, who act on one job in any order.

    Workers keep every claim they ever got, and go on to write for it: most of them are zombies.
    """

    def __init__(self, database: Database, seed: int) -> None:
        self.database = database
        self.dice = random.Random(seed)
        session(database, f"sess_{seed}")
        self.job_id = queued(database, session_id=f"sess_{seed}")
        self.claims: list[Claim] = []
        self.seen: list[Any] = [row(database, self.job_id)]

    def step(self) -> Any:
        job = self.seen[-1]
        guess = max(job.attempt - self.dice.choice([0, 0, 0, 1]), 0)
        steps: list[Step] = [claim_of(self.job_id, self.dice.choice(["worker-1", "worker-2"]))] * 3
        for claim in self.dice.sample(self.claims, min(2, len(self.claims))):
            steps += writes_of(claim).values()
        if job.state == RUNNING and job.owner and self.dice.random() < 0.5:
            steps.append(lambda c: c.execute(_job(self.job_id).values(lease_ms=1)))
        steps.append(lambda c: c.execute(_job(self.job_id).values(run_ms=1)))
        steps += [lambda c: lifecycle.reap(c, self.job_id, guess)] * 3
        steps.append(lambda c: lifecycle.reap_poison(c, self.job_id, guess, outcome(FAILED)))
        steps.append(lambda c: lifecycle.close_queued(c, self.job_id, guess, outcome(EXPIRED)))
        steps.append(lambda c: lifecycle.close_queued(c, self.job_id, guess, outcome(CANCELLED)))
        if self.dice.random() < 0.1:
            steps.append(lambda c: lifecycle.request_cancel(c, self.job_id, "alice"))
        if self.dice.random() < 0.05:
            steps.append(lambda c: c.execute(_job(self.job_id).values(deadline_ms=1)))
        result = self.database.write_now(self.dice.choice(steps))
        if isinstance(result, Claim):
            self.claims.append(result)
        self.seen.append(row(self.database, self.job_id))
        return self.seen[-1]

    def check(self) -> None:
        before, after = self.seen[-2:]
        assert after.attempt in {before.attempt, before.attempt + 1}
        assert after.crashes >= before.crashes
        assert after.retries >= before.retries
        assert after.state == before.state or after.state in FOLLOWS[before.state]
        if before.state in TERMINAL:
            # the clock above pretends; everything else stands
            assert _but_for_the_clock(after) == _but_for_the_clock(before)
        mine = self.database.read_now(self._mine)
        ended = after.state in TERMINAL
        assert len(mine["deliveries"]) == len(mine["job_results"]) == int(ended)
        billed = [each for each in mine["usage"] if each["billable"]]
        assert len(billed) <= int(ended)
        assert [each["attempt"] for each in billed] in ([], [after.attempt])
        assert len(mine["attempts"]) == after.attempt
        open_ = [each["attempt"] for each in mine["attempts"] if each["finished_ms"] is None]
        assert open_ == ([after.attempt] if after.state == RUNNING else [])
        called = {each["attempt"] for each in mine["attempts"] if each["provider_call_ms"]}
        assert {each["attempt"] for each in mine["usage"]} == called - set(open_)
        assert len(mine["turns"]) == (2 if after.state == SUCCEEDED else 1)

    def _mine(self, connection: Connection) -> dict[str, list[Any]]:
        tables = dict.fromkeys(("job_results", "usage", "attempts", "turns"), "job_id")
        return {
            table: list(
                connection.execute(
                    text(f'SELECT * FROM "{table}" WHERE {its} = :job'), {"job": self.job_id}
                ).mappings()
            )
            for table, its in {**tables, "deliveries": "subject"}.items()
        }


def _job(job_id: str) -> Any:
    return jobs.update().where(jobs.c.id == job_id)


def _but_for_the_clock(job: Any) -> dict[str, Any]:
    return dict(job._mapping) | {"run_ms": 0, "deadline_ms": 0}


def test_whatever_happens_in_any_order_the_books_stay_true(database: Database) -> None:
    webhook(database)
    ended: Counter[str] = Counter()
    attempts: Counter[int] = Counter()
    for seed in range(30):
        chaos = Chaos(database, seed)
        for _ in range(25):
            chaos.step()
            chaos.check()
        ended[chaos.seen[-1].state] += 1
        attempts[chaos.seen[-1].attempt] += 1
    # the dice did roll: every end was reached, and jobs had several lives
    assert set(ended) >= TERMINAL, ended
    assert max(attempts) >= 3, attempts


RACES = 1_000


def race(
    one: tuple[Database, list[Step]], other: tuple[Database, list[Step]]
) -> list[tuple[bool, bool]]:
    """Two processes' writers act on the same jobs at the same moments; who did anything?"""
    together = threading.Barrier(2)

    def run(database: Database, steps: list[Step]) -> list[bool]:
        results = []
        for step in steps:
            together.wait(30)
            results.append(bool(database.write_now(step)))
        return results

    with ThreadPoolExecutor(2, thread_name_prefix="racer") as threads:
        sides = [threads.submit(run, *side) for side in (one, other)]
        return list(zip(*(side.result(100) for side in sides), strict=True))


def against(claim: Claim) -> Step:
    """What a caretaker does about a silent worker: in turns, hope and no more hope."""
    if claim.retries % 2:
        return lambda c: lifecycle.reap(c, claim.job_id, 1)
    return lambda c: lifecycle.reap_poison(c, claim.job_id, 1, outcome(FAILED))


def test_of_a_finish_and_a_reaper_exactly_one_wins(database_url: str) -> None:
    worker, caretaker = (Database(database_url, name=name) for name in ("worker", "caretaker"))
    webhook(worker)
    ids = [each.result(60) for each in [worker.submit(_accept) for _ in range(RACES)]]
    claimed = [each.result(60) for each in [worker.submit(claim_of(job_id)) for job_id in ids]]
    claims = [replace(claim, retries=number) for number, claim in enumerate(claimed) if claim]
    marks = [worker.submit(lambda c, x=claim: lifecycle.mark_call(c, x)) for claim in claims]
    assert all(mark.result(60) for mark in marks)
    worker.write_now(lambda c: c.execute(jobs.update().values(lease_ms=1)))

    results = race(
        (worker, [lambda c, x=claim: lifecycle.finish(c, x, outcome()) for claim in claims]),
        (caretaker, [against(claim) for claim in claims]),
    )

    won = Counter(results)
    assert set(won) == {(True, False), (False, True)}, won
    ends = Counter(worker.read_now(lambda c: c.execute(select(jobs.c.state)).scalars().all()))
    assert ends[SUCCEEDED] == won[True, False]
    assert ends[QUEUED] + ends[FAILED] == won[False, True]
    assert len(rows(worker, "deliveries")) == ends[SUCCEEDED] + ends[FAILED]
    billed = [bool(each["billable"]) for each in rows(worker, "usage")]
    assert len(billed) == RACES
    assert sum(billed) == ends[SUCCEEDED] + ends[FAILED]
    worker.close()
    caretaker.close()


def test_of_a_claim_and_a_cancel_exactly_one_wins(database_url: str) -> None:
    worker, api = (Database(database_url, name=name) for name in ("worker", "api"))
    ids = [each.result(60) for each in [worker.submit(_accept) for _ in range(100)]]

    def cancel_of(job_id: str) -> Step:
        def cancel(connection: Connection) -> Any:
            assert lifecycle.request_cancel(connection, job_id, "alice")
            return lifecycle.close_queued(connection, job_id, 0, outcome(CANCELLED))

        return cancel

    results = race((worker, [claim_of(each) for each in ids]), (api, [cancel_of(x) for x in ids]))
    assert set(results) == {(True, False), (False, True)}
    ends = Counter(worker.read_now(lambda c: c.execute(select(jobs.c.state)).scalars().all()))
    assert ends == {RUNNING: results.count((True, False)), CANCELLED: results.count((False, True))}
    worker.close()
    api.close()


def _accept(connection: Connection) -> str:
    return accept(connection, new_job()).job_id
