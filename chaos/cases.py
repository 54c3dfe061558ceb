"""What a case is: a name, where it runs, and a function that does harm and returns its figures."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from chaos.world import World

Harm = Callable[[World, bool], Awaitable[dict[str, Any]]]
Through = Literal["", "broker", "database"]

QUICK_LEASES = {
    "BACKCHANNEL_LEASE_S": "4",
    "BACKCHANNEL_HEARTBEAT_S": "1",
    "BACKCHANNEL_FENCE_S": "3",
    "BACKCHANNEL_GRACE_S": "5",
    "BACKCHANNEL_CIRCUIT_OPEN_S": "2",
}


@dataclass(frozen=True)
class Case:
    """One kind of harm.

    Attributes:
        quick: Whether it belongs to the quick profile too, with smaller numbers.
        databases: On which databases it runs in the full profile; quick takes the first.
        through: What the processes reach only through `World.proxy`: "broker" or "database".
        small_disk: The database lies on a disk of `SMALL_DISK_MB` of its own.
    """

    name: str
    harm: Harm
    quick: bool = True
    databases: tuple[str, ...] = ("sqlite",)
    settings: dict[str, str] = field(default_factory=dict)
    through: Through = ""
    small_disk: bool = False


CASES: list[Case] = []


def case(
    name: str,
    *,
    quick: bool = True,
    databases: tuple[str, ...] = ("sqlite",),
    through: Through = "",
    small_disk: bool = False,
    **settings: object,
) -> Callable[[Harm], Harm]:
    """Register a case; settings by their short names."""

    def register(harm: Harm) -> Harm:
        named = {f"BACKCHANNEL_{key.upper()}": str(value) for key, value in settings.items()}
        named = {**QUICK_LEASES, **named}
        CASES.append(Case(name, harm, quick, databases, named, through, small_disk))
        return harm

    return register


def recovery(world: World, since: float) -> dict[str, Any]:
    """Seconds from a harm to the moment each job that it hit was finished: p50, p95, max."""
    rows = world.rows("SELECT finished_ms FROM jobs WHERE attempt > 1 AND finished_ms IS NOT NULL")
    return _recovery([max(row.finished_ms / 1000 - since, 0.0) for row in rows])


def recovery_of_kills(world: World) -> dict[str, Any]:
    """Seconds from a worker's death to the moment each job that it had was finished."""
    rows = world.rows(
        "SELECT jobs.finished_ms, attempts.owner FROM attempts "
        "JOIN jobs ON jobs.id = attempts.job_id "
        "WHERE attempts.outcome = 'reaped' AND jobs.finished_ms IS NOT NULL"
    )
    waits = [
        row.finished_ms / 1000 - world.killed[pid]
        for row in rows
        if (pid := int(row.owner.split(":")[1])) in world.killed
    ]
    return _recovery(waits)


def _recovery(waits: list[float]) -> dict[str, Any]:
    if not waits:
        return {}
    p50, p95, most = percentiles(waits)
    return {
        "recovered": len(waits),
        "recovery_p50_s": p50,
        "recovery_p95_s": p95,
        "recovery_max_s": most,
        "_recovery_s": waits,  # for the page, not for the line
    }


def percentiles(seconds: list[float]) -> tuple[float, float, float]:
    """The 50th and the 95th percentile and the longest, in tenths of a second."""
    ordered = sorted(seconds)
    p95 = ordered[int(len(ordered) * 0.95)]
    return round(statistics.median(ordered), 1), round(p95, 1), round(ordered[-1], 1)


def accept_p99_s(world: World) -> float:
    """The 99th percentile of POST times so far."""
    times = sorted(world.accept_s)
    return round(times[min(int(len(times) * 0.99), len(times) - 1)], 3)


def prompt(world: World) -> float:
    """The same; a breach from 1 s on."""
    p99 = accept_p99_s(world)
    assert p99 < 1.0, f"accept p99 is {p99} s"
    return p99


async def accept_for(world: World, seconds: float) -> None:
    """Accept short jobs, 20 a second."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        await world.accept(10, "openai:ok-t5")
        await asyncio.sleep(0.5)


def now() -> float:
    """Wall-clock seconds, as the rows have them."""
    return time.time()
