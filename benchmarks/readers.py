"""Live readers: many SSE streams from one API process, how late they are and what they cost."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

import uvloop

from benchmarks.client import driver
from benchmarks.figures import percentile
from benchmarks.installation import Installation
from benchmarks.processes import cpu_s
from benchmarks.progress import say
from benchmarks.work import STAMP, Pace

READERS_A_JOB = 10


def run(home: Installation, readers: int) -> dict[str, float]:
    """Each job has ten readers; delays are from the provider's sending of a token."""
    say(f"{readers:,} live readers")
    (pid,) = home.roles["api"]
    with home.measured("api"):
        return uvloop.run(_read(home.url, pid, readers))


async def _read(url: str, pid: int, readers: int) -> dict[str, float]:
    watch = _Watch(pid, readers)
    # the readers are there before the text
    pace = Pace(30, first_ms=1000 + 2 * readers, each_ms=200, stamped=True)
    async with driver(url) as api:
        request = api.post("/v1/jobs", {"model": f"openai:{pace.model}", "prompt": "Hello?"})
        jobs = [
            json.loads((await api.send(request)).body)["id"]
            for _ in range(readers // READERS_A_JOB)
        ]
        begun = cpu_s([pid])
        await asyncio.gather(
            *[
                api.read(f"/v1/jobs/{job}/events", watch.reader())
                for job in jobs
                for _ in range(READERS_A_JOB)
            ]
        )
        used, took = cpu_s([pid]) - watch.cpu_s, time.monotonic() - watch.since
    assert watch.ended == readers, f"{watch.ended} of {readers} streams came to their end"
    return {
        "readers.count": readers,
        "readers.p50_ms": percentile(watch.delays_ms, 0.5),
        "readers.p99_ms": percentile(watch.delays_ms, 0.99),
        "readers.us_per_event": used * 1e6 / len(watch.delays_ms),
        "readers.api_share": used / took,
        "readers.connect_us": (watch.cpu_s - begun) * 1e6 / readers,
    }


class _Watch:
    """What all readers see, from the moment when the last of them is connected."""

    def __init__(self, pid: int, readers: int) -> None:
        self.delays_ms: list[float] = []
        self.ended = 0
        self.cpu_s = self.since = 0.0
        self._pid = pid
        self._missing = readers

    def reader(self) -> Callable[[bytes, int], bool]:
        """What one reader does with its bytes."""
        tail = b""

        def on_data(data: bytes, now: int) -> bool:
            nonlocal tail
            if not tail:
                self._connected()
            if not self._missing:
                self.delays_ms += [(now - int(sent)) / 1e6 for sent, _ in STAMP.findall(data)]
            end = b"event: end" in tail + data
            tail = data[-32:]
            self.ended += end
            return end

        return on_data

    def _connected(self) -> None:
        self._missing -= 1
        if not self._missing:
            self.cpu_s = cpu_s([self._pid])
            self.since = time.monotonic()
