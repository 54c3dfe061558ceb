"""An answer as it grows: text, reasoning, tool calls and usage, also passed on to the live wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from backchannel import events
from backchannel.bus import Stream
from workers.providers import Delta, ProviderEvent, Reasoning, Signature, ToolCall, Usage


class Answer:
    """What one attempt has received so far."""

    def __init__(self, job_id: str) -> None:
        self._digits = job_id.removeprefix("job_")
        self.usage: Usage | None = None
        self.begun = False
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._signed: list[dict[str, Any]] = []  # blocks of the reasoning, as Anthropic's
        self._signed_up_to = 0
        self._calls: dict[int, dict[str, Any]] = {}

    def taker(self, stream: Stream | None) -> Callable[[ProviderEvent], None]:
        """A function that takes one event; with a stream it also tells the live readers."""

        def take(event: ProviderEvent) -> None:
            kind = type(event)
            if kind is Usage:
                self.usage = event  # type: ignore[assignment]
                return
            self.begun = True
            if kind is Delta:
                self._text.append(event.text)  # type: ignore[union-attr]
                if stream is not None:
                    stream.text(events.DELTA, event.text)  # type: ignore[union-attr]
            elif kind is Reasoning:
                self._reasoning.append(event.text)  # type: ignore[union-attr]
                if stream is not None:
                    stream.text(events.REASONING, event.text)  # type: ignore[union-attr]
            elif isinstance(event, ToolCall):
                self._tool_call(event, stream)
            elif isinstance(event, Signature):
                self._sign(event.text)
                if stream is not None:
                    stream.add(events.SIGNATURE, signature=event.text)

        return take

    def _sign(self, signature: str) -> None:
        text = "".join(self._reasoning[self._signed_up_to :])
        self._signed.append({"type": "thinking", "thinking": text, "signature": signature})
        self._signed_up_to = len(self._reasoning)

    def _tool_call(self, piece: ToolCall, stream: Stream | None) -> None:
        call, named = self._calls.get(piece.index), {}
        if call is None:
            # some servers give no id, and clients cannot do without
            named = {"id": piece.id or f"call_{self._digits}_{len(self._calls)}", "name": ""}
            function = {"name": "", "arguments": ""}
            call = {"id": named["id"], "type": "function", "function": function}
            self._calls[piece.index] = call
        function = call["function"]
        if piece.name and not function["name"]:
            function["name"] = named["name"] = piece.name
        function["arguments"] += piece.arguments
        if stream is not None:
            stream.add(events.TOOL_CALL, index=piece.index, **named, arguments=piece.arguments)

    def message(self) -> dict[str, Any] | None:
        """The assistant's message in chat-completions form; None if nothing was said."""
        if not self.begun:
            return None
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._text) or None}
        if self._reasoning:
            message["reasoning"] = "".join(self._reasoning)
        if self._signed:
            message["thinking_blocks"] = self._signed
        if self._calls:
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        return message
