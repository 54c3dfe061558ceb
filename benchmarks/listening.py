"""First-token delays as a live reader on Redis sees them, read raw to cost next to nothing.

A channel is left as soon as its first token was seen: the rest of the answer has no reader.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import hiredis

from benchmarks.work import unstamp


class FirstTokens(asyncio.Protocol):
    """Fills `delays_ms`."""

    def __init__(self) -> None:
        self.delays_ms: list[float] = []
        self._reader = hiredis.Reader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def subscribe(self, channel: str) -> None:
        """Wait for the first token on a channel."""
        self._transport.write(f"SUBSCRIBE {channel}\r\n".encode())

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self._reader.feed(data)
        while (message := self._reader.gets()) is not False:
            kind, channel, said = message
            if kind == b"message" and (mark := unstamp(said)):
                self.delays_ms.append((now - mark[0]) / 1e6)
                self._transport.write(b"UNSUBSCRIBE %s\r\n" % channel)

    def close(self) -> None:
        """Hang up."""
        self._transport.close()


@asynccontextmanager
async def first_tokens(socket: Path) -> AsyncIterator[FirstTokens]:
    """A connection of its own for one round."""
    loop = asyncio.get_running_loop()
    _, listening = await loop.create_unix_connection(FirstTokens, str(socket))
    try:
        yield listening
    finally:
        listening.close()
