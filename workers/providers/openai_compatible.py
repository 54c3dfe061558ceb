"""Chat completions, as OpenAI and the many compatible servers really speak it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec

from workers.providers import (
    ChatRequest,
    Delta,
    Finish,
    FinishReason,
    ProviderEvent,
    Reasoning,
    ToolCall,
    Usage,
    wire,
)

DONE = b"[DONE]"

# Any finish reason is an end; those a server made up itself count as "stop".
FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "max_tokens": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
    "safety": "content_filter",
}
FAILED = frozenset({"error", "abort", "aborted"})  # OpenRouter, vLLM: no end but a failure


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Counts(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Piece(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None  # Ollama, Groq
    reasoning_content: str | None = None  # LM Studio, vLLM, DeepSeek
    refusal: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Piece | None = None
    message: _Piece | None = None
    finish_reason: str | None = None


class _XGroq(msgspec.Struct):
    usage: _Counts | None = None


class _Message(msgspec.Struct):
    """A chunk of a stream, or the whole plain answer: they differ in delta and message only."""

    choices: list[_Choice] | None = None
    usage: _Counts | None = None
    model: str | None = None
    x_groq: _XGroq | None = None
    error: Any = None
    object: str | None = None


_CHUNK = msgspec.json.Decoder(_Message)


async def chat(client: Any, request: ChatRequest) -> AsyncIterator[ProviderEvent]:
    """One chat completion. The contract is in `workers.providers`."""
    reading = _Reading()
    done = False
    async with wire.opened(client, _body(request), request) as answer:
        async for payload in answer.payloads:
            if payload.strip() == DONE:
                done = True
                break
            if answer.plain:
                message = answer.document(_Message, payload)
            else:
                message = answer.decode(_CHUNK, payload)
                if message.error or message.object == "error":
                    raise answer.refusal(msgspec.json.decode(payload))
            for event in reading.events(message):
                answer.count(event)
                yield event
            if reading.finish_reason in FAILED:
                raise answer.error("server_error", "ended its answer with an error")
            if reading.finish_reason:
                answer.ended()
        if done and reading.content:  # a marker, though no reason was given
            answer.ended()
        if not answer.whole:
            raise answer.error("truncated", "ended its answer without a finish reason")
    yield Finish(reading.reason(), reading.model)


def _body(request: ChatRequest) -> dict[str, Any]:
    """The body; ``extra_body`` wins over the parameters."""
    body = dict(request.parameters)
    extra = body.pop("extra_body", {})
    body.pop("n", None)
    for name in ("max_tokens", "max_completion_tokens"):
        if name in body:
            body[request.provider.max_tokens_field] = body.pop(name)
    body |= extra
    # last: what the books depend on is not the caller's to change
    for name in ("stream_options", "n"):
        body.pop(name, None)
    messages = [*map(_said, request.messages)]
    body |= {"model": request.model, "messages": messages, "stream": request.stream}
    if request.stream and request.provider.reports_stream_usage:
        body["stream_options"] = {"include_usage": True}
    return body


# of an answer, and not for the next provider: many servers refuse a field they do not know
_THOUGHTS = {"reasoning", "thinking_blocks"}


def _said(message: dict[str, Any]) -> dict[str, Any]:
    if _THOUGHTS.isdisjoint(message):
        return message
    return {name: value for name, value in message.items() if name not in _THOUGHTS}


class _Reading:
    """What was read of one answer so far."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.model: str | None = None
        self.content = False
        self._refused = False
        self._usage: Usage | None = None
        self._calls: list[str] = []

    def reason(self) -> FinishReason:
        """The finish reason in the contract's words."""
        if self._refused:
            return "content_filter"
        return FINISH.get(self.finish_reason or "stop", "stop")

    def events(self, message: _Message) -> list[ProviderEvent]:
        """The events of a chunk, or of a whole plain answer."""
        found: list[ProviderEvent] = []
        self.model = message.model or self.model
        for choice in message.choices or ():
            piece = choice.delta or choice.message
            if piece is not None and choice.index == 0:
                self._pieces(piece, found)
            if choice.finish_reason:
                self.finish_reason = choice.finish_reason.lower()
        if found:
            self.content = True
        counts = message.usage or (message.x_groq and message.x_groq.usage)
        if counts and (usage := _usage(counts)) != self._usage:
            self._usage = usage
            found.append(usage)
        return found

    def _pieces(self, piece: _Piece, found: list[ProviderEvent]) -> None:
        if reasoning := piece.reasoning or piece.reasoning_content:
            found.append(Reasoning(reasoning))
        if piece.content:
            found.append(Delta(piece.content))
        if piece.refusal:
            self._refused = True
            found.append(Delta(piece.refusal))
        for call in piece.tool_calls or ():
            function = call.function or _Function()
            index = self._index(call) if call.index is None else call.index
            found.append(ToolCall(index, call.id, function.name, function.arguments or ""))

    def _index(self, call: _Call) -> int:
        """Some servers leave the index out: a new id is then a new call."""
        if call.id and call.id not in self._calls:
            self._calls.append(call.id)
        return max(0, len(self._calls) - 1)


def _usage(counts: _Counts) -> Usage:
    prompt, completion = counts.prompt_tokens or 0, counts.completion_tokens or 0
    read = counts.prompt_tokens_details or _Details()
    written = counts.completion_tokens_details or _Details()
    return Usage(
        input_tokens=prompt,
        # Gemini and xAI leave reasoning out of completion_tokens, and count it in the total.
        output_tokens=max(completion, (counts.total_tokens or 0) - prompt),
        cached_tokens=read.cached_tokens or 0,
        cache_write_tokens=read.cache_write_tokens or 0,
        reasoning_tokens=written.reasoning_tokens or 0,
    )
