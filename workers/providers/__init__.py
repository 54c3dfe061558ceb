"""The adapter contract: a request in, events out, success only after the provider's own end.

An adapter is an async generator function. It makes exactly one provider call, retries nothing, and
yields events in the order they arrived. It yields `Finish` last, and only when the provider's own
terminal marker was seen (a ``finish_reason`` or ``[DONE]``; ``message_stop``). Everything else ends
in a `ProviderError` with one of the codes of `backchannel.errors.PROVIDER_ERRORS`. Usage may come
at any time and more than once: the last one counts, and it is yielded also before an error when the
provider reported it, so that what was spent stays on the books. Closing the generator closes the
connection.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import msgspec

from backchannel.registry import Provider

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One provider call.

    Attributes:
        model: The provider's own name for the model.
        messages: Chat-completions messages (role, content as string or parts, tool_calls, …).
        parameters: Chat-completions parameters, already checked by `backchannel.parameters`.
        stream: False asks for one plain JSON answer: for jobs whose stream nobody can watch.
        line_cap: Bytes one line of the provider's stream may have.
        answer_cap: Bytes the answer may have in all.
    """

    provider: Provider
    model: str
    messages: list[dict[str, Any]]
    parameters: dict[str, Any]
    stream: bool
    line_cap: int
    answer_cap: int


class Delta(msgspec.Struct, frozen=True, gc=False):
    """A piece of the answer's text."""

    text: str


class Reasoning(msgspec.Struct, frozen=True, gc=False):
    """A piece of the model's visible reasoning."""

    text: str


class Signature(msgspec.Struct, frozen=True, gc=False):
    """The end of a block of reasoning: what its provider wants to see when it gets it back."""

    text: str


class ToolCall(msgspec.Struct, frozen=True, gc=False):
    """A piece of a tool call, as in chat completions: id and name first, arguments in pieces."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one call, normalised by the adapter: for every provider ``input_tokens`` INCLUDES
    cached and cache-write tokens, and ``output_tokens`` includes reasoning tokens."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0


class Finish(msgspec.Struct, frozen=True, gc=False):
    """The provider's own end, seen."""

    reason: FinishReason
    model: str | None = None  # what the provider says it ran


ProviderEvent = Delta | Reasoning | Signature | ToolCall | Usage | Finish

# client: the SDK client from `workers.clients` (None for echo).
Adapter = Callable[[Any, ChatRequest], AsyncIterator[ProviderEvent]]


def adapter_for(provider: Provider) -> Adapter:
    """The adapter of a provider's type. Imported on first use: an SDK costs 1-2 s and 60-90 MB."""
    match provider.type:
        case "openai-compatible":
            from workers.providers import openai_compatible

            return openai_compatible.chat
        case "anthropic":
            from workers.providers import anthropic

            return anthropic.chat
        case "echo":
            from workers.providers import echo

            return echo.chat
        case other:
            assert_never(other)
