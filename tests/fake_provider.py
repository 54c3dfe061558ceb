"""The one fake of the test suite: a provider on loopback, three dialects, every failure on demand.

    POST /v1/chat/completions         OpenAI
    POST /ollama/v1/chat/completions  Ollama: its field for reasoning, its silence on errors
    POST /v1/messages                 Anthropic
    GET  /v1/models

The model's name is the script, so that it works through the whole system: ``kind``, then numbers
and options joined by dashes, as in ``ok-t128-d20-f100`` or ``status-429-ra2``.

    tN  N tokens (16)      dN  N ms between tokens     raN  Retry-After: N
    cN  N cached tokens    fN  N ms before the first

    ok                   the tokens "w0 ", "w1 ", …
    slow                 ok-t32-d50-f200
    utf8, bom, crlf      ok with: umlauts and emoji; a byte order mark; CRLF line ends
    drip                 utf8, seven bytes at a time
    comments             ok with comments and pings between the tokens
    length               ok, ended by the cap on tokens
    reasoning            three pieces of reasoning first
    signed               the same, signed where the dialect signs, and then a tool call
    tools                a call of the first tool offered, its arguments in two pieces
    filter, refusal      the content filter ends it; the model declines
    nousage              ok, but says nothing of usage
    nodone               a finish reason, then the connection stays open
    cutend, nostop       a finish reason, then the connection breaks; the body ends
    late                 ok, but the body ends 30 ms after the end marker
    done, silent         the end marker without finish reason: after the tokens; after nothing
    echo                 the request as it came: {"path", "headers", "body"}, as the answer's text
    json200              plain JSON whatever was asked       sse200    a stream whatever was asked
    status-S             HTTP S                              auth, billing, context, policy
    flaky-N-S            HTTP S for the first N calls of one prompt, then ok
    until-T-S            HTTP S until that second of Unix time, then ok
    redirect             307 to /elsewhere                   drop      closes without an answer
    mute                 never answers                       html      a page with status 200
    empty                status 200 and nothing              errjson200  an error with status 200
    cut-N                closes the connection after N tokens
    chop-N               ends cleanly after N bytes
    noend-N, half-N      ends cleanly after N tokens; in the middle of the next message
    inerr-N-S            an error like HTTP S in the stream after N tokens (529)
    stall-N              N tokens, then keep-alives only
    badjson, notsse      a message that is not JSON; a line that is not SSE
    bigline, bigtext     a line, an answer that does not end
    bigerror             HTTP 500 with a body that does not end

Usage: input tokens are the bytes of all texts / 4, rounded up (plus cached ones); output tokens are
the tokens sent. The ledger has a line at a call's start and one at its end, so that what was really
called can be counted after any crash.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.dialects import DIALECTS, Dialect

GROUP = 64  # unpaced tokens in one write
OPTION = re.compile(r"([a-z]+)(\d+)")
ALIASES = {"slow": "ok-t32-d50-f200", "auth": "status-401", "billing": "status-402"}
WORDS = {
    "context": (400, "context_length_exceeded", "prompt is too long: 9 tokens > 8 maximum"),
    "policy": (400, "content_policy_violation", "Output blocked by content filtering policy"),
}
BROKEN = frozenset({"cut", "noend", "half", "inerr", "stall", "badjson", "notsse"})
ENDLESS = 64 << 20  # bytes after which even an endless answer ends


@dataclass
class Script:
    """A model's name, taken apart."""

    kind: str
    numbers: list[int]
    options: dict[str, int]

    @classmethod
    def parse(cls, model: str) -> Script:
        kind, *rest = ALIASES.get(model, model).split("-")
        options = {m[1]: int(m[2]) for part in rest if (m := OPTION.fullmatch(part))}
        return cls(kind, [int(part) for part in rest if part.isdigit()], options)

    def number(self, position: int, default: int) -> int:
        return self.numbers[position] if position < len(self.numbers) else default

    @property
    def tokens(self) -> list[str]:
        word = "ü{} 🙂 " if self.kind in ("utf8", "drip") else "w{} "
        return [word.format(i) for i in range(self.options.get("t", 16))]


@dataclass
class Call:
    """One request and how far its answer came."""

    id: int
    body: dict[str, Any]
    dialect: Dialect
    script: Script
    prompt: str
    sent: int = 0
    outcome: str = "client left"
    text: str | None = None  # the answer, where it is not the script's tokens

    def pieces(self) -> list[str]:
        """The answer's tokens, as far as they are sent."""
        if self.text is not None:
            return [self.text]
        if self.script.kind in ("silent", "tools", "signed", "filter"):
            return []
        tokens = self.script.tokens
        return tokens[: self.script.number(0, 5)] if self.script.kind in BROKEN else tokens

    def usage(self) -> tuple[int, int, int]:
        """Input without cached, cached, output."""
        return -(-len(self.prompt.encode()) // 4), self.script.options.get("c", 0), self.sent


class FakeProvider:
    """The server. ``async with FakeProvider() as fake`` serves on ``fake.url`` in this loop."""

    def __init__(self, ledger: Path | None = None, port: int = 0) -> None:
        self.entries: list[dict[str, Any]] = []  # what the ledger would hold, where there is none
        self._ledger = ledger
        self._port = port
        self._fd: int | None = None
        self._calls = 0
        self._seen: Counter[str] = Counter()
        self._peers: set[Any] = set()

    async def __aenter__(self) -> FakeProvider:
        if self._ledger:
            self._fd = os.open(self._ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        app = web.Application(client_max_size=64 << 20)
        for prefix, dialect in DIALECTS.items():
            app.router.add_post(prefix, self._handler(dialect))
        app.router.add_get("/v1/models", self._models)
        app.router.add_route("*", "/elsewhere{tail:.*}", self._elsewhere)
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, backlog=4096)
        await site.start()
        self.port: int = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._runner.cleanup()
        if self._fd is not None:
            os.close(self._fd)

    @property
    def connections(self) -> int:
        """How many connections there have been calls on."""
        return len(self._peers)

    def _record(self, **entry: Any) -> None:
        if self._fd is None:
            self.entries.append(entry)
        else:
            os.write(self._fd, json.dumps(entry).encode() + b"\n")

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "ok", "object": "model"}]})

    async def _elsewhere(self, request: web.Request) -> web.Response:
        self._record(at="elsewhere", path=request.path)
        return web.json_response({})

    def _handler(self, dialect: Dialect) -> Any:
        async def handle(request: web.Request) -> web.StreamResponse:
            body = await request.json()
            assert request.transport
            self._peers.add(request.transport.get_extra_info("peername"))
            self._calls += 1
            prompt = "".join(_texts(body))
            last = "".join(_texts({"messages": body["messages"][-1:]}))
            call = Call(self._calls, body, dialect, Script.parse(body["model"]), prompt)
            digest = hashlib.sha256(last.encode()).hexdigest()[:16]
            self._record(
                at="start",
                call=call.id,
                pid=os.getpid(),
                time=time.time(),
                prompt=digest,
                model=body["model"],
                key=key_of(request.headers.get("Authorization", "")),
            )
            try:
                return await self._answer(request, call, f"{body['model']} {digest}")
            except ConnectionError:
                return web.Response()  # to nobody: the client left
            finally:
                self._record(
                    at="end",
                    call=call.id,
                    time=time.time(),
                    prompt=digest,
                    tokens=call.sent,
                    outcome=call.outcome,
                )

        return handle

    async def _answer(self, request: web.Request, call: Call, seen: str) -> web.StreamResponse:
        script, dialect = call.script, call.dialect
        status = script.number(0, 500) if script.kind == "status" else 0
        if script.kind == "flaky":
            self._seen[seen] += 1
            if self._seen[seen] <= script.number(0, 1):
                status = script.number(1, 500)
        if script.kind == "until" and time.time() < script.number(0, 0):
            status = script.number(1, 500)
        if status or script.kind in WORDS:
            code, message = None, "as asked"
            if script.kind in WORDS:
                status, code, message = WORDS[script.kind]
            call.outcome = f"status {status}"
            headers = {"Retry-After": str(script.options["ra"])} if "ra" in script.options else {}
            error = dialect.error(status, message, code)
            return web.json_response(error, status=status, headers=headers)
        match script.kind:
            case "redirect":
                call.outcome = "status 307"
                return web.Response(status=307, headers={"Location": "/elsewhere" + request.path})
            case "bigerror":
                call.outcome = "status 500"
                response = web.StreamResponse(status=500)
                await response.prepare(request)
                await _endless(response, b"", b"x" * 65536)
                return response
            case "drop":
                call.outcome = "dropped"
                assert request.transport
                request.transport.close()
                return web.Response()
            case "mute":
                await asyncio.sleep(3600)
            case "html":
                call.outcome = "html"
                return web.Response(text="<!DOCTYPE html><p>Welcome</p>", content_type="text/html")
            case "empty":
                call.outcome = "empty"
                return web.Response(content_type="text/event-stream")
            case "errjson200":
                call.outcome = "error"
                return web.json_response(dialect.error(529, "as asked", None))
            case "echo":
                call.text = json.dumps(
                    {"path": request.path, "headers": dict(request.headers), "body": call.body}
                )
        streams = call.body.get("stream") or script.kind == "sse200"
        if script.kind == "json200" or not streams:
            return await self._plain(request, call)
        return await self._stream(request, call)

    async def _plain(self, request: web.Request, call: Call) -> web.StreamResponse:
        script, dialect = call.script, call.dialect
        pieces = call.pieces()
        wait_ms = script.options.get("f", 0) + script.options.get("d", 0) * len(pieces)
        if wait_ms:
            await asyncio.sleep(wait_ms / 1000)
        call.sent = len(pieces)
        document = json.dumps(dialect.document(call, "".join(pieces))).encode()
        match script.kind:
            case "inerr":
                document = json.dumps(
                    dialect.error(script.number(1, 529), "as asked", None)
                ).encode()
            case "badjson":
                document = b'{"choices": nonsense}'
            case "notsse":
                document = b"Internal Server Error"
            case "bom":
                document = b"\xef\xbb\xbf" + document
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if script.kind in ("bigline", "bigtext"):
            await _endless(response, b'{"choices":[{"message":{"content":"', b"x" * 65536)
        if script.kind == "stall":
            await asyncio.sleep(3600)
        if script.kind in ("half", "cut", "chop"):
            document = document[: script.number(0, 0) if script.kind == "chop" else 40]
        await response.write(document)
        return await self._close(request, response, call)

    async def _close(
        self, request: web.Request, response: web.StreamResponse, call: Call
    ) -> web.StreamResponse:
        call.outcome = call.script.kind if call.script.kind in ("cut", "noend", "half") else "ok"
        if call.script.kind in ("cut", "cutend"):
            assert request.transport
            request.transport.close()
        return response

    async def _stream(self, request: web.Request, call: Call) -> web.StreamResponse:
        script, dialect = call.script, call.dialect
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        writer = _Writer(response, script)
        if script.kind == "bom":
            await response.write(b"\xef\xbb\xbf")
        await writer.write(dialect.start(call))
        if script.kind == "bigline":
            await _endless(response, b'data: {"x": "', b"x" * 65536)
        if script.kind == "bigtext":
            await _endless(response, b"", dialect.text("x" * 16384))
        if script.kind in ("reasoning", "signed"):
            await writer.write(b"".join(dialect.reasoning("think ") for _ in range(3)))
        if script.kind == "signed":
            await writer.write(dialect.signature())
        if script.kind in ("tools", "signed"):
            await writer.write(dialect.tool_call(call))
        async for group in _paced(call.pieces(), script):
            if script.kind == "comments":
                await writer.write(b": keep-alive\n\n" + dialect.ping())
            await writer.write(b"".join(map(dialect.text, group)))
            call.sent += len(group)
        match script.kind:
            case "half":
                await writer.write(dialect.text("half")[:-20])
            case "inerr":
                await writer.write(dialect.stream_error(script.number(1, 529)))
            case "badjson":
                await writer.write(b'data: {"choices": nonsense}\n\n')
            case "notsse":
                await writer.write(b"Internal Server Error\n")
            case "stall":
                while True:
                    await asyncio.sleep(0.05)
                    await writer.write(b": keep-alive\n\n" + dialect.ping())
        if script.kind not in BROKEN:
            await writer.write(dialect.end(call))
        if script.kind == "nodone":
            await asyncio.sleep(3600)
        if script.kind == "late":
            await asyncio.sleep(0.03)
        return await self._close(request, response, call)


def key_of(authorization: str) -> str:
    """A key as the ledger has it, which must hold none."""
    secret = authorization.removeprefix("Bearer ")
    return hashlib.sha256(secret.encode()).hexdigest()[:16]


class _Writer:
    """Writes frames the way a kind asks for."""

    def __init__(self, response: web.StreamResponse, script: Script) -> None:
        self._response = response
        self._kind = script.kind
        self._left = script.number(0, 0) if script.kind == "chop" else ENDLESS

    async def write(self, frame: bytes) -> None:
        frame = frame[: self._left]
        self._left -= len(frame)
        if self._kind == "crlf":
            frame = frame.replace(b"\n", b"\r\n")
        step = 7 if self._kind == "drip" else max(1, len(frame))
        for start in range(0, len(frame), step):
            await self._response.write(frame[start : start + step])
            if self._kind == "drip":
                await asyncio.sleep(0)


async def _paced(pieces: list[str], script: Script) -> AsyncIterator[list[str]]:
    """The pieces at their time, one by one; all at once, in groups, where no time is asked for."""
    first, between = script.options.get("f", 0) / 1000, script.options.get("d", 0) / 1000
    if first:
        await asyncio.sleep(first)
    if not between:
        for start in range(0, len(pieces), GROUP):
            yield pieces[start : start + GROUP]
        return
    due = time.monotonic()
    for piece in pieces:
        yield [piece]
        due += between  # from the schedule, not from now: a late token must not delay the rest
        await asyncio.sleep(max(0.0, due - time.monotonic()))


async def _endless(response: web.StreamResponse, head: bytes, again: bytes) -> None:
    await response.write(head)
    for _ in range(ENDLESS // len(again)):
        await response.write(again)


def _texts(body: dict[str, Any]) -> Iterator[str]:
    for message in body["messages"]:
        content = message.get("content")
        for part in [{"text": content}] if isinstance(content, str) else content or ():
            yield part.get("text") or ""


async def main() -> None:
    """Serve until killed; the first line on stdout says where."""
    parser = argparse.ArgumentParser(prog="python -m tests.fake_provider", description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ledger", type=Path)
    arguments = parser.parse_args()
    async with FakeProvider(arguments.ledger, arguments.port) as fake:
        print(json.dumps({"port": fake.port, "url": fake.url}), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
