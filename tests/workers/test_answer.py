"""What is stored of an answer is what its stream said."""

from __future__ import annotations

from typing import Any

from backchannel import events
from workers.answer import Answer
from workers.providers import Reasoning, Signature, ToolCall


class Told:
    """A stream that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def add(self, type_: str, **own: Any) -> None:
        """As a stream's."""
        self.events.append((type_, own))


def test_a_tool_call_without_an_id_gets_one_where_it_is_stored_and_told() -> None:
    answer, told = Answer("job_1"), Told()
    take = answer.taker(told)  # type: ignore[arg-type]
    for piece in (
        ToolCall(4, None, "f", "{"),
        ToolCall(7, "given", "g", "[]"),
        ToolCall(4, "too late", None, "}"),
    ):
        take(piece)
    message = answer.message()
    assert message is not None
    stored = [
        (call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in message["tool_calls"]
    ]
    assert stored == [("call_1_0", "f", "{}"), ("given", "g", "[]")]
    assert told.events == [
        (events.TOOL_CALL, {"index": 4, "id": "call_1_0", "name": "f", "arguments": "{"}),
        (events.TOOL_CALL, {"index": 7, "id": "given", "name": "g", "arguments": "[]"}),
        (events.TOOL_CALL, {"index": 4, "arguments": "}"}),
    ]


def test_signed_blocks_of_reasoning_are_stored_apart() -> None:
    answer = Answer("job_1")
    take = answer.taker(None)
    for piece in (Reasoning("a"), Reasoning("b"), Signature("1"), Reasoning("c"), Signature("2")):
        take(piece)
    message = answer.message()
    assert message is not None
    assert message["reasoning"] == "abc"
    blocks = [(each["thinking"], each["signature"]) for each in message["thinking_blocks"]]
    assert blocks == [("ab", "1"), ("c", "2")]
