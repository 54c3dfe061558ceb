"""How a response's body is read: straight from the connection's stream, or decoded on the way."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from workers.clients import _anthropic, _http, _openai
from workers.endpoint import CHUNK, Endpoint, Read, reader

BODY = b'data: {"choices":[]}\n\n' * 40
KINDS = ("openai-compatible", "anthropic")


async def _answer(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    headers = {"Content-Type": "text/event-stream"}
    body = BODY * asked.get("times", 1)
    body = gzip.compress(body) if asked["packed"] else body
    if asked["packed"]:
        headers["Content-Encoding"] = "gzip"
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    await response.write(body[:20])
    if asked["cut"]:
        assert request.transport is not None
        request.transport.abort()
        return response
    await response.write(body[20:])
    return response


async def _pieces(read: Read) -> AsyncIterator[bytes]:
    while piece := await read():
        yield piece


async def _whole(read: Read) -> bytes:
    return b"".join([piece async for piece in _pieces(read)])


@pytest.fixture
async def base_url() -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/chat", _answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture(params=KINDS)
async def endpoint(request: pytest.FixtureRequest, base_url: str) -> AsyncIterator[Endpoint]:
    http = _http(request.param)
    make: Any = _openai if request.param == "openai-compatible" else _anthropic
    endpoint = Endpoint(make(base_url, "k", http), http, "/chat", "/models")
    yield endpoint
    await endpoint.close()


async def test_a_plain_body_is_read_past_the_layers_of_the_sdks_transport(
    endpoint: Endpoint,
) -> None:
    async with aclosing(await endpoint.post({"packed": False, "cut": False})) as response:
        read = reader(response)
        # the SDK keeps this stream to itself; where it moves it to, this must follow
        assert isinstance(read, partial)
        assert isinstance(read.func.__self__, aiohttp.StreamReader)  # type: ignore[attr-defined]
        assert await _whole(read) == BODY


async def test_a_body_is_read_in_small_pieces_however_much_of_it_is_there(
    endpoint: Endpoint,
) -> None:
    long = {"packed": False, "cut": False, "times": 1000}
    async with aclosing(await endpoint.post(long)) as response:
        read = reader(response)
        await asyncio.sleep(0.2)  # all that fits has come
        pieces = [len(piece) async for piece in _pieces(read)]
    assert sum(pieces) == len(BODY) * 1000
    assert max(pieces) <= CHUNK


async def test_a_packed_body_is_unpacked(endpoint: Endpoint) -> None:
    async with aclosing(await endpoint.post({"packed": True, "cut": False})) as response:
        assert await _whole(reader(response)) == BODY


@pytest.mark.parametrize("packed", [False, True])
async def test_a_cut_body_is_no_end(endpoint: Endpoint, packed: bool) -> None:
    async with aclosing(await endpoint.post({"packed": packed, "cut": True})) as response:
        with pytest.raises(Exception, match=r"(?i)payload|connection|reset") as raised:
            await _whole(reader(response))
    chain = [raised.value, raised.value.__cause__]
    assert any(isinstance(each, aiohttp.ClientError) for each in chain)
