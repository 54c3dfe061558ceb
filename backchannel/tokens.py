"""How many tokens a message is likely to be, without asking anybody."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# A token is three to five characters in most languages and tokenizers; four is usual.
CHARS_PER_TOKEN = {"low": 5.0, "likely": 4.0, "high": 3.0}
TOKENS_PER_MESSAGE = 4


def text_of(message: dict[str, Any]) -> str:
    """All text of a message's content; images are not in it."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content or ())


def chars_of(message: dict[str, Any]) -> int:
    """The characters of a message: its text, and the names and arguments of its tool calls."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    called = sum(len(call["name"]) + len(call["arguments"]) for call in calls)
    return len(text_of(message)) + called


def tokens_of(messages: Iterable[dict[str, Any]]) -> int:
    """The likely tokens of some messages: a token for every 4 characters, and 4 a message."""
    counts = [chars_of(message) for message in messages]
    return sum(int(count / CHARS_PER_TOKEN["likely"]) + TOKENS_PER_MESSAGE for count in counts)
