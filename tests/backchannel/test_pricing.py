"""Prices, checked by hand; and that unknown is never free."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from backchannel.pricing import Price, Tokens, price
from backchannel.registry import Provider, get_registry
from backchannel.settings import get_settings


def provider(provider_id: str) -> Provider:
    return get_registry().get(provider_id)


def test_a_known_model_costs_its_list_price() -> None:
    # gpt-4.1-mini, dollars per million: input 0.40, cached input 0.10, output 1.60
    fresh, cached, output = 600 * 400, 400 * 100, 100 * 1600  # in nano-dollars
    found = price(provider("openai"), "gpt-4.1-mini", Tokens(1000, 100, cached=400))
    assert found.nanousd == fresh + cached + output == 440_000


def test_cache_writes_have_a_price_of_their_own() -> None:
    # claude-sonnet-4-5, dollars per million: input 3, cache read 0.30, cache write 3.75, output 15
    tokens = Tokens(1000, 100, cached=400, cache_write=200)
    found = price(provider("anthropic"), "claude-sonnet-4-5-20250929", tokens)
    assert found.nanousd == 400 * 3000 + 400 * 300 + 200 * 3750 + 100 * 15_000 == 3_570_000


def test_reasoning_is_output_and_not_paid_twice() -> None:
    plain = price(provider("openai"), "gpt-5-mini", Tokens(10, 100))
    reasoned = price(provider("openai"), "gpt-5-mini", Tokens(10, 100, reasoning=90))
    assert plain.nanousd == reasoned.nanousd
    assert plain.nanousd


def test_a_price_says_its_day_and_its_list() -> None:
    days = {datetime.now(UTC).date().isoformat()}
    found = price(provider("openai"), "gpt-4.1-mini", Tokens(1, 1))
    days.add(datetime.now(UTC).date().isoformat())
    day, list_, version = found.date.split()
    assert day in days
    assert (list_, version[0].isdigit()) == ("genai-prices", True)


@pytest.mark.parametrize("provider_id", ["openai", "anthropic", "groq", "gemini"])
def test_an_unknown_model_has_no_price_and_is_not_free(provider_id: str) -> None:
    assert price(provider(provider_id), "no-such-model-9", Tokens(10, 10)).nanousd is None


@pytest.mark.parametrize("provider_id", ["ollama", "lmstudio", "echo"])
def test_what_runs_at_home_costs_nothing_per_token(provider_id: str) -> None:
    assert price(provider(provider_id), "any:model", Tokens(10, 10)).nanousd == 0


@pytest.mark.parametrize(
    "tokens", [Tokens(10, 1, cached=20), Tokens(10, 1, cached=6, cache_write=6), Tokens(-1, 1)]
)
def test_counts_that_contradict_each_other_have_no_price(tokens: Tokens) -> None:
    assert price(provider("anthropic"), "claude-sonnet-4-5-20250929", tokens).nanousd is None


def test_every_built_in_default_and_listed_model_has_a_price() -> None:
    unknown = [
        f"{each.id}:{model}"
        for each in get_registry().providers.values()
        for model in {each.default_model, *each.models}
        if price(each, model, Tokens(1, 1)).nanousd is None
    ]
    assert unknown == []


# ---------------------------------------------------------------- the operator's own prices


def own(monkeypatch: pytest.MonkeyPatch, **prices: float) -> None:
    monkeypatch.setenv("BACKCHANNEL_PRICES", json.dumps({"ollama:llama3.2:1b": prices}))
    get_settings.cache_clear()


def cost(tokens: Tokens) -> Price:
    return price(provider("ollama"), "llama3.2:1b", tokens)


def test_an_own_price_goes_before_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    own(monkeypatch, input=2, output=6)
    found = cost(Tokens(1000, 100, cached=400))
    assert found.nanousd == 1000 * 2000 + 100 * 6000
    assert found.date.endswith(" settings")


def test_an_own_price_may_tell_cached_tokens_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    own(monkeypatch, input=2, output=6, cached=0.5, cache_write=3)
    found = cost(Tokens(1000, 100, cached=400, cache_write=100))
    assert found.nanousd == 500 * 2000 + 400 * 500 + 100 * 3000 + 100 * 6000


def test_parts_of_a_nano_dollar_are_rounded_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    own(monkeypatch, input=0.0004, output=0)  # 0.4 nano-dollars a token
    assert cost(Tokens(1, 0)).nanousd == 0
    assert cost(Tokens(1000, 0)).nanousd == 400
