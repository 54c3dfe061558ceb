"""What publishing alone costs the worker: the flusher and its Redis client, with no provider.

Run as a process of its own, on the core of what is measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import uvloop

from backchannel import events
from backchannel.bus import Publisher
from backchannel.pubsub import connect
from benchmarks.processes import Child, cores
from benchmarks.progress import say
from benchmarks.work import REALISTIC
from tests.servers import valkey

STREAMS = 1000
GROUPS = 10  # the streams do not speak in the same instant


async def publish(url: str) -> None:
    """As many streams as in the paced work, at its pace; tells the CPU time of a token."""
    redis = connect(url)
    publisher = Publisher(redis, "backchannel:")
    streams = [await publisher.open(f"job_{number}", 1, 0) for number in range(STREAMS)]
    for stream in streams:
        stream.valid_until = time.monotonic() + 3600
    groups = [streams[first::GROUPS] for first in range(GROUPS)]
    step_s = REALISTIC.each_ms / 1000 / GROUPS
    before, due = time.process_time(), time.monotonic()
    for _ in range(REALISTIC.tokens):
        for group in groups:
            for stream in group:
                stream.text(events.DELTA, "token ")
            due += step_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
    await publisher.flush()
    used = time.process_time() - before
    late = time.monotonic() - due
    await publisher.close()
    await redis.aclose()
    tokens = STREAMS * REALISTIC.tokens
    print(json.dumps({"us_per_token": used * 1e6 / tokens, "late_s": late}), flush=True)


def run() -> dict[str, float]:
    """Measure in a process of its own."""
    say(f"publishing the tokens of {STREAMS:,} streams")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="bench-")))
        server = stack.enter_context(valkey(appendonly=True))
        child = Child(
            *("benchmarks.publishing", server.url),
            core=cores()[1],
            log=folder / "log",
            talks=True,
        )
        stack.callback(child.stop)
        told = json.loads(child.readline())
        return {f"publishing.{name}": value for name, value in told.items()}


if __name__ == "__main__":
    uvloop.run(publish(sys.argv[1]))
