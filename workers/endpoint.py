"""Where an adapter's calls go: the SDK's URL, headers and connections, put together once.

The SDKs build each request anew, through typed parameters, options and retries: 0.6 ms of a short
job's 1.9 on the event loop. Nothing of it differs from one chat to the next but the body.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp
import httpx2
import msgspec

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic
    from openai import AsyncOpenAI

    Client = AsyncOpenAI | AsyncAnthropic

_encode = msgspec.json.Encoder().encode


class Endpoint:
    """One client of one SDK, and the chat address it would call.

    Args:
        client: For its address and its headers (keys, versions, who calls).
        http: The HTTP client that it was made with; it closes with it.
        chats: Their path, below the client's base URL.
        models: The path of the list of models.
    """

    def __init__(self, client: Client, http: httpx2.AsyncClient, chats: str, models: str) -> None:
        self._client = client
        self._http = http
        said = {**client.default_headers, **client.auth_headers}
        headers = {name: value for name, value in said.items() if isinstance(value, str)}
        root = str(client.base_url).rstrip("/")
        self._like = http.build_request("POST", root + chats, headers=headers)
        del self._like.headers["content-length"]
        self._models = root + models

    async def post(self, body: dict[str, Any]) -> httpx2.Response:
        """Ask; returns once the answer's headers are there. Whoever asked closes the response."""
        request = httpx2.Request(
            "POST",
            self._like.url,
            headers=self._like.headers,
            content=_encode(body),
            extensions=self._like.extensions,
        )
        return await self._http.send(request, stream=True)

    async def list_models(self) -> httpx2.Response:
        """Ask for the list of models; the response is read and closed as that of `post`."""
        like = self._like
        request = httpx2.Request(
            "GET", self._models, headers=like.headers, extensions=like.extensions
        )
        return await self._http.send(request, stream=True)

    async def close(self) -> None:
        """Close the client and its connections."""
        await self._client.close()

    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._client.is_closed()


# Bytes read at once, at most; as the SDKs' transport. All that is there may be half a megabyte of
# each stream, which a flood would have twice.
CHUNK = 16 * 1024

# The next bytes of a body, none at its end.
Read = Callable[[], Awaitable[bytes]]


def reader(response: httpx2.Response) -> Read:
    """What reads a response's body as it comes.

    The SDKs' transport puts three layers of generators around aiohttp's own stream; what comes as
    it is, is read from that stream itself. It raises aiohttp's exceptions.
    """
    answer = getattr(getattr(response.stream, "_stream", None), "_aiohttp_response", None)
    if isinstance(answer, aiohttp.ClientResponse) and "content-encoding" not in response.headers:
        return partial(answer.content.read, CHUNK)
    chunks = response.aiter_bytes()
    return lambda: anext(chunks, b"")
