"""Keeps a process's claims alive, and ends the ones it has lost, cancelled or let run too long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

import structlog

from backchannel import lifecycle
from backchannel.errors import Unavailable
from backchannel.pubsub import OUTAGE

if TYPE_CHECKING:
    from workers.process import Process

log = structlog.get_logger()

# How often the fences and deadlines of all running jobs are looked at, by one task for all.
SHEPHERD_S = 0.25


def habits(process: Process) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
    """The heart's tasks, with their names."""
    yield "heartbeat", _beat_forever(process)
    yield "shepherd", _shepherd_forever(process)
    yield "cancel-hints", _hear_cancels_forever(process)


async def survive(sentence: str, step: Callable[[], Awaitable[Any]]) -> None:
    """One round of a habit: what a server's absence breaks is logged and tried again next time."""
    try:
        await step()
    except (Unavailable, *OUTAGE) as error:
        log.warning(sentence, error=str(error))
    except Exception:
        # a defect: a process without its heart would hold jobs and never let go of them
        log.exception(sentence)


async def _beat_forever(process: Process) -> None:
    while True:
        await asyncio.sleep(process.settings.heartbeat_s)
        await survive("The heartbeat was not written.", lambda: beat(process))


async def beat(process: Process) -> None:
    """Renew the leases of all running jobs; stop the ones that are no longer ours."""
    asked = time.monotonic()  # the lease counts from before the statement, never from after
    held = dict(process.runs)
    job_ids = [job_id for job_id, _ in held]
    beats = await process.db.write(
        lambda c: lifecycle.heartbeat(c, process.owner, job_ids, process.settings.lease_s)
    )
    for (job_id, attempt), run in held.items():
        found = beats.get(job_id)
        if found is None or found.attempt != attempt:
            run.stop("lost")
        else:
            run.renew(asked)
            if found.cancelled:
                run.stop("cancelled")


async def _shepherd_forever(process: Process) -> None:
    while True:
        await asyncio.sleep(SHEPHERD_S)
        now = time.monotonic()
        for run in list(process.runs.values()):
            run.check(now)


async def _hear_cancels_forever(process: Process) -> None:
    async with process.listener.subscribed(f"{process.settings.redis_prefix}cancel") as hints:
        while True:
            hint = await hints.get()
            if hint is not None:
                job_id = hint.decode()
                for run in [run for key, run in process.runs.items() if key[0] == job_id]:
                    run.stop("cancelled")
