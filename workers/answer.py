"""An answer as it grows: text, reasoning, tool calls and usage, also passed on to the live wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from backchannel import events
from backchannel.bus import Stream
from workers.providers import Delta, ProviderEvent, Reasoning, ToolCall, Usage


class Answer:
    """What one attempt has received so far."""

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.begun = False
        self._text: list[str] = []
        self._reasoning: list[str] = []
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

        return take

    def _tool_call(self, piece: ToolCall, stream: Stream | None) -> None:
        call = self._calls.setdefault(
            piece.index,
            {"id": None, "type": "function", "function": {"name": None, "arguments": ""}},
        )
        call["id"] = call["id"] or piece.id
        call["function"]["name"] = call["function"]["name"] or piece.name
        call["function"]["arguments"] += piece.arguments
        if stream is not None:
            known = {"id": piece.id, "name": piece.name}
            stream.add(
                events.TOOL_CALL,
                index=piece.index,
                **{name: value for name, value in known.items() if value is not None},
                arguments=piece.arguments,
            )

    def message(self) -> dict[str, Any] | None:
        """The assistant's message in chat-completions form; None if nothing was said."""
        if not self.begun:
            return None
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._text) or None}
        if self._reasoning:
            message["reasoning"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        return message
