"""The offline provider: answers with the last user message, for trials, tests and dry runs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from backchannel.errors import ProviderError
from workers.providers import ChatRequest, Delta, Finish, ProviderEvent, Usage

BYTES_PER_TOKEN = 4  # the usual rule of thumb; rounded up, so no text is free
WORDS_PER_DELTA = 16  # a long prompt comes back in hundreds of events, not in tens of thousands

_PIECE = re.compile(rf"(?:\S+\s*|\s+){{1,{WORDS_PER_DELTA}}}")


async def chat(client: Any, request: ChatRequest) -> AsyncIterator[ProviderEvent]:
    """The last user message, word by word; with a JSON ``response_format``, as ``{"echo": text}``.

    Tokens are counted as bytes of UTF-8 / 4, rounded up: of all texts in, of the text out.
    """
    parameters = request.parameters
    texts = [(message.get("role"), _text(message.get("content"))) for message in request.messages]
    answer = next((text for role, text in reversed(texts) if role == "user"), "")
    if (parameters.get("response_format") or {}).get("type", "text") != "text":
        answer = msgspec.json.encode({"echo": answer}).decode()
    cap = parameters.get("max_completion_tokens", parameters.get("max_tokens"))
    whole = answer
    if cap is not None:
        answer = answer.encode()[: cap * BYTES_PER_TOKEN].decode(errors="ignore")
    if len(answer.encode()) > request.answer_cap:
        raise ProviderError(
            f"Provider '{request.provider.id}' answered more than {request.answer_cap} bytes.",
            code="answer_too_large",
        )
    for piece in _PIECE.findall(answer):
        yield Delta(piece)
        await asyncio.sleep(0)  # a long answer lets the other streams of the loop go on
    yield Usage(sum(tokens(text) for _, text in texts), tokens(answer))
    yield Finish("stop" if answer == whole else "length", request.model)


def tokens(text: str) -> int:
    """The estimate of tokens that the books get for this provider."""
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    return "".join(part.get("text") or "" for part in parts if part.get("type") == "text")
