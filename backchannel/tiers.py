"""Tiers: names for ordered lists of models, of which a job takes the first that is available."""

from __future__ import annotations

from typing import Literal, get_args

from backchannel.errors import InvalidRequest

Tier = Literal["fast", "balanced", "powerful"]
TIERS: tuple[Tier, ...] = get_args(Tier)

AUTO = "auto"  # the request itself says which tier: backchannel/auto.py
USUAL: Tier = "balanced"  # what `auto` comes to while there is no request to look at
_PREFIX = "tier:"

DEFAULT_TIERS: dict[Tier, list[str]] = {
    "fast": [
        "anthropic:claude-haiku-4-5",
        "openai:gpt-5-nano",
        "groq:llama-3.1-8b-instant",
        "gemini:gemini-2.5-flash-lite",
    ],
    "balanced": [
        "anthropic:claude-sonnet-4-5-20250929",
        "openai:gpt-5-mini",
        "groq:llama-3.3-70b-versatile",
        "gemini:gemini-2.5-flash",
    ],
    "powerful": [
        "anthropic:claude-opus-4-5",
        "openai:gpt-5",
        "gemini:gemini-2.5-pro",
        "groq:openai/gpt-oss-120b",
    ],
}

# What a request may name instead of a model.
NAMES: tuple[str, ...] = (*(f"{_PREFIX}{tier}" for tier in TIERS), *TIERS, AUTO)


def rule_of(name: str) -> str | None:
    """A name by which each turn's model is chosen anew; None: it names one model."""
    return name if name in NAMES else None


def tier_of(name: str) -> Tier | None:
    """The tier that a name means, as ``tier:fast`` or ``fast``; None: it names a model, or `auto`.

    Raises:
        InvalidRequest: It says ``tier:`` and there is no such tier.
    """
    bare = name.removeprefix(_PREFIX)
    for tier in TIERS:
        if bare == tier:
            return tier
    if bare != name:
        raise InvalidRequest(
            f"There is no tier '{bare}'. Tiers are {', '.join(TIERS)}.", param="model"
        )
    return None
