"""Tiers and fallbacks: the models a request comes to, and why each was taken or skipped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from backchannel.choice import Choice, choose
from backchannel.errors import (
    InvalidRequest,
    ProviderKeyMissing,
    ProviderNotFound,
    UnsupportedParameter,
)
from backchannel.registry import BUILT_IN, Capabilities, Registry, get_registry
from backchannel.settings import Settings, get_settings
from backchannel.tiers import DEFAULT_TIERS, NAMES, TIERS, tier_of

KEYS = {each.id: each.key_env for each in BUILT_IN if each.key_env}
HELLO = [{"role": "user", "content": "Hello?"}]


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Any:
    def give(*providers: str) -> None:
        for provider in providers:
            monkeypatch.setenv(KEYS[provider], "key")

    return give


def chosen(name: str | None, **more: Any) -> Choice:
    messages, parameters = more.pop("messages", HELLO), more.pop("parameters", {})
    return choose(get_registry(), name, messages, parameters, **more)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("tier", TIERS)
def test_a_tier_has_a_full_name_and_its_bare_one(tier: str) -> None:
    assert tier_of(f"tier:{tier}") == tier_of(tier) == tier
    assert {f"tier:{tier}", tier, "auto"} <= set(NAMES)


def test_what_is_no_tier_says_which_there_are() -> None:
    assert tier_of("openai:gpt-5") is None
    with pytest.raises(
        InvalidRequest, match=r"no tier 'slow'\. Tiers are fast, balanced, powerful"
    ):
        chosen("tier:slow")


def test_the_usual_lists_name_registered_providers_only() -> None:
    known = set(get_registry().providers)
    assert {each.partition(":")[0] for models in DEFAULT_TIERS.values() for each in models} <= known


# ---------------------------------------------------------------- the first available


@pytest.mark.parametrize("tier", TIERS)
def test_the_first_whose_key_is_there_is_taken_and_the_rest_are_its_fallbacks(
    tier: str, keys: Any
) -> None:
    models = DEFAULT_TIERS[tier_of(tier) or "fast"]
    for place in reversed(range(len(models))):
        keys(models[place].partition(":")[0])
        found = chosen(f"tier:{tier}")
        assert found.resolved.id == models[place]
        assert found.fallbacks == (models[place + 1 :] or None)
        assert found.rule == f"tier:{tier}"
        skipped = ", ".join(f"{each} (no key)" for each in models[:place])
        first = f"'tier:{tier}'; first available is {models[place].partition(':')[0]}"
        assert found.resolved.reason == first + (f"; skipped {skipped}" if skipped else "")
        assert get_registry().resolve(tier).id == models[place]


@pytest.mark.parametrize("name", ["fast", "tier:fast", "auto"])
def test_a_tier_without_any_key_names_them_all(name: str) -> None:
    with pytest.raises(ProviderKeyMissing) as error:
        chosen(name)
    assert all(variable in error.value.message for variable in KEYS.values())
    assert "BACKCHANNEL_TIERS__FAST" in error.value.message


def test_a_tier_may_have_models_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCHANNEL_TIERS__FAST", '["mine:tiny", "ollama:llama3.2:3b", "echo"]')
    get_settings.cache_clear()
    found = chosen("fast")
    assert (found.resolved.id, found.fallbacks) == ("ollama:llama3.2:3b", ["echo:echo-1"])
    assert "skipped mine:tiny (no such provider)" in found.resolved.reason
    with pytest.raises(ProviderKeyMissing):
        chosen("powerful")


@pytest.mark.parametrize("tiers", [{"fast": []}, {"fast": ["tier:fast"]}, {"quick": ["echo"]}])
def test_settings_of_a_tier_that_make_no_sense_are_refused(tiers: dict[str, list[str]]) -> None:
    with pytest.raises(ValidationError):
        Settings(tiers=tiers)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what a request needs

IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x,y"}}]}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("capability", "request_", "why"),
    [
        ("multimodal", {"messages": IMAGE}, "no images"),
        ("tools", {"parameters": {"tools": TOOLS}}, "no tools"),
        (
            "structured_output",
            {"parameters": {"response_format": {"type": "json_object"}}},
            "no JSON schema",
        ),
    ],
)
def test_a_model_that_lacks_what_the_request_needs_is_skipped(
    capability: str, request_: dict[str, Any], why: str
) -> None:
    settings = Settings(tiers={"balanced": ["ollama:plain", "echo:echo-1"]})
    poor = Capabilities(**{capability: False})
    providers = [replace(p, capabilities=poor) if p.id == "ollama" else p for p in BUILT_IN]
    registry = Registry(providers, settings)
    messages, parameters = request_.get("messages", HELLO), request_.get("parameters", {})
    found = choose(registry, "auto", messages, parameters)
    assert (found.resolved.id, found.fallbacks) == ("echo:echo-1", None)
    assert f"skipped ollama:plain ({why})" in found.resolved.reason
    assert choose(registry, "balanced", HELLO, {}).resolved.id == "ollama:plain"


def test_a_model_that_cannot_honour_a_parameter_is_skipped_unless_none_can(keys: Any) -> None:
    keys("anthropic", "openai")
    found = chosen("tier:fast", parameters={"seed": 7})
    assert (found.resolved.id, found.fallbacks) == ("openai:gpt-5-nano", None)
    assert "skipped anthropic:claude-haiku-4-5 (cannot honour seed)" in found.resolved.reason
    with pytest.raises(UnsupportedParameter, match="'nonsense' is refused"):
        chosen("tier:fast", parameters={"nonsense": 7})


def test_auto_says_which_tier_and_why(keys: Any) -> None:
    keys("openai")
    found = chosen("auto", parameters={"tools": TOOLS})
    assert (found.resolved.id, found.rule) == ("openai:gpt-5-mini", "auto")
    assert found.resolved.reason.startswith(
        "auto: balanced, because it has tools; first available is openai"
    )
    assert chosen("auto").resolved.id == "openai:gpt-5-nano"
    assert chosen("auto", system="x" * 100_000).resolved.id == "openai:gpt-5"


# ---------------------------------------------------------------- named fallbacks


def test_fallbacks_are_resolved_once_each(keys: Any) -> None:
    keys("anthropic", "groq")
    found = chosen("echo", fallbacks=["groq", "claude-x", "echo:echo-1", "groq"])
    assert found.resolved.id == "echo:echo-1"
    assert found.fallbacks == ["groq:llama-3.3-70b-versatile", "anthropic:claude-x"]
    assert found.rule is None
    assert chosen("echo", fallbacks=[]).fallbacks is None


def test_fallbacks_of_a_tier_go_before_the_rest_of_its_list(keys: Any) -> None:
    keys("anthropic", "openai")
    assert chosen("fast", fallbacks=["echo"]).fallbacks == ["echo:echo-1"]
    assert chosen("fast", fallbacks=[]).fallbacks is None


def test_models_without_a_key_are_skipped_while_one_has_one(keys: Any) -> None:
    found = chosen("openai:gpt-5", fallbacks=["groq", "echo", "ollama:x"])
    assert (found.resolved.id, found.fallbacks) == ("echo:echo-1", ["ollama:x"])
    assert found.resolved.reason == "the first fallback with a key; openai has none"
    with pytest.raises(ProviderKeyMissing, match="Provider 'openai' has no key"):
        chosen("openai:gpt-5", fallbacks=["groq"])
    keys("openai")
    assert chosen("openai:gpt-5", fallbacks=["groq"]).fallbacks is None


@pytest.mark.parametrize(
    ("fallback", "error"),
    [
        ("nobody:x", ProviderNotFound),
        ("tier:fast", InvalidRequest),
        ("auto", InvalidRequest),
        ("anthropic:x", UnsupportedParameter),
    ],
)
def test_a_fallback_that_cannot_be_one_is_refused_by_name(
    fallback: str, error: type[InvalidRequest], keys: Any
) -> None:
    keys("anthropic")
    with pytest.raises(error, match=f"Fallback '{fallback}'") as raised:
        chosen("echo", fallbacks=["ollama:x", fallback], parameters={"seed": 7})
    assert raised.value.param == "fallbacks"
