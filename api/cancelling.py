"""Cancels: on record first; then workers and readers are let know."""

from __future__ import annotations

from fastapi import BackgroundTasks
from sqlalchemy import Connection

from api.deps import Resources
from backchannel import bus
from backchannel.books import Finished, Outcome
from backchannel.cancelling import Cancelling, request_cancel
from backchannel.closing import close_queued
from backchannel.events import end_fields, pack_log
from backchannel.pieces import text_message
from backchannel.tables import CANCELLED, QUEUED


async def cancel(its: Resources, caller: str, job_id: str, afterwards: BackgroundTasks) -> None:
    """Put a cancel on record, and let workers and readers know."""
    asked = await its.db.write(lambda c: request_cancel(c, job_id, caller))
    if asked is not None and asked.state == QUEUED:
        await _cancel_queued(its, job_id, asked, afterwards)
    elif asked is not None:
        afterwards.add_task(bus.hint_cancel, its.redis, its.prefix, job_id)


async def cancelled(its: Resources, caller: str, job_id: str) -> None:
    """Cancel a job, outside of any request."""
    afterwards = BackgroundTasks()
    await cancel(its, caller, job_id, afterwards)
    await afterwards()


async def _cancel_queued(
    its: Resources, job_id: str, asked: Cancelling, afterwards: BackgroundTasks
) -> None:
    log = await bus.close_log(
        its.redis, its.prefix, job_id, asked.attempt, asked.age_ms, end_fields(CANCELLED)
    )
    outcome = Outcome(CANCELLED, pack_log(log), message=text_message(log))

    def close(connection: Connection) -> Finished | None:
        return close_queued(connection, job_id, asked.attempt, outcome)

    closed = await its.db.write(close)
    if closed is not None:
        its.ringer.ring(closed.next)
        # the answer does not wait for Redis
        afterwards.add_task(bus.publish_closed, its.redis, its.prefix, job_id, asked.attempt, log)
