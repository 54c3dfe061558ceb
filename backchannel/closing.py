"""The ends of jobs that wait: cancelled or expired, without (another) attempt."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, and_, bindparam, case, select

from backchannel.books import Finished, Outcome, write_finish
from backchannel.db import NOW
from backchannel.tables import CANCELLED, EXPIRED, QUEUED, jobs, state_is
from backchannel.transitions import ending, ending_values, move


class Overdue(NamedTuple):
    """A queued job that must end without (another) attempt, and in which state."""

    job_id: str
    attempt: int
    state: str
    age_ms: int


_overdue = (
    select(
        jobs.c.id,
        jobs.c.attempt,
        case((jobs.c.cancel_ms.is_not(None), CANCELLED), else_=EXPIRED),
        NOW - jobs.c.created_ms,
    )
    .where(state_is(QUEUED))
    .limit(1000)
)
_OVERDUE = (
    _overdue.where(jobs.c.cancel_ms.is_not(None)),
    _overdue.where(jobs.c.deadline_ms <= NOW),
)


def overdue(connection: Connection) -> list[Overdue]:
    """The queued jobs that were cancelled, or whose deadline has passed."""
    found = [Overdue(*row) for statement in _OVERDUE for row in connection.execute(statement)]
    return list({each.job_id: each for each in found}.values())


_CLOSE_QUEUED = {
    CANCELLED: ending(
        move(QUEUED, CANCELLED).where(
            jobs.c.attempt == bindparam("by_attempt"), jobs.c.cancel_ms.is_not(None)
        )
    ),
    EXPIRED: ending(
        move(QUEUED, EXPIRED).where(
            jobs.c.attempt == bindparam("by_attempt"), jobs.c.deadline_ms <= NOW
        )
    ),
}


def close_queued(
    connection: Connection, job_id: str, attempt: int, outcome: Outcome
) -> Finished | None:
    """End a queued job that was cancelled or has expired; None: it is not queued any more."""
    row = connection.execute(
        _CLOSE_QUEUED[outcome.state],
        {"job": job_id, "by_attempt": attempt, **ending_values(outcome)},
    ).first()
    return None if row is None else write_finish(connection, row, outcome)


# ---------------------------------------------------------------- the jobs of a batch

unfinished_in_batch = and_(jobs.c.batch_id == bindparam("batch"), jobs.c.finished_ms.is_(None))
CLOSE_AT_ONCE = 500


def _unstarted(must_end: ColumnElement[bool]) -> ColumnElement[bool]:
    some = (
        select(jobs.c.id)
        .where(unfinished_in_batch, state_is(QUEUED), jobs.c.attempt == 0, must_end)
        .limit(CLOSE_AT_ONCE)
    )
    # what changed since `some` looked must match as it is now
    return and_(jobs.c.id.in_(some), jobs.c.attempt == 0, must_end)


_CLOSE_UNSTARTED = {
    CANCELLED: ending(move(QUEUED, CANCELLED, _unstarted(jobs.c.cancel_ms.is_not(None)))),
    EXPIRED: ending(move(QUEUED, EXPIRED, _unstarted(jobs.c.deadline_ms <= NOW))),
}


def close_unstarted(connection: Connection, batch_id: str, outcome: Outcome) -> int:
    """End some of a batch's queued jobs that were cancelled or have expired; returns how many.

    Only jobs of which nothing has been streamed: `close_queued` ends the others one by one.
    """
    rows = connection.execute(
        _CLOSE_UNSTARTED[outcome.state], {"batch": batch_id, **ending_values(outcome)}
    ).all()
    for row in rows:
        write_finish(connection, row, outcome)
    return len(rows)
