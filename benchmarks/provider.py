"""A provider that costs next to nothing: prebuilt bytes, one timer for all streams, no framework.

It speaks OpenAI's chat completions and Anthropic's messages, streamed and plain. The model's name
says the pace, see `benchmarks.work`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from functools import lru_cache
from typing import NamedTuple, cast

import msgspec
import uvloop

from benchmarks.work import Pace, pace_of, stamp

TICK_S = 0.002  # streams that are due within one tick are written together
MARK = b"@MARK@"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
LAST_CHUNK = b"0\r\n\r\n"
WORD = b"token "


class _Asked(msgspec.Struct):
    model: str
    stream: bool = False


_asked = msgspec.json.Decoder(_Asked).decode


class Frames(NamedTuple):
    """One model's answer, ready to be written."""

    pace: Pace
    start: bytes  # headers, and what comes before the first text
    marked: tuple[bytes, bytes]  # a token, before and behind its mark
    token: bytes
    end: bytes
    plain: tuple[bytes, bytes]  # the body of a plain answer, before and behind its mark


def _event(data: object, name: str = "") -> bytes:
    line = f"event: {name}\n" if name else ""
    return f"{line}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


@lru_cache
def frames(dialect: str, model: str) -> Frames:
    """Render one model's answer."""
    pace = pace_of(model)
    render = {"openai": _openai, "anthropic": _anthropic}[dialect]
    start, text, end, plain = render(model, pace.tokens)
    before, behind = text.split(MARK)
    head, tail = plain.split(MARK)
    tail = WORD * (pace.tokens - 1) + tail
    token = before + WORD + behind
    return Frames(
        pace, HEAD + _chunk(start), (before, behind), _chunk(token), _chunk(end), (head, tail)
    )


def _openai(model: str, tokens: int) -> tuple[bytes, bytes, bytes, bytes]:
    usage = {"prompt_tokens": 12, "completion_tokens": tokens, "total_tokens": 12 + tokens}
    whole = {
        "id": "chatcmpl-BENCHMARK0123456789",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": model,
        "service_tier": "default",
        "system_fingerprint": "fp_benchmark",
    }

    def chunk(delta: dict[str, str], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _event({**whole, "choices": [choice], "usage": None})

    said = {"role": "assistant", "content": MARK.decode(), "refusal": None}
    choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": "stop"}
    plain = {**whole, "object": "chat.completion", "choices": [choice], "usage": usage}
    last = {**whole, "choices": [], "usage": usage}
    return (
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": MARK.decode()}),
        chunk({}, "stop") + _event(last) + b"data: [DONE]\n\n",
        json.dumps(plain).encode(),
    )


def _anthropic(model: str, tokens: int) -> tuple[bytes, bytes, bytes, bytes]:
    empty: dict[str, object] = {
        "id": "msg_BENCHMARK0123456789",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 12, "output_tokens": 1},
    }

    def event(name: str, **fields: object) -> bytes:
        return _event({"type": name, **fields}, name)

    said = {"type": "text", "text": MARK.decode()}
    stopped = {"stop_reason": "end_turn", "stop_sequence": None}
    usage = {"input_tokens": 12, "output_tokens": tokens}
    return (
        event("message_start", message=empty)
        + event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        + event("ping"),
        event("content_block_delta", index=0, delta={"type": "text_delta", "text": MARK.decode()}),
        event("content_block_stop", index=0)
        + event("message_delta", delta=stopped, usage={"output_tokens": tokens})
        + event("message_stop"),
        json.dumps({**empty, **stopped, "content": [said], "usage": usage}).encode(),
    )


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class _Stream:
    """One answer under way."""

    __slots__ = ("asked_ns", "connection", "due_ns", "frames", "left", "plain")

    def __init__(
        self, connection: _Connection, frames_: Frames, asked_ns: int, plain: bool
    ) -> None:
        self.connection = connection
        self.frames = frames_
        self.asked_ns = asked_ns
        self.plain = plain
        self.left = frames_.pace.tokens
        pace = frames_.pace
        wait_ms = pace.first_ms + (pace.tokens - 1) * pace.each_ms * plain
        self.due_ns = asked_ns + wait_ms * 1_000_000

    def write(self, now_ns: int) -> bool:
        """Write the token that is due; returns whether there are more."""
        whole = self.frames
        transport = self.connection.transport
        if self.plain:
            mark = stamp(now_ns, now_ns - self.asked_ns)
            body = whole.plain[0] + mark + whole.plain[1]
            transport.write(PLAIN % (len(body), body))
            return False
        first = self.left == whole.pace.tokens
        token = whole.token
        if first or whole.pace.stamped:
            mark = stamp(now_ns, now_ns - self.asked_ns)
            token = _chunk(whole.marked[0] + mark + whole.marked[1])
        if not whole.pace.each_ms:
            token += whole.token * (self.left - 1)
            self.left = 1
        if first:
            token = whole.start + token
        self.left -= 1
        if self.left:
            transport.write(token)
            # from the schedule, not from now: a late token must not delay the rest
            self.due_ns += whole.pace.each_ms * 1_000_000
            return True
        transport.write(token + whole.end + LAST_CHUNK)
        return False


class Wheel:
    """One timer for all streams: a slot per tick, and who is due in it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._slots: defaultdict[int, list[_Stream]] = defaultdict(list)
        self._tick_ns = int(TICK_S * 1e9)
        self._done = 0
        self._running = False

    def add(self, stream: _Stream) -> None:
        """Write it when it is due."""
        if not self._running:
            self._running = True
            self._done = time.monotonic_ns() // self._tick_ns - 1
            self._loop.call_later(TICK_S, self._turn)
        slot = max(-(-stream.due_ns // self._tick_ns), self._done + 1)
        self._slots[slot].append(stream)

    def _turn(self) -> None:
        now = time.monotonic_ns()
        last = now // self._tick_ns
        for slot in range(self._done + 1, last + 1):
            self._done = slot
            for stream in self._slots.pop(slot, ()):
                if not stream.connection.closed and stream.write(time.monotonic_ns()):
                    self.add(stream)
        self._running = bool(self._slots)
        if self._running:
            self._loop.call_later(TICK_S, self._turn)


class _Connection(asyncio.Protocol):
    def __init__(self, wheel: Wheel) -> None:
        self._wheel = wheel
        self._buffer = b""
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            _, _, length = head.partition(b"content-length:")
            size = int(length.split(b"\r\n", 1)[0] or 0)
            whole = end + 4 + size
            if len(self._buffer) < whole:
                return
            body, self._buffer = self._buffer[end + 4 : whole], self._buffer[whole:]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        now = time.monotonic_ns()
        asked = _asked(body)
        dialect = "anthropic" if b"/messages" in head.split(b"\r\n", 1)[0] else "openai"
        stream = _Stream(self, frames(dialect, asked.model), now, not asked.stream)
        if stream.due_ns > now or stream.write(now):
            self._wheel.add(stream)


async def main() -> None:
    """Serve until killed; the first line on stdout says where."""
    loop = asyncio.get_running_loop()
    wheel = Wheel(loop)
    server = await loop.create_server(lambda: _Connection(wheel), "127.0.0.1", 0, backlog=4096)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
