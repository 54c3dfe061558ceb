"""Short ways to bring a job where a test needs it, and to look at all that is on record."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, select, text

from backchannel import lifecycle
from backchannel.accept import Accepted, NewJob, accept
from backchannel.books import Outcome, Spent
from backchannel.db import Database, now_ms
from backchannel.events import END, encode, pack_log
from backchannel.lifecycle import Claim
from backchannel.notices import EVENT_TYPES
from backchannel.pricing import Tokens
from backchannel.tables import INTERACTIVE, SUCCEEDED, TERMINAL, Job, jobs, sessions, webhooks

Step = Callable[[Connection], Any]  # work of one transaction

LEASE_S = 20.0
SPENT = Spent("final", Tokens(12, 3, cached=4), cost_nanousd=1_700, price_date="2026-01-01 test")


def new_job(**changes: Any) -> NewJob:
    """A job as the API hands it to `accept`."""
    usual: dict[str, Any] = {
        "caller": "alice",
        "lane": INTERACTIVE,
        "provider": "echo",
        "model": "echo-1",
        "requested_model": None,
        "model_reason": "test",
        "messages": [{"role": "user", "content": "Hello?"}],
        "parameters": {"max_tokens": 5},
        "request_hash": "hash of Hello?",
        "deadline_s": 3600.0,
    }
    return NewJob(**usual | changes)


def accepted(database: Database, **changes: Any) -> Accepted:
    """A job in the database."""
    return database.write_now(lambda c: accept(c, new_job(**changes)))


def queued(database: Database, **changes: Any) -> str:
    """The id of a job in the database."""
    return accepted(database, **changes).job_id


def claimed(database: Database, job_id: str, owner: str = "worker-1") -> Claim:
    """A running attempt at a job."""
    claim = database.write_now(lambda c: lifecycle.claim(c, job_id, owner, LEASE_S))
    assert claim is not None, f"{job_id} could not be claimed"
    return claim


def calling(database: Database, job_id: str, owner: str = "worker-1") -> Claim:
    """A running attempt whose provider call is on record."""
    claim = claimed(database, job_id, owner)
    assert database.write_now(lambda c: lifecycle.mark_call(c, claim))
    return claim


def outcome(state: str = SUCCEEDED, **changes: Any) -> Outcome:
    """How an attempt ends."""
    log = pack_log([encode(0, END, {"state": state})])
    usual: dict[str, Any] = {"state": state, "log": log, "spent": SPENT}
    if state == SUCCEEDED:
        usual |= {"finish_reason": "stop", "message": {"role": "assistant", "content": "Hello."}}
    else:
        usual |= {"error_code": f"why_{state}", "error_message": f"It {state}."}
    return Outcome(**usual | changes)


def finished(database: Database, state: str = SUCCEEDED, **changes: Any) -> str:
    """The id of a job that one attempt brought to its end."""
    job_id = queued(database, **changes)
    claim = calling(database, job_id)
    assert database.write_now(lambda c: lifecycle.finish(c, claim, outcome(state)))
    return job_id


def session(database: Database, session_id: str = "sess_1", caller: str = "alice") -> str:
    """A conversation with Echo."""
    row = {
        "id": session_id, "caller": caller, "provider": "echo", "model": "echo-1",
        "model_version": 1, "last_seq": 0, "meta": {}, "created_ms": 1, "updated_ms": 1,
    }  # fmt: skip
    database.write_now(lambda c: c.execute(sessions.insert(), row))
    return session_id


def webhook(database: Database, webhook_id: str = "wh_1", **changes: Any) -> str:
    """A webhook that is told of everything of Alice's; its secret is no secret."""
    row = {
        "id": webhook_id,
        "caller": "alice",
        "name": "",
        "url": "https://hooks.example.com/",
        "event_types": list(EVENT_TYPES),
        "secret": b"",
        "secret_hint": "",
        "created_ms": 1,
        "updated_ms": 1,
    }
    database.write_now(lambda c: c.execute(webhooks.insert(), row | changes))
    return webhook_id


def change(database: Database, job_id: str, **values: Any) -> None:
    """Put a job's row where time would have brought it."""
    database.write_now(lambda c: c.execute(jobs.update().where(jobs.c.id == job_id), values))


def ago(database: Database, seconds: float) -> int:
    """A moment of the past on the database's clock; negative seconds are ahead."""
    now: int = database.read_now(lambda c: c.execute(select(now_ms())).scalar_one())
    return now - int(seconds * 1000)


def lapse(database: Database, job_id: str) -> None:
    """The worker of a running job has gone silent for longer than its lease."""
    change(database, job_id, lease_ms=ago(database, 1))


def row(database: Database, job_id: str) -> Any:
    """A job's row."""
    return database.read_now(lambda c: c.execute(jobs.select().where(jobs.c.id == job_id)).one())


def rows(database: Database, table: str) -> list[dict[str, Any]]:
    """All rows of a table, in no order one may rely on but always the same."""
    found = database.read_now(
        lambda c: c.execute(text(f'SELECT * FROM "{table}"')).mappings().all()
    )
    return sorted((dict(each) for each in found), key=repr)


def everything(database: Database) -> dict[str, list[dict[str, Any]]]:
    """All that is on record: two of these are equal when nothing was written in between."""
    return {table: rows(database, table) for table in Job.metadata.tables}


def until_somebody_waits(database: Database) -> None:
    """Returns once a transaction on this PostgreSQL waits for another one's row."""
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    while not database.read_now(lambda c: c.exec_driver_sql(waiting).scalar()):
        time.sleep(0.01)


def claim_of(job_id: str, owner: str = "worker-2") -> Step:
    """A worker takes a job."""
    return lambda c: lifecycle.claim(c, job_id, owner, LEASE_S)


def retry_of(claim: Claim, **changes: Any) -> Step:
    """A worker tries an attempt again later."""
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
    """The step's guard matches nothing, and all that is on record stays."""
    before = everything(database)
    assert not database.write_now(step)
    assert everything(database) == before
