"""The floor: a bare asyncio script on the SDK's aiohttp transport; decodes, keeps the text.

No queue, no database, no Redis, no check that an answer was whole: physics, more or less.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import msgspec
import uvloop
from anthropic import AsyncAnthropic
from anthropic import DefaultAioHttpClient as AnthropicHttp
from openai import AsyncOpenAI, DefaultAioHttpClient

from benchmarks.contenders.script import serve
from benchmarks.work import PATIENCE_S

MESSAGES: Any = [{"role": "user", "content": "Hello?"}]


class _Piece(msgspec.Struct):
    content: str | None = None  # OpenAI
    text: str | None = None  # Anthropic


class _Choice(msgspec.Struct):
    delta: _Piece


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    delta: _Piece | None = None


_decode = msgspec.json.Decoder(_Chunk).decode


async def main(url: str) -> None:
    """Serve with one client of each SDK."""
    # to connect as well: a flood may take its time
    patient: Any = {"max_retries": 0, "timeout": PATIENCE_S}
    openai = AsyncOpenAI(
        api_key="k", base_url=f"{url}/v1", http_client=DefaultAioHttpClient(), **patient
    )
    anthropic = AsyncAnthropic(api_key="k", base_url=url, http_client=AnthropicHttp(), **patient)

    async def ask(dialect: str, model: str, first: Callable[[str], None]) -> str:
        call: Any
        if dialect == "openai":
            call = openai.chat.completions.with_streaming_response.create(
                model=model, messages=MESSAGES, stream=True
            )
        else:
            call = anthropic.messages.with_streaming_response.create(
                model=model, messages=MESSAGES, max_tokens=1000, stream=True
            )
        texts: list[str] = []
        rest = b""
        async with call as response:
            async for chunk in response.http_response.aiter_bytes():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if not line.startswith(b"data: {"):
                        continue
                    message = _decode(line[6:])
                    pieces = [choice.delta for choice in message.choices]
                    for piece in pieces or filter(None, [message.delta]):
                        if text := piece.content or piece.text:
                            if not texts:
                                first(text)
                            texts.append(text)
        return "".join(texts)

    await serve(ask)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
