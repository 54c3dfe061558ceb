"""Keeps a process's claims alive, and ends the ones it has lost, cancelled or let run too long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

import structlog
from sqlalchemy import Connection

from backchannel import lifecycle
from backchannel.errors import Unavailable
from backchannel.pubsub import OUTAGE
from backchannel.settings import Settings

if TYPE_CHECKING:
    from workers.process import Process

log = structlog.get_logger()

# How often the fences and deadlines of all running jobs are looked at, by one task for all.
SHEPHERD_S = 0.25
RETRY_S = 1.0  # a heartbeat that was not written has less time than one that is not due


def habits(process: Process) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
    """The heart's tasks, with their names."""
    yield "heartbeat", _beat_forever(process)
    yield "shepherd", _shepherd_forever(process)
    yield "cancel-hints", _hear_cancels_forever(process)


class Pulse:
    """When this process last wrote its heartbeat: how it knows an outage from others' deaths."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._last = time.monotonic()
        self._judge_from = 0.0

    def felt(self) -> None:
        """A heartbeat was written."""
        now = time.monotonic()
        if now - self._last > self._settings.fence_s:
            self._judge_from = now + self._settings.lease_s
        self._last = now

    def may_judge(self) -> bool:
        """Whether a lapsed lease means that a worker has died.

        Who could not renew its own leases, because the database was away or it was frozen itself,
        cannot say that of others: once it can again they have one lease's time to renew theirs.
        """
        now = time.monotonic()
        return now - self._last <= self._settings.fence_s and now >= self._judge_from


async def survive(sentence: str, step: Callable[[], Awaitable[Any]]) -> bool:
    """One round of a habit: what a server's absence breaks is logged and tried again next time."""
    try:
        await step()
        return True
    except (Unavailable, *OUTAGE) as error:
        log.warning(sentence, error=str(error))
    except Exception:
        # a defect: a process without its heart would hold jobs and never let go of them
        log.exception(sentence)
    return False


async def _beat_forever(process: Process) -> None:
    written = True
    while True:
        pause_s = process.settings.heartbeat_s
        await asyncio.sleep(pause_s if written else min(pause_s, RETRY_S))
        written = await survive("The heartbeat was not written.", lambda: beat(process))


async def beat(process: Process) -> None:
    """Renew the leases of all running jobs; stop the ones that are no longer ours.

    And let go of the ones that are ours by mistake.
    """
    asked = time.monotonic()  # the lease counts from before the statement, never from after
    held = dict(process.runs)
    job_ids = [job_id for job_id, _ in held]
    lease_s, young_s = process.settings.lease_s, process.settings.heartbeat_s
    version = process.roster.registry.version

    def write(connection: Connection) -> tuple[dict[str, lifecycle.Beat], int]:
        beats = lifecycle.heartbeat(connection, process.owner, job_ids, lease_s, version)
        return beats, lifecycle.hand_back_strays(connection, process.owner, held, lease_s - young_s)

    beats, strays = await process.db.write(write)
    process.pulse.felt()
    if strays:
        log.warning(
            "Some jobs were ours on the books and not here, after an outage; they go back.",
            jobs=strays,
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
