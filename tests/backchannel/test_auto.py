"""Auto: the table of docs/models.md, row by row, at its edges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backchannel.auto import Features, choose, features_of
from backchannel.tiers import TIERS

PLAIN = Features(tokens=20)


@pytest.mark.parametrize(
    ("changes", "tier", "why"),
    [
        ({}, "fast", "it is short and plain"),
        ({"tokens": 999, "turns": 5}, "fast", "it is short and plain"),
        ({"tokens": 1_000}, "balanced", "it is long"),
        ({"turns": 6}, "balanced", "it has many turns"),
        ({"code": True}, "balanced", "it has code"),
        ({"images": True}, "balanced", "it has images"),
        ({"schema": True}, "balanced", "it wants JSON"),
        ({"tools": True, "schema": True}, "balanced", "it has tools"),
        ({"code": True, "tokens": 1_999}, "balanced", "it has code"),
        ({"code": True, "tokens": 2_000}, "powerful", "it has much code"),
        ({"turns": 20, "tools": True}, "powerful", "it has very many turns"),
        ({"tokens": 15_999}, "balanced", "it is long"),
        ({"tokens": 16_000, "code": True}, "powerful", "it is very long"),
    ],
)
def test_the_first_row_that_holds_decides(changes: dict[str, Any], tier: str, why: str) -> None:
    assert choose(replace(PLAIN, **changes)) == (tier, why)


@given(
    st.builds(
        Features,
        tokens=st.integers(0, 10**6),
        turns=st.integers(0, 100),
        code=st.booleans(),
        images=st.booleans(),
        tools=st.booleans(),
        schema=st.booleans(),
    )
)
def test_every_request_has_a_tier_and_more_text_never_a_lesser_one(request_: Features) -> None:
    tier, why = choose(request_)
    longer, _ = choose(replace(request_, tokens=request_.tokens + 5_000))
    assert TIERS.index(longer) >= TIERS.index(tier)
    assert why.startswith("it ")


def test_features_are_read_off_the_request() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [
        {"role": "user", "content": "x" * 400},
        {"role": "assistant", "content": "```py\n1\n```"},
        {"role": "user", "content": [{"type": "text", "text": "y" * 40}, part]},
    ]
    parameters = {"tools": [{"type": "function"}], "response_format": {"type": "json_schema"}}
    found = features_of(messages, parameters, system="z" * 80)
    assert found == Features(
        tokens=100 + 2 + 10 + 20 + 4 * 4, turns=2, code=True, images=True, tools=True, schema=True
    )
    plain = features_of(messages[:1], {"response_format": {"type": "text"}, "tools": []})
    assert plain == Features(tokens=104)


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    for words in ("16,000 tokens", "2,000 tokens", "20 turns", "1,000 tokens", "6 turns"):
        assert words in page
