"""The provider's own ceiling: what it can send to a reader that does nothing but read.

Everything else is only worth measuring well below it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import uvloop

from benchmarks.processes import Child, cores, cpu_s
from benchmarks.work import AT_ONCE, REALISTIC, Pace

LAST = b"data: [DONE]"


@contextmanager
def provider() -> Iterator[Child]:
    """The provider's process; its first line is its URL."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="bench-")))
        core = cores()[0]
        child = Child("benchmarks.provider", core=core, log=folder / "log", talks=True)
        stack.callback(child.stop)
        yield child


class _Sink(asyncio.Protocol):
    """Reads answers one after the other and looks at nothing but their end."""

    def __init__(self, request: bytes, answers: int) -> None:
        self._request = request
        self._left = answers
        self._tail = b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        seen = self._tail + data[-32:]
        self._tail = seen[-32:]
        if LAST not in seen or not seen.endswith(b"0\r\n\r\n"):
            return
        self._tail = b""
        self._left -= 1
        if self._left:
            self._transport.write(self._request)
        else:
            self.done.set_result(None)
            self._transport.close()


async def _read(url: str, pace: Pace, streams: int, answers: int) -> float:
    host, _, port = url.removeprefix("http://").partition(":")
    body = b'{"model":"%s","stream":true}' % pace.model.encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    loop = asyncio.get_running_loop()
    started = time.monotonic()
    sinks: list[Any] = []
    for _ in range(streams):
        _, sink = await loop.create_connection(lambda: _Sink(head + body, answers), host, int(port))
        sinks.append(sink.done)
    await asyncio.gather(*sinks)
    return time.monotonic() - started


def ceiling(child: Child, url: str) -> dict[str, float]:
    """Tokens a second with no pace, and what 1,000 paced streams cost the provider."""

    async def run() -> dict[str, float]:
        seconds = await _read(url, AT_ONCE, 50, 40)
        before = cpu_s([child.pid])
        paced_s = await _read(url, REALISTIC, 1000, 1)
        used = cpu_s([child.pid]) - before
        tokens = REALISTIC.tokens * 1000
        return {
            "ceiling.tokens_per_s": 50 * 40 * AT_ONCE.tokens / seconds,
            "ceiling.paced_us_per_token": used * 1e6 / tokens,
            "ceiling.paced_late_s": paced_s - 0.1 - 0.02 * (REALISTIC.tokens - 1),
        }

    return uvloop.run(run())
