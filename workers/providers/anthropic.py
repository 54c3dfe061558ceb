"""Anthropic's Messages API: its answers read as chat events. `anthropic_body` asks for them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec

from workers.providers import (
    ChatRequest,
    Delta,
    Finish,
    FinishReason,
    ProviderEvent,
    Reasoning,
    Signature,
    ToolCall,
    Usage,
    wire,
)
from workers.providers.anthropic_body import messages_body

FINISH: dict[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


class _Details(msgspec.Struct):
    thinking_tokens: int | None = None


class _Counts(msgspec.Struct):
    input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    output_tokens: int | None = None
    output_tokens_details: _Details | None = None


class _Block(msgspec.Struct):
    type: str
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: Any = None


class _Message(msgspec.Struct):
    content: list[_Block]
    model: str | None = None
    stop_reason: str | None = None
    usage: _Counts | None = None


class _Start(msgspec.Struct):
    model: str | None = None
    usage: _Counts | None = None


class _Piece(msgspec.Struct):
    """A content block's delta, or the message's own at the end."""

    type: str | None = None
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    partial_json: str | None = None
    stop_reason: str | None = None


class _Event(msgspec.Struct):
    type: str
    index: int = 0
    message: _Start | None = None
    content_block: _Block | None = None
    delta: _Piece | None = None
    usage: _Counts | None = None
    error: Any = None


_EVENT = msgspec.json.Decoder(_Event)


async def chat(client: Any, request: ChatRequest) -> AsyncIterator[ProviderEvent]:
    """One message. The contract is in `workers.providers`."""
    reading = _Reading()
    async with wire.opened(client, messages_body(request), request) as answer:
        async for payload in answer.payloads:
            if answer.plain:
                events = reading.document(answer.document(_Message, payload))
            else:
                message = answer.decode(_EVENT, payload)
                if message.type == "error" or message.error:
                    raise answer.refusal(message.error or {"message": ""})
                events = reading.events(message)
            for event in events:
                answer.count(event)
                yield event
            if reading.stopped:
                answer.ended()
                break
        if not answer.whole:
            raise answer.error("truncated", "ended its answer without message_stop")
    yield Finish(FINISH.get(reading.stop_reason or "end_turn", "stop"), reading.model)


class _Reading:
    """What was read of one message so far."""

    def __init__(self) -> None:
        self.model: str | None = None
        self.stop_reason: str | None = None
        self.stopped = False
        self._counts = _Counts()
        self._calls: dict[int, int] = {}  # content block index → tool call index
        self._without_arguments: set[int] = set()

    def events(self, event: _Event) -> Iterator[ProviderEvent]:
        """The events of one server-sent event; pings and unknown types have none."""
        match event:
            case _Event(type="content_block_delta", delta=_Piece() as piece):
                yield from self._delta(event.index, piece)
            case _Event(type="content_block_start", content_block=_Block() as block):
                yield from self._block(event.index, block)
            case _Event(type="content_block_stop"):
                if event.index in self._without_arguments:
                    # chat completions have "{}" for a call without arguments, Anthropic has nothing
                    yield ToolCall(self._calls[event.index], arguments="{}")
            case _Event(type="message_start", message=_Start() as start):
                self.model = start.model
                yield from self._usage(start.usage)
            case _Event(type="message_delta"):
                if event.delta is not None:
                    self.stop_reason = event.delta.stop_reason or self.stop_reason
                yield from self._usage(event.usage)
            case _Event(type="message_stop"):
                self.stopped = True

    def document(self, message: _Message) -> Iterator[ProviderEvent]:
        """The events of a plain answer."""
        self.model = message.model
        for index, block in enumerate(message.content):
            yield from self._block(index, block)
            if block.type == "tool_use":
                arguments = msgspec.json.encode(block.input or {}).decode()
                yield ToolCall(self._calls[index], arguments=arguments)
        yield from self._usage(message.usage)
        self.stop_reason = message.stop_reason
        self.stopped = message.stop_reason is not None

    def _block(self, index: int, block: _Block) -> Iterator[ProviderEvent]:
        if block.text:
            yield Delta(block.text)
        if block.thinking:
            yield Reasoning(block.thinking)
        if block.signature:
            yield Signature(block.signature)
        if block.type == "tool_use":
            self._calls[index] = len(self._calls)
            self._without_arguments.add(index)
            yield ToolCall(self._calls[index], block.id, block.name)

    def _delta(self, index: int, piece: _Piece) -> Iterator[ProviderEvent]:
        if piece.text:
            yield Delta(piece.text)
        if piece.thinking:
            yield Reasoning(piece.thinking)
        if piece.signature:
            yield Signature(piece.signature)
        if piece.partial_json and index in self._calls:  # not of the provider's own tools
            self._without_arguments.discard(index)
            yield ToolCall(self._calls[index], arguments=piece.partial_json)

    def _usage(self, counts: _Counts | None) -> Iterator[Usage]:
        """Cumulative: what message_delta does not repeat stays as message_start said it."""
        if counts is None:
            return
        for name in _Counts.__struct_fields__:
            if (value := getattr(counts, name)) is not None:
                setattr(self._counts, name, value)
        seen = self._counts
        cached = seen.cache_read_input_tokens or 0
        written = seen.cache_creation_input_tokens or 0
        details = seen.output_tokens_details or _Details()
        yield Usage(
            input_tokens=(seen.input_tokens or 0) + cached + written,
            output_tokens=seen.output_tokens or 0,
            cached_tokens=cached,
            cache_write_tokens=written,
            reasoning_tokens=details.thinking_tokens or 0,
        )
