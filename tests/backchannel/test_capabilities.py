"""What a request needs, and what its model is known for: refused before money is spent."""

from __future__ import annotations

from typing import Any

import pytest

from backchannel.capabilities import check_capabilities, needs
from backchannel.errors import CapabilityMissing
from backchannel.registry import Registry, get_registry

TEXT = {"role": "user", "content": "Hi"}
IMAGE = {
    "role": "user",
    "content": [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}},
    ],
}
SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}}
TOOLS = {"tools": [{"type": "function", "function": {"name": "look"}}]}
LLAMA = "groq:llama-3.3-70b-versatile"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    for variable in ("GROQ_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(variable, "key")
    return get_registry()


@pytest.mark.parametrize(
    ("messages", "parameters", "needed"),
    [
        ([TEXT], {}, []),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], {}, []),
        ([{"role": "assistant", "content": None}], {}, []),
        ([TEXT, IMAGE], {}, ["multimodal"]),
        ([TEXT], {"response_format": {"type": "json_object"}}, []),
        ([TEXT], SCHEMA, ["structured_output"]),
        ([TEXT], TOOLS, ["tools"]),
        ([TEXT], {"tools": []}, []),
        ([IMAGE], SCHEMA | TOOLS, ["multimodal", "structured_output", "tools"]),
    ],
)
def test_what_a_request_needs(
    messages: list[dict[str, Any]], parameters: dict[str, Any], needed: list[str]
) -> None:
    assert needs(messages, parameters) == needed


@pytest.mark.parametrize(
    ("model", "messages", "parameters", "named"),
    [
        (LLAMA, [IMAGE], {}, ["multimodal"]),
        (LLAMA, [TEXT], SCHEMA, ["structured_output"]),
        (LLAMA, [IMAGE], SCHEMA, ["multimodal", "structured_output"]),
        ("groq:openai/gpt-oss-120b", [IMAGE], SCHEMA, ["multimodal"]),
    ],
)
def test_a_model_without_it_is_refused_and_others_are_named(
    registry: Registry,
    model: str,
    messages: list[dict[str, Any]],
    parameters: dict[str, Any],
    named: list[str],
) -> None:
    with pytest.raises(CapabilityMissing) as error:
        check_capabilities(registry, registry.resolve(model), messages, parameters)
    assert error.value.status == 400
    assert error.value.code == "capability_missing"
    assert f"({', '.join(named)})" in error.value.message
    # one of each provider that has a key first; never the one that cannot, nor echo
    assert "Models that can: openai:gpt-5-mini, " in error.value.message
    assert "ollama" not in error.value.message
    assert model not in error.value.message.partition("Models that can")[2]
    assert "anthropic" not in error.value.message


@pytest.mark.parametrize("model", [LLAMA, "openai:gpt-5", "echo", "groq:something-new"])
def test_what_a_model_can_passes(registry: Registry, model: str) -> None:
    check_capabilities(registry, registry.resolve(model), [TEXT], TOOLS)


def test_of_a_model_nobody_knows_the_providers_word_counts(registry: Registry) -> None:
    check_capabilities(registry, registry.resolve("groq:something-new"), [IMAGE], SCHEMA)
