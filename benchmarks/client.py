"""The driver's HTTP: raw keep-alive connections and SSE readers that cost a few microseconds.

The driver must never be what is measured; an HTTP library would be.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, cast

_END = b"\r\n\r\n"


class Answer(NamedTuple):
    """One response."""

    status: int
    body: bytes


class Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self) -> None:
        self._buffer = b""
        self._waiting: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(exc or ConnectionError("the server hung up"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(_END)
        if end < 0:
            return
        head = self._buffer[:end]
        _, _, length = head.lower().partition(b"content-length:")
        size = int(length.split(b"\r\n", 1)[0] or 0)
        whole = end + len(_END) + size
        if len(self._buffer) < whole or self._waiting is None:
            return
        body, self._buffer = self._buffer[end + len(_END) : whole], self._buffer[whole:]
        self._waiting.set_result(Answer(int(head[9:12]), body))

    async def send(self, request: bytes) -> Answer:
        """One request, rendered; waits for its response."""
        self._waiting = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self._waiting


class Driver:
    """Some connections to one server; whoever asks takes a free one."""

    def __init__(self, url: str) -> None:
        self.host, _, port = url.removeprefix("http://").partition(":")
        self.port = int(port)
        self._free: asyncio.Queue[Connection] = asyncio.Queue()
        self._all: list[Connection] = []

    async def open(self, connections: int) -> None:
        """Connect."""
        loop = asyncio.get_running_loop()
        for _ in range(connections):
            _, connection = await loop.create_connection(Connection, self.host, self.port)
            self._all.append(connection)
            self._free.put_nowait(connection)

    def close(self) -> None:
        """Hang up."""
        for connection in self._all:
            connection.transport.close()

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        """Render a POST."""
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    async def send(self, request: bytes) -> Answer:
        """Send on the next free connection."""
        connection = await self._free.get()
        try:
            return await connection.send(request)
        finally:
            self._free.put_nowait(connection)

    async def send_all(self, requests: Iterable[bytes], expected: int) -> None:
        """Send on all connections, each the next as soon as it has its answer."""
        line = iter(requests)

        async def one(connection: Connection) -> None:
            for request in line:
                answer = await connection.send(request)
                assert answer.status == expected, answer

        await asyncio.gather(*[one(connection) for connection in self._all])

    async def send_for(self, seconds: float, request: bytes, expected: int) -> int:
        """Send one request again and again on all connections; returns how often."""
        until = time.monotonic() + seconds
        count = 0

        def line() -> Iterable[bytes]:
            nonlocal count
            while time.monotonic() < until:
                count += 1
                yield request

        await self.send_all(line(), expected)
        return count

    async def read(self, path: str, on_data: Callable[[bytes, int], bool]) -> None:
        """Read a stream on a connection of its own, until `on_data` (bytes, when) says enough."""
        reader = _Reader(on_data)
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: reader, self.host, self.port)
        reader.transport.write(f"GET {path} HTTP/1.1\r\nHost: {self.host}\r\n\r\n".encode())
        try:
            await reader.ended.wait()
        finally:
            reader.transport.close()


class _Reader(asyncio.Protocol):
    def __init__(self, on_data: Callable[[bytes, int], bool]) -> None:
        self._on_data = on_data
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._on_data(data, time.monotonic_ns()):
            self.ended.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


@asynccontextmanager
async def driver(url: str, connections: int = 64) -> AsyncIterator[Driver]:
    """An open driver; closed at the end of the block."""
    made = Driver(url)
    await made.open(connections)
    try:
        yield made
    finally:
        made.close()
