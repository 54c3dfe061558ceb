"""Many short prompts: durable jobs a second of one worker process, the provider being no limit."""

from __future__ import annotations

import time

import uvloop

from benchmarks.client import driver
from benchmarks.installation import Installation
from benchmarks.processes import cpu_by_role
from benchmarks.progress import say
from benchmarks.work import SHORT, WARM_UP


def run(home: Installation, jobs: int) -> dict[str, float]:
    """From the first POST to the last finished row, on the batch lane."""
    say(f"batch of {jobs:,} on {home.kind}")
    uvloop.run(_post(home, 50, WARM_UP.pace.model))
    found = uvloop.run(_post(home, jobs, SHORT.model))
    return {f"batch.{home.kind}.{name}": value for name, value in found.items()}


async def _post(home: Installation, jobs: int, model: str) -> dict[str, float]:
    before = cpu_by_role(home.roles)
    started = time.monotonic()
    async with driver(home.url) as api:
        request = api.post(
            "/v1/jobs", {"model": f"openai:{model}", "prompt": "Hello?", "lane": "batch"}
        )
        await api.send_all([request] * jobs, 202)
    accepted_s = time.monotonic() - started
    await home.settled()
    took = time.monotonic() - started
    after = cpu_by_role(home.roles)
    assert set(home.states()) == {"succeeded"}, home.states()
    return {
        "jobs_per_s": jobs / took,
        "accepted_s": accepted_s,
        **{f"{role}_ms": (after[role] - before[role]) * 1e3 / jobs for role in after},
    }
