"""Dispatch: who is rung, in which order, how many, and at what cost."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import Connection, event

from backchannel import cancelling, closing, lifecycle, reaping
from backchannel import dispatch as module
from backchannel.accept import accept
from backchannel.db import Database
from backchannel.dispatch import dispatch, live_slots
from backchannel.tables import BATCH, INTERACTIVE
from tests.makers import (
    LEASE_S,
    ago,
    change,
    claimed,
    finished,
    lapse,
    new_job,
    outcome,
    queued,
    row,
    session,
    until_somebody_waits,
)


@pytest.fixture(autouse=True)
def _nobody_was_served_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_last_served", {})


def rung(database: Database, window: int = 100, in_queue: int = 0, lane: str = BATCH) -> list[str]:
    """The jobs of one round of the dispatcher, in order."""
    bells = database.write_now(lambda c: dispatch(c, lane, window=window, in_queue=in_queue))
    assert all(bell.lane == lane for bell in bells)
    return [bell.job_id for bell in bells]


def lines(database: Database, number: int, **changes: Any) -> list[str]:
    return [queued(database, lane=BATCH, **changes) for _ in range(number)]


# ---------------------------------------------------------------- who, in which order


def test_the_oldest_are_rung_first_and_only_once(database: Database) -> None:
    ids = lines(database, 5)
    assert rung(database) == ids
    assert rung(database, in_queue=5) == []
    assert all(row(database, each).rung_ms for each in ids)


def test_a_bell_says_what_flower_shows_and_which_attempt_it_asks_for(database: Database) -> None:
    (job_id,) = lines(database, 1)
    claim = claimed(database, job_id)
    database.write_now(lambda c: lifecycle.hand_back(c, claim, None))
    (bell,) = database.write_now(lambda c: dispatch(c, BATCH, window=9, in_queue=0))
    assert bell == (job_id, BATCH, "echo:echo-1", 2, True)


def test_lanes_are_apart(database: Database) -> None:
    (line,) = lines(database, 1)
    chat = queued(database)
    change(database, chat, rung_ms=None)  # as after a retry
    assert rung(database, lane=INTERACTIVE) == [chat]
    assert rung(database, lane=BATCH) == [line]


def test_the_window_is_never_overfilled(database: Database) -> None:
    ids = lines(database, 10)
    assert rung(database, window=4) == ids[:4]
    assert rung(database, window=4, in_queue=4) == []
    assert rung(database, window=4, in_queue=3) == ids[4:5]
    assert rung(database, window=4, in_queue=9) == []


def test_callers_take_turns(database: Database) -> None:
    alice = lines(database, 5, caller="alice")
    bob = lines(database, 2, caller="bob")
    assert rung(database, window=6) == [alice[0], bob[0], alice[1], bob[1], alice[2], alice[3]]


def test_a_window_with_room_for_one_is_shared_too(database: Database) -> None:
    for caller in ("alice", "bob", "carol"):
        lines(database, 4, caller=caller)
    served = Counter(
        row(database, job_id).caller
        for in_queue in range(9)
        for job_id in rung(database, window=in_queue + 1, in_queue=in_queue)
    )
    assert served == {"alice": 3, "bob": 3, "carol": 3}


def test_more_callers_than_a_round_sees_are_all_served(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_CALLERS", 3)
    callers = [f"caller-{number}" for number in range(8)]
    for caller in callers:
        lines(database, 6, caller=caller)
    served = Counter(
        row(database, job_id).caller
        for number in range(4)
        for job_id in rung(database, window=4 * number + 4, in_queue=4 * number)
    )
    assert set(served) == set(callers)


def test_callers_who_cannot_be_served_do_not_block_the_others(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_CALLERS", 2)
    for caller in ("a", "b"):
        (waiting,) = lines(database, 1, caller=caller)
        change(database, waiting, run_ms=ago(database, -60))
    (due,) = lines(database, 1, caller="c")
    assert rung(database) + rung(database) == [due]


def test_what_a_dead_worker_had_is_ahead_of_everybodys_line(database: Database) -> None:
    lines(database, 3, caller="alice")
    bob = lines(database, 3, caller="bob")
    claimed(database, bob[2])
    lapse(database, bob[2])
    assert database.write_now(lambda c: reaping.reap(c, bob[2], 1))
    assert rung(database, window=1) == [bob[2]]


@pytest.mark.parametrize("why", ["not due", "cancelled", "running", "finished", "not its turn"])
def test_a_job_is_not_rung_when_it_is(why: str, database: Database) -> None:
    if why == "finished":
        finished(database, lane=BATCH)
    elif why == "not its turn":
        session(database)
        claimed(database, queued(database, session_id="sess_1"))
        queued(database, session_id="sess_1", lane=BATCH)
    else:
        (job_id,) = lines(database, 1)
        if why == "not due":
            change(database, job_id, run_ms=ago(database, -60))
        elif why == "cancelled":
            database.write_now(lambda c: cancelling.request_cancel(c, job_id, "alice"))
        else:
            claimed(database, job_id)
    assert rung(database) == []


def test_a_session_is_rung_one_at_a_time(database: Database) -> None:
    session(database)
    first, second = (queued(database, session_id="sess_1", lane=BATCH) for _ in range(2))
    assert rung(database) == [first]
    claim = claimed(database, first)
    assert rung(database) == []
    database.write_now(lambda c: lifecycle.finish(c, claim, outcome()))
    assert rung(database) == [second]


# ---------------------------------------------------------------- lost doorbells


def test_a_lost_bell_is_rung_again_after_five_seconds_and_not_before(database: Database) -> None:
    ids = lines(database, 3)
    assert rung(database) == ids
    assert rung(database, in_queue=0) == []  # Redis was flushed, but that may be on its way
    change(database, ids[1], rung_ms=ago(database, 6))
    assert rung(database, in_queue=0) == [ids[1]]
    assert rung(database, in_queue=0) == []


def test_a_bell_that_still_waits_in_the_queue_is_not_rung_again(database: Database) -> None:
    ids = lines(database, 3)
    rung(database)
    for each in ids:
        change(database, each, rung_ms=ago(database, 600))
    assert rung(database, in_queue=3) == []
    assert len(rung(database, in_queue=2)) == 1


def test_an_interactive_job_whose_ring_failed_is_rung_by_the_dispatcher(database: Database) -> None:
    job_id = queued(database)
    assert rung(database, lane=INTERACTIVE) == []
    change(database, job_id, rung_ms=ago(database, 6))
    assert rung(database, lane=INTERACTIVE) == [job_id]


def test_dispatchers_at_once_never_ring_a_job_twice(database_url: str) -> None:
    processes = [Database(database_url, name=f"caretaker-{number}") for number in range(3)]
    new = new_job(lane=BATCH)
    accepted = [processes[0].submit(lambda c: accept(c, new)) for _ in range(120)]
    ids = [each.result(60).job_id for each in accepted]
    rounds = [
        each.submit(lambda c: dispatch(c, BATCH, window=40, in_queue=0))
        for _ in range(8)
        for each in processes
    ]
    bells = Counter(bell.job_id for each in rounds for bell in each.result(60))
    assert bells == dict.fromkeys(ids, 1)
    for each in processes:
        each.close()


@pytest.mark.parametrize("what", ["rung", "claimed"])
def test_a_job_that_is_taken_while_the_dispatcher_looks_is_not_rung(
    what: str, postgres_url: str
) -> None:
    other, caretaker = (Database(postgres_url, name=name) for name in ("other", "caretaker"))
    (job_id,) = lines(other, 1)
    taken, may_commit = threading.Event(), threading.Event()

    def take(connection: Connection) -> None:
        if what == "rung":
            assert dispatch(connection, BATCH, window=1, in_queue=0)
        else:
            assert lifecycle.claim(connection, job_id, "worker-1", LEASE_S)
        taken.set()
        assert may_commit.wait(30)

    taking = other.submit(take)
    assert taken.wait(30)
    ringing = caretaker.submit(lambda c: dispatch(c, BATCH, window=1, in_queue=0))
    until_somebody_waits(other)
    may_commit.set()
    taking.result(30)
    assert ringing.result(30) == []
    other.close()
    caretaker.close()


# ---------------------------------------------------------------- slots


def test_only_processes_heard_of_lately_have_slots(database: Database) -> None:
    assert database.read_now(lambda c: live_slots(c, LEASE_S)) == 0
    for owner, slots in (("worker-1", 100), ("worker-2", 20)):
        database.write_now(
            lambda c, owner=owner, slots=slots: lifecycle.sign_on(c, owner, "host", 1, slots)
        )
    assert database.read_now(lambda c: live_slots(c, LEASE_S)) == 120
    database.write_now(
        lambda c: c.exec_driver_sql("UPDATE workers SET seen_ms = 1 WHERE owner = 'worker-1'")
    )
    assert database.read_now(lambda c: live_slots(c, LEASE_S)) == 20


# ---------------------------------------------------------------- cost

LOOKUPS: dict[str, tuple[Any, str]] = {
    "who has a backlog": (module._NEXT_CALLER, "ix_jobs_unrung"),
    "who is next": (module._DUE, "ix_jobs_unrung"),
    "how many are rung": (module._COUNT_RUNG, "ix_jobs_rung"),
    "lost bells": (module._LOST, "ix_jobs_rung"),
    "lapsed": (reaping._LAPSED, "ix_jobs_running"),
    "cancelled": (closing._OVERDUE[0], "ix_jobs_cancelling"),
    "overdue": (closing._OVERDUE[1], "ix_jobs_deadline"),
    "claim": (lifecycle._CLAIM, "sqlite_autoindex_jobs_1"),
    "heartbeat": (lifecycle._HEARTBEAT, "sqlite_autoindex_jobs_1"),
}
PARAMETERS = {
    "in_lane": BATCH, "lost_after_ms": 5000, "room": 10, "after": "", "who": "alice",
    "job": "job_1", "held": ["job_1"], "by_owner": "worker-1", "lease_in_ms": 1,
    "crashes_below": 2,
}  # fmt: skip


def spoken(database: Database, statement: Any) -> tuple[str, Any]:
    """A statement and its parameters as the driver gets them."""
    names = statement.compile(database.engine).params
    values = {name: value for name, value in PARAMETERS.items() if name in names}
    heard: list[tuple[str, Any]] = []

    def listen(_c: Any, _cursor: Any, sql: str, parameters: Any, *_: Any) -> None:
        heard.append((sql, parameters))

    event.listen(database.engine, "before_cursor_execute", listen)
    database.write_now(lambda c: c.execute(statement, values))
    event.remove(database.engine, "before_cursor_execute", listen)
    return heard[-1]


@pytest.mark.parametrize("name", LOOKUPS)
def test_the_cost_does_not_grow_with_the_table(name: str, sqlite_url: str) -> None:
    statement, index = LOOKUPS[name]
    database = Database(sqlite_url, name="test")
    sql, parameters = spoken(database, statement)
    plan = database.read_now(
        lambda c: c.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", parameters).all()
    )
    database.close()
    steps = [step.detail for step in plan]
    looked_up = [step for step in steps if step.startswith("SEARCH jobs")]
    assert len(looked_up) == 1, steps
    assert f" {index} " in looked_up[0], steps
    assert not any(step.startswith("SCAN") or "TEMP B-TREE" in step for step in steps), steps


@pytest.mark.parametrize("name", [n for n, (_, index) in LOOKUPS.items() if index.startswith("ix")])
def test_a_prepared_statement_takes_the_partial_index_too(name: str, postgres_url: str) -> None:
    # the driver prepares what it runs for the sixth time, and the plan must do for any parameters
    statement, _ = LOOKUPS[name]
    database = Database(postgres_url, name="test")
    sql, parameters = spoken(database, statement)
    for number, parameter in enumerate(parameters, 1):
        sql = sql.replace(f"%({parameter})s", f"${number}")
    call = f"asked ({', '.join(['NULL'] * len(parameters))})" if parameters else "asked"

    def explain(connection: Connection) -> str:
        # an empty table is read faster without an index; the question is whether it can be used
        for setting in ("enable_seqscan = off", "plan_cache_mode = force_generic_plan"):
            connection.exec_driver_sql(f"SET LOCAL {setting}")
        connection.exec_driver_sql(f"PREPARE asked AS {sql}")
        return "\n".join(connection.exec_driver_sql(f"EXPLAIN EXECUTE {call}").scalars())

    explained = database.read_now(explain)
    database.close()
    partial = {index for _, index in LOOKUPS.values() if index.startswith("ix")}
    assert any(f" {index} " in explained for index in partial), explained
