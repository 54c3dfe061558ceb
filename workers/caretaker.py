"""Reaper, dispatcher and expiry: habits of every worker process, safe in any number of copies.

Each round is guarded statements only, so two caretakers that meet do the work once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from backchannel import books, bus, closing, dispatch, events, reaping
from backchannel.events import Event, end_fields
from backchannel.pieces import text_message
from backchannel.queue import queue_length, ring
from backchannel.tables import CANCELLED, FAILED, LANES
from workers.heart import survive

if TYPE_CHECKING:
    from workers.process import Process

log = structlog.get_logger()

REAP_S = 2.0
DISPATCH_S = 1.0
BUSY_DISPATCH_S = 0.25  # while there is a backlog, so that short jobs do not wait for the window
WINDOW_PER_SLOT = 4  # doorbells in Redis for each slot: enough to never starve, few to lose


def habits(process: Process) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
    """The caretaker's tasks, with their names."""
    yield "reaper", _reap_forever(process)
    yield "expiry", _expire_forever(process)
    yield "dispatcher", _dispatch_forever(process)


async def _reap_forever(process: Process) -> None:
    while True:
        # jittered, so that many caretakers do not all look at once
        await asyncio.sleep(REAP_S * random.uniform(0.75, 1.0))
        if process.pulse.may_judge():
            await survive("The reaper could not look.", lambda: reap(process))


async def _expire_forever(process: Process) -> None:
    # not the reaper's: with Redis frozen each closing waits for it, and reaping must not
    while True:
        await asyncio.sleep(REAP_S * random.uniform(0.75, 1.0))
        await survive("The expiry could not look.", lambda: close_overdue(process))


async def reap(process: Process) -> None:
    """Put jobs of dead workers back at the head of the line, or fail the ones that kill workers."""
    lease_s = process.settings.lease_s
    for job in await process.db.write(partial(reaping.lapsed, lease_s=lease_s)):
        if not job.is_suspect(process.settings.max_crashes):
            if await process.db.write(
                partial(reaping.reap, job_id=job.job_id, attempt=job.attempt)
            ):
                log.warning(
                    "A worker went silent; its job goes back to the head of the line.",
                    job=job.job_id,
                    attempt=job.attempt,
                )
            continue
        if job.silent_ms < lease_s * 1000:
            continue
        why = f"{job.crashes} workers died while running this job."
        end = end_fields(FAILED, error_code="poison", error_message=why)
        closed, outcome = await _close(process, job.job_id, job.attempt, job.age_ms, end)
        poison = partial(
            reaping.reap_poison, job_id=job.job_id, attempt=job.attempt, outcome=outcome
        )
        if await process.db.write(poison):
            log.error("A job was failed: it took too many workers with it.", job=job.job_id)
            await _tell(process, job.job_id, job.attempt, closed)


async def close_overdue(process: Process) -> None:
    """End the queued jobs that were cancelled, or whose deadline has passed."""
    for job in await process.db.write(closing.overdue):
        end = end_fields(job.state)
        if job.state == "expired":
            end = end_fields(
                job.state, error_code="expired", error_message="The job's deadline passed."
            )
        closed, outcome = await _close(process, job.job_id, job.attempt, job.age_ms, end)
        finished = await process.db.write(
            partial(closing.close_queued, job_id=job.job_id, attempt=job.attempt, outcome=outcome)
        )
        if finished is not None:
            await _tell(process, job.job_id, job.attempt, closed)
            await process.ring(finished.next)


async def _close(
    process: Process, job_id: str, attempt: int, age_ms: int, end: dict[str, Any]
) -> tuple[list[Event], books.Outcome]:
    prefix = process.settings.redis_prefix
    closed = await bus.close_log(process.redis, prefix, job_id, attempt, age_ms, end)
    error = end["error"] or {"code": None, "message": None}
    return closed, books.Outcome(
        state=end["state"],
        log=events.pack_log(closed),
        message=text_message(closed) if end["state"] == CANCELLED else None,
        error_code=error["code"],
        error_message=error["message"],
    )


async def _tell(process: Process, job_id: str, attempt: int, closed: list[Event]) -> None:
    prefix = process.settings.redis_prefix
    await bus.publish_closed(process.redis, prefix, job_id, attempt, closed)


async def _dispatch_forever(process: Process) -> None:
    rung = 0

    async def round_() -> None:
        nonlocal rung
        rung = 0
        for lane in LANES:
            rung += await ring_due(process, lane)

    while True:
        await asyncio.sleep((BUSY_DISPATCH_S if rung else DISPATCH_S) * random.uniform(0.75, 1.0))
        await survive("The dispatcher could not ring; queued jobs wait.", round_)


async def ring_due(process: Process, lane: str) -> int:
    """Fill a lane's window of doorbells; returns how many were rung."""
    in_queue = await queue_length(process.redis, process.settings.redis_prefix, lane)

    def choose(connection: Any) -> list[books.Doorbell]:
        slots = dispatch.live_slots(connection, process.settings.lease_s)
        return dispatch.dispatch(
            connection, lane, window=WINDOW_PER_SLOT * slots, in_queue=in_queue
        )

    bells = await process.db.write(choose)
    if bells:
        await ring(process.redis, process.settings.redis_prefix, bells)
    return len(bells)
