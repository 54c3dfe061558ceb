"""Enqueue rate: single POSTs over keep-alive connections to one API process, beside two others."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import uvloop

from benchmarks.client import driver
from benchmarks.figures import median
from benchmarks.installation import installation
from benchmarks.processes import Child, cores, cpu_s
from benchmarks.progress import say
from tests.servers import free_port, valkey

BODY = {"model": "openai:t1-f0-d0", "prompt": "Hello?"}
CONNECTIONS = 64


def run(rounds: int, seconds: float, provider: str, kinds: tuple[str, ...]) -> dict[str, float]:
    """POSTs a second and CPU microseconds of the server a POST; no worker runs meanwhile."""
    measured = cores()[1]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="bench-")))
        broker = stack.enter_context(valkey(appendonly=True))
        servers: dict[str, tuple[str, int]] = {}
        for name in ("empty", "naive"):
            port = free_port()
            child = Child(
                *("benchmarks.endpoints", name, str(port)),
                core=measured,
                log=folder / f"{name}.log",
                env={
                    "BENCHMARK_DATABASE": f"sqlite:///{folder}/naive.db",
                    "BENCHMARK_BROKER": f"redis+socket://{broker.socket}",
                },
            )
            stack.callback(child.stop)
            servers[name] = (f"http://127.0.0.1:{port}", child.pid)
        for kind in kinds:
            home = stack.enter_context(installation(kind, provider))
            child, _ = home.api(core=measured)
            servers[kind] = (home.url, child.pid)
        return uvloop.run(_rounds(servers, rounds, seconds))


async def _rounds(
    servers: dict[str, tuple[str, int]], rounds: int, seconds: float
) -> dict[str, float]:
    found: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, (url, pid) in servers.items():
            say(f"POST rate, round {number} of {rounds}: {name}")
            async with driver(await _answering(url), CONNECTIONS) as api:
                before, own = cpu_s([pid]), time.process_time()
                started = time.monotonic()
                count = await api.send_for(
                    seconds if number else 0.3, api.post("/v1/jobs", BODY), 202
                )
                took = time.monotonic() - started
                used = cpu_s([pid]) - before
            if number:  # the first one warms up
                found[f"posts.{name}.per_s"].append(count / took)
                found[f"posts.{name}.us"].append(used * 1e6 / count)
                found[f"posts.{name}.per_cpu_s"].append(count / used)
                found[f"posts.{name}.driver_share"].append((time.process_time() - own) / took)
    return {name: median(values) for name, values in found.items()}


async def _answering(url: str) -> str:
    host, _, port = url.removeprefix("http://").partition(":")
    for _ in range(600):
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return url
    raise AssertionError(f"{url} does not listen")
