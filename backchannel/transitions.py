"""What every transition of a job is made of: the one statement that changes a state, and its ends.

Only the transitions themselves may use it: a worker's (`lifecycle`), those of a dead worker's jobs
(`reaping`) and the ends of jobs that wait (`closing`).
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Update, bindparam, select, update

from backchannel.books import Outcome
from backchannel.db import NOW
from backchannel.tables import FOLLOWS, TERMINAL, attempts, jobs, state_is

# When the attempt that ends here called its provider, if it did. With the statement that ends it:
# what is on record decides whether there is something to pay, not what the worker believes.
_call = (
    select(attempts.c.provider_call_ms)
    .where(
        attempts.c.job_id == jobs.c.id,
        attempts.c.attempt == jobs.c.attempt,
        attempts.c.finished_ms.is_(None),
    )
    .correlate(jobs)
    .scalar_subquery()
    .label("provider_call_ms")
)

its_id = jobs.c.id == bindparam("job")


def move(here: str, there: str, which: ColumnElement[bool] = its_id) -> Update:
    """The one statement that changes a state; it asks the table of states."""
    if there not in FOLLOWS[here]:
        raise AssertionError(f"{there} does not follow {here}")
    return (
        update(jobs)
        .where(which, state_is(here))
        .values(
            state=there,
            **({"finished_ms": NOW, "lease_ms": None} if there in TERMINAL else {}),
        )
    )


def ending(statement: Update) -> Update:
    """An end with its reason, and all that `books.write_finish` needs of the row."""
    return statement.values(
        finish_reason=bindparam("how"),
        error_code=bindparam("code"),
        error_message=bindparam("why"),
    ).returning(
        jobs.c.id, jobs.c.kind, jobs.c.caller, jobs.c.lane, jobs.c.provider, jobs.c.model,
        jobs.c.model_reason, jobs.c.attempt, jobs.c.session_id, jobs.c.session_seq,
        jobs.c.interrupted_by, jobs.c.batch_id, jobs.c.line, _call,
    )  # fmt: skip


def ending_values(outcome: Outcome) -> dict[str, Any]:
    """The reason that an `ending` is executed with."""
    return {
        "how": outcome.finish_reason,
        "code": outcome.error_code,
        "why": outcome.error_message,
    }


def going_back(statement: Update) -> Update:
    """A way back to the queue: nobody's again, and all that `books.close_attempt` needs."""
    return statement.values(owner=None, lease_ms=None, rung_ms=None).returning(
        jobs.c.id, jobs.c.caller, jobs.c.lane, jobs.c.provider, jobs.c.model, jobs.c.model_reason,
        jobs.c.session_id, jobs.c.session_seq, jobs.c.attempt, _call,
    )  # fmt: skip
