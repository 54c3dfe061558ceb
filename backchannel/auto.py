"""Auto: which tier answers a request, from what the request is like. Pure: same request, same tier.

The table, of which the first row that holds decides; docs/models.md repeats it for users:

    powerful   16,000 tokens or more; code, and 2,000 tokens or more; 20 turns or more
    balanced   tools; a JSON schema; images; code; 1,000 tokens or more; 6 turns or more
    fast       everything else

Tokens are the likely ones of all that is told to the model (backchannel/tokens.py), turns the
user's messages; code is a fence of three backticks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from backchannel.tiers import Tier
from backchannel.tokens import text_of, tokens_of

FENCE = "```"
_TEXT_PARTS = frozenset({"text", "refusal"})


@dataclass(frozen=True, slots=True)
class Features:
    """What a request is like."""

    tokens: int = 0
    turns: int = 1
    code: bool = False
    images: bool = False  # or any other part that is not text
    tools: bool = False
    schema: bool = False  # the answer must be JSON


def features_of(
    messages: Sequence[dict[str, Any]], parameters: dict[str, Any], system: str | None = None
) -> Features:
    """The features of a request, with all of its history."""
    told = [*messages, {"content": system}] if system else messages
    parts = [part for each in messages if isinstance(each.get("content"), list)
             for part in each["content"]]  # fmt: skip
    form = parameters.get("response_format") or {}
    return Features(
        tokens=tokens_of(told),
        turns=sum(each["role"] == "user" for each in messages),
        code=any(FENCE in text_of(each) for each in messages),
        images=any(part.get("type") not in _TEXT_PARTS for part in parts),
        tools=bool(parameters.get("tools")),
        schema=isinstance(form, dict) and form.get("type") in ("json_schema", "json_object"),
    )


LONG, LONG_CODE, MANY_TURNS = 16_000, 2_000, 20
SOME_TEXT, SOME_TURNS = 1_000, 6

_TABLE: tuple[tuple[Tier, Callable[[Features], bool], str], ...] = (
    ("powerful", lambda f: f.tokens >= LONG, "it is very long"),
    ("powerful", lambda f: f.code and f.tokens >= LONG_CODE, "it has much code"),
    ("powerful", lambda f: f.turns >= MANY_TURNS, "it has very many turns"),
    ("balanced", lambda f: f.tools, "it has tools"),
    ("balanced", lambda f: f.schema, "it wants JSON"),
    ("balanced", lambda f: f.images, "it has images"),
    ("balanced", lambda f: f.code, "it has code"),
    ("balanced", lambda f: f.tokens >= SOME_TEXT, "it is long"),
    ("balanced", lambda f: f.turns >= SOME_TURNS, "it has many turns"),
    ("fast", lambda _: True, "it is short and plain"),
)


def choose(request: Features) -> tuple[Tier, str]:
    """The tier that answers a request, and why."""
    return next((tier, why) for tier, holds, why in _TABLE if holds(request))
