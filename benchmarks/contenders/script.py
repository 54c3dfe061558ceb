"""What the two asyncio scripts share: start the answers at their times, and tell how it went.

A script is a process that reads one piece of work a line and answers with one line.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from benchmarks.work import Pace, Work, unstamp

# One answer: dialect, model, and what to call with its first text. Returns the whole text.
Ask = Callable[[str, str, Callable[[str], None]], Awaitable[str]]


def encode(work: Work) -> str:
    """One piece of work as a line."""
    return json.dumps(asdict(work))


def decode(line: str) -> Work:
    """The piece of work of a line."""
    fields = json.loads(line)
    return Work(**{**fields, "pace": Pace(**fields["pace"])})


async def serve(ask: Ask) -> None:
    """Do the work of each line of standard input."""
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await _do(ask, decode(line))), flush=True)


async def _do(ask: Ask, work: Work) -> dict[str, Any]:
    slots = asyncio.Semaphore(work.concurrency)
    delays_ms: list[float] = []

    def first(text: str) -> None:
        mark = unstamp(text)
        assert mark is not None, f"no mark in {text!r}"
        delays_ms.append((time.monotonic_ns() - mark[0]) / 1e6)

    async def one(number: int) -> int:
        await asyncio.sleep(work.start_s(number))
        async with slots:
            text = await ask(work.dialect, work.pace_of(number).model, first)
        return text.count("token ") + 1  # the first is the mark

    tokens = sum(await asyncio.gather(*[one(number) for number in range(work.jobs)]))
    return {"tokens": tokens, "delays_ms": delays_ms}
