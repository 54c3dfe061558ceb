"""An answer as items, texts, reasoning and tool calls: opened and closed by events, or stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from backchannel import events
from backchannel.events import Event, fields

Kind = Literal["text", "reasoning", "tool_call"]
_TEXTS: dict[str, Kind] = {events.DELTA: "text", events.REASONING: "reasoning"}


@dataclass
class Item:
    """One item of an answer, numbered through all attempts."""

    index: int
    kind: Kind
    call_id: str = ""
    name: str = ""
    signature: str = ""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it so far; of a tool call its arguments."""
        return "".join(self.pieces)


class Step(NamedTuple):
    """Something happened to an item."""

    what: Literal["open", "piece", "signed", "close"]
    item: Item
    piece: str = ""


class Pieces:
    """Sorts one attempt's events into items. Tool calls may interleave and stay open to the end."""

    def __init__(self) -> None:
        self.items: list[Item] = []  # of the present attempt
        self._next_index = 0
        self._open: Item | None = None
        self._calls: dict[int, Item] = {}

    @property
    def begun(self) -> bool:
        """Whether the present attempt has said anything."""
        return bool(self.items)

    def take(self, type_: str, own: dict[str, Any]) -> Iterator[Step]:
        """What an event does; events that carry no piece of the answer do nothing."""
        if type_ in _TEXTS:
            yield from self._text(_TEXTS[type_], own["text"])
        elif type_ == events.TOOL_CALL:
            yield from self._tool_call(own)
        elif type_ == events.SIGNATURE:
            yield from self._sign(own["signature"])

    def _text(self, kind: Kind, text: str) -> Iterator[Step]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(kind)
        assert self._open is not None
        self._open.pieces.append(text)
        yield Step("piece", self._open, text)

    def _sign(self, signature: str) -> Iterator[Step]:
        if self._open is None or self._open.kind != "reasoning":  # of thoughts that are not shown
            yield from self._begin("reasoning")
        assert self._open is not None
        self._open.signature = signature
        yield Step("signed", self._open, signature)
        yield from self._close()

    def _begin(self, kind: Kind) -> Iterator[Step]:
        yield from self._close()
        self._open = self._new(kind)
        yield Step("open", self._open)

    def _tool_call(self, own: dict[str, Any]) -> Iterator[Step]:
        item = self._calls.get(own["index"])
        if item is None:
            yield from self._close()
            item = self._new("tool_call")
            item.call_id, item.name = own["id"], own["name"]
            self._calls[own["index"]] = item
            yield Step("open", item)
        if own["arguments"]:
            item.pieces.append(own["arguments"])
            yield Step("piece", item, own["arguments"])

    def _new(self, kind: Kind) -> Item:
        item = Item(self._next_index, kind)
        self._next_index += 1
        self.items.append(item)
        return item

    def _close(self) -> Iterator[Step]:
        if self._open is not None:
            closed, self._open = self._open, None
            yield Step("close", closed)

    def close(self) -> Iterator[Step]:
        """The answer is over: every open item closes, in order."""
        open_ = [*([self._open] if self._open else []), *self._calls.values()]
        self._open, self._calls = None, {}
        for item in sorted(open_, key=lambda each: each.index):
            yield Step("close", item)

    def restart(self) -> None:
        """Another attempt begins: what it says is a new answer, with new numbers."""
        self.items = []


def text_message(log: Iterable[Event]) -> dict[str, Any] | None:
    """What the last attempt in a log had said when it broke off, as a message; None: nothing.

    For a job that ends without a worker: nobody else knows it any more.
    """
    text: list[str] = []
    for event in log:
        if event.type in (events.RESET, events.RETRYING):
            text.clear()
        elif event.type == events.DELTA:
            text.append(fields(event)[1]["text"])
    return {"role": "assistant", "content": "".join(text)} if text else None


def items_of_message(message: dict[str, Any] | None) -> list[Item]:
    """The items of a stored answer, in the order in which they are usually said."""
    said = message or {}
    thoughts = said.get("thinking_blocks") or [{"thinking": said.get("reasoning")}]
    items = [
        Item(0, "reasoning", signature=each.get("signature", ""), pieces=[each["thinking"]])
        for each in thoughts
        if each["thinking"] or each.get("signature")
    ]
    if said.get("content"):
        items.append(Item(0, "text", pieces=[said["content"]]))
    for call in said.get("tool_calls", ()):
        function = call["function"]
        arguments = [function["arguments"]]
        items.append(Item(0, "tool_call", call["id"], function["name"], pieces=arguments))
    for index, item in enumerate(items):
        item.index = index
    return items
