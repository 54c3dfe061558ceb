"""A worker's transitions: what each writes when its guard matches; else it writes nothing."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError

from backchannel import cancelling, closing, lifecycle, reaping
from backchannel.books import Doorbell, Finished
from backchannel.db import Database
from backchannel.lifecycle import Claim
from backchannel.tables import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED, TERMINAL
from tests.makers import (
    LEASE_S,
    ago,
    assert_writes_nothing,
    calling,
    change,
    claim_of,
    claimed,
    finished,
    lapse,
    outcome,
    queued,
    retry_of,
    row,
    rows,
    session,
    until_somebody_waits,
    webhook,
    writes_of,
)

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


def test_a_job_that_has_come_to_ask_another_provider_is_left_to_its_own_doorbell(
    database: Database,
) -> None:
    job_id = queued(database, provider="groq")
    for provider, taken in (("openai", False), ("groq", True)):
        claim = database.write_now(
            lambda c, p=provider: lifecycle.claim(c, job_id, "w", LEASE_S, provider=p)  # type: ignore[misc]
        )
        assert (claim is not None) == taken


@pytest.mark.parametrize("why", ["not due", "past its deadline", "cancelled", "unknown"])
def test_a_job_is_not_claimed_when_it_is(why: str, database: Database) -> None:
    job_id = queued(database)
    match why:
        case "not due":
            change(database, job_id, run_ms=ago(database, -60))
        case "past its deadline":
            change(database, job_id, deadline_ms=ago(database, 1))
        case "cancelled":
            database.write_now(lambda c: cancelling.request_cancel(c, job_id, "alice"))
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
    database.write_now(lambda c: cancelling.request_cancel(c, cancelled, "alice"))
    lapse(database, back)
    assert database.write_now(lambda c: reaping.reap(c, back, 1))
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
            assert database.write_now(lambda c: reaping.reap(c, job_id, 1))
            if why == "taken by another":
                calling(database, job_id, "worker-2")
            elif why == "cancelled":
                database.write_now(lambda c: cancelling.request_cancel(c, job_id, "alice"))
                assert database.write_now(
                    lambda c: closing.close_queued(c, job_id, 1, outcome(CANCELLED))
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
        done = reaping.reap(connection, job_id, 1)
        reaped.set()
        assert may_commit.wait(30)
        return done

    taking = reaper.submit(reap)
    assert reaped.wait(30)
    marking: Future[bool] = worker.submit(lambda c: lifecycle.mark_call(c, claim))
    until_somebody_waits(reaper)
    may_commit.set()
    assert taking.result(30) is True
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
