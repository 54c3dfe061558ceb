"""Cancels, put on record: from then on no attempt starts, and what runs is told to stop."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, bindparam, case, update

from backchannel.books import Outcome
from backchannel.closing import close_queued, unfinished_in_batch
from backchannel.db import NOW
from backchannel.events import END, encode, end_fields, pack_log
from backchannel.tables import CANCELLED, QUEUED, RUNNING, jobs, state_is


class Cancelling(NamedTuple):
    """Where a job stood when its cancel was put on record."""

    state: str
    attempt: int
    age_ms: int


_REQUEST_CANCEL = (
    update(jobs)
    .where(
        jobs.c.id == bindparam("job"),
        jobs.c.caller == bindparam("who"),
        state_is(QUEUED, RUNNING),
    )
    .values(cancel_ms=case((jobs.c.cancel_ms.is_(None), NOW), else_=jobs.c.cancel_ms))
    .returning(jobs.c.state, jobs.c.attempt, NOW - jobs.c.created_ms)
)


def request_cancel(connection: Connection, job_id: str, caller: str) -> Cancelling | None:
    """Put a cancel on record: from here on no attempt starts. None: finished, or not there."""
    row = connection.execute(_REQUEST_CANCEL, {"job": job_id, "who": caller}).first()
    return None if row is None else Cancelling(*row)


_INTERRUPT = (
    update(jobs)
    .where(
        jobs.c.session_id == bindparam("session"),
        jobs.c.session_seq < bindparam("seq"),
        state_is(QUEUED, RUNNING),
        jobs.c.cancel_ms.is_(None),
    )
    .values(cancel_ms=NOW, interrupted_by=bindparam("by_job"))
    .returning(jobs.c.id, jobs.c.attempt)
)
_UNHEARD = Outcome(CANCELLED, pack_log([encode(0, END, end_fields(CANCELLED))]))


def interrupt(connection: Connection, session_id: str, seq: int, by_job: str) -> str | None:
    """Cancel a session's unfinished turns before a place, for the job that comes after them.

    Those that have not begun end at once. Of the one that has, the cancel is on record; returns it.
    """
    found = connection.execute(_INTERRUPT, {"session": session_id, "seq": seq, "by_job": by_job})
    begun = None
    for row in found.all():
        if row.attempt or close_queued(connection, row.id, 0, _UNHEARD) is None:
            begun = row.id
    return begun


_CANCEL_BATCH = (
    update(jobs)
    .where(unfinished_in_batch, jobs.c.cancel_ms.is_(None))
    .values(cancel_ms=NOW)
    .returning(jobs.c.id, jobs.c.state)
)


def request_cancel_of_batch(connection: Connection, batch_id: str) -> list[str]:
    """Put a cancel on record for all unfinished jobs of a batch; returns those that run."""
    rows = connection.execute(_CANCEL_BATCH, {"batch": batch_id})
    return [row.id for row in rows if row.state == RUNNING]
