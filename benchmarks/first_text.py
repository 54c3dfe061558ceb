"""How long a user waits for the first text: from POST to the first text on the SSE stream.

The provider's own time to its first token is taken off; what is left is what Backchannel adds.
"""

from __future__ import annotations

import asyncio
import json
import time

import uvloop

from benchmarks.client import Driver, driver
from benchmarks.figures import percentile
from benchmarks.installation import Installation
from benchmarks.progress import say
from benchmarks.work import WARM_UP, Pace, Work, unstamp

ONE_BY_ONE = Pace(4, first_ms=100, each_ms=20)
# Each token is read on its own SSE stream, and the API that sends them shares a core with broker,
# provider and driver: 2,500 a second for a thousand readers, of whom 100 come in a second.
READ = Pace(128, first_ms=100, each_ms=400)
READERS_PER_S = 100


def run(home: Installation, streams: dict[int, int]) -> dict[str, float]:
    """Percentiles for each number of streams; the second number is how many waves are watched."""
    figures: dict[str, float] = {}
    for number, waves in streams.items():
        say(f"first text with {number:,} streams")
        added = uvloop.run(_waves(home.url, number, waves))
        for share in (50, 99):
            figures[f"first_text.{number}.p{share}_ms"] = percentile(added, share / 100)
    return figures


async def _waves(url: str, streams: int, waves: int) -> list[float]:
    async with driver(url) as api:
        await asyncio.gather(*[_added_ms(api, WARM_UP.pace) for _ in range(10)])
        if streams == 1:
            return [await _added_ms(api, ONE_BY_ONE) for _ in range(waves)]
        work = Work(READ, streams, streams, READERS_PER_S, gathering=True)
        added: list[float] = []
        for _ in range(waves):
            added += await asyncio.gather(
                *[
                    _added_ms(api, work.pace_of(number), work.start_s(number))
                    for number in range(work.jobs)
                ]
            )
        return added


async def _added_ms(api: Driver, pace: Pace, after_s: float = 0.0) -> float:
    await asyncio.sleep(after_s)
    asked = time.monotonic_ns()
    body = {"model": f"openai:{pace.model}", "prompt": "Hello?"}
    answer = await api.send(api.post("/v1/jobs", body))
    assert answer.status == 202, answer
    added: list[float] = []
    rest = b""

    def on_data(data: bytes, now: int) -> bool:
        nonlocal rest
        if not added and (mark := unstamp(data)):
            added.append((now - asked - mark[1]) / 1e6)
        rest = (rest + data)[-64:]
        return b"event: end" in rest + data

    await api.read(f"/v1/jobs/{json.loads(answer.body)['id']}/events", on_data)
    assert added, "a stream without text"
    return added[0]
