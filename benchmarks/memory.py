"""Resident memory of a job in flight, beyond what the worker takes without any."""

from __future__ import annotations

import asyncio

import uvloop

from benchmarks.contenders.who import Backchannel
from benchmarks.installation import Installation
from benchmarks.processes import resident_kb
from benchmarks.progress import say
from benchmarks.work import STARTS_PER_S, Pace, Work

JOBS = 1000
SLOW = Pace(20, first_ms=4000, each_ms=100)  # so slow that nearly all of them overlap


def run(home: Installation) -> dict[str, float]:
    """The highest of a first wave in a fresh worker, against the moment before it."""
    say(f"memory of {JOBS:,} jobs in flight")
    (pid,) = home.roles["worker"]
    return uvloop.run(_wave(Backchannel(home), pid))


async def _wave(ours: Backchannel, pid: int) -> dict[str, float]:
    await ours.go(Work(Pace(8), 5, 5))  # the SDK is imported now
    base = peak = resident_kb([pid])
    most = 0
    going = asyncio.create_task(ours.go(Work(SLOW, JOBS, JOBS, STARTS_PER_S)))
    while not going.done():
        await asyncio.sleep(0.25)
        peak = max(peak, resident_kb([pid]))
        most = max(most, ours.home.states().get("running", 0))
    await going
    return {
        "memory.base_mb": base / 1024,
        "memory.kb_per_job": (peak - base) / most,
        "memory.most_running": most,
    }
