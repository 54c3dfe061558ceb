"""An answer's items: what closes them, and that a stored answer has the ones its stream had."""

from __future__ import annotations

from typing import Any

from backchannel.pieces import Item, Pieces, items_of_message

SAID: list[tuple[str, dict[str, Any]]] = [
    ("reasoning", {"text": "a"}),
    ("reasoning", {"text": "b"}),
    ("signature", {"signature": "1"}),
    ("reasoning", {"text": "c"}),
    ("signature", {"signature": "2"}),
    ("signature", {"signature": "of nothing shown"}),
    ("delta", {"text": "Hel"}),
    ("delta", {"text": "lo."}),
    ("tool_call", {"index": 0, "id": "c1", "name": "f", "arguments": "{}"}),
]
STORED = {
    "reasoning": "abc",
    "thinking_blocks": [
        {"type": "thinking", "thinking": "ab", "signature": "1"},
        {"type": "thinking", "thinking": "c", "signature": "2"},
        {"type": "thinking", "thinking": "", "signature": "of nothing shown"},
    ],
    "content": "Hello.",
    "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "{}"}}],
}


def seen(items: list[Item]) -> list[tuple[str, str, str]]:
    return [(item.kind, item.text, item.signature) for item in items]


def test_a_signature_ends_a_block_of_reasoning() -> None:
    pieces, steps = Pieces(), []
    for type_, own in SAID:
        steps += [(step.what, step.item.index) for step in pieces.take(type_, own)]
    steps += [(step.what, step.item.index) for step in pieces.close()]
    assert seen(pieces.items)[:3] == [
        ("reasoning", "ab", "1"),
        ("reasoning", "c", "2"),
        ("reasoning", "", "of nothing shown"),
    ]
    for index in range(5):
        its = [what for what, of in steps if of == index]
        assert (its[0], its[-1], its.count("close")) == ("open", "close", 1)
    # one after another: what is said of the next begins when the one before is closed
    order = [index for _, index in steps]
    assert order == sorted(order)


def test_what_is_stored_has_the_items_of_the_stream() -> None:
    pieces = Pieces()
    for type_, own in SAID:
        list(pieces.take(type_, own))
    stored = items_of_message(STORED)
    assert seen(stored) == seen(pieces.items)
    assert [item.index for item in stored] == [0, 1, 2, 3, 4]
    assert seen(items_of_message({"reasoning": "abc"})) == [("reasoning", "abc", "")]
    assert items_of_message(None) == []
