"""Every parameter is passed, translated or refused by name; nothing is dropped in silence."""

from __future__ import annotations

from typing import Any

import pytest

from backchannel.errors import InvalidRequest, UnsupportedParameter
from backchannel.parameters import BY_TYPE, KNOWN, NOT_A_CHAT, OURS, SHAPES, check_parameters
from backchannel.registry import BUILT_IN, Provider

PROVIDERS = {provider.id: provider for provider in BUILT_IN}
OPENAI, ANTHROPIC, ECHO = PROVIDERS["openai"], PROVIDERS["anthropic"], PROVIDERS["echo"]

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}

# One good value of every parameter of the tables.
GOOD: dict[str, Any] = {
    "extra_body": {"mirostat": 1},
    "frequency_penalty": 0.5,
    "logit_bias": {"50256": -100},
    "logprobs": True,
    "max_completion_tokens": 5,
    "max_tokens": 5,
    "n": 1,
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "x"},
    "presence_penalty": 1,
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "response_format": SCHEMA,
    "safety_identifier": "u1",
    "seed": 7,
    "service_tier": "auto",
    "stop": ["a", "b"],
    "temperature": 0,
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "tool_choice": "auto",
    "tools": [TOOL],
    "top_k": 5,
    "top_logprobs": 2,
    "top_p": 0.9,
    "user": "u",
    "verbosity": "low",
}


def test_the_samples_cover_the_tables() -> None:
    assert set(GOOD) == KNOWN
    assert set(SHAPES) <= KNOWN
    assert not (set(OURS) | set(NOT_A_CHAT)) & KNOWN


@pytest.mark.parametrize("name", sorted(GOOD))
@pytest.mark.parametrize("provider", [OPENAI, ANTHROPIC, ECHO], ids=lambda each: each.id)
def test_each_parameter_is_kept_or_refused_by_name(provider: Provider, name: str) -> None:
    if name in BY_TYPE[provider.type]:
        assert check_parameters({name: GOOD[name]}, provider) == {name: GOOD[name]}
        return
    with pytest.raises(UnsupportedParameter) as caught:
        check_parameters({name: GOOD[name]}, provider)
    assert caught.value.param == f"parameters.{name}"
    assert name in caught.value.message
    assert provider.id in caught.value.message


def test_null_means_not_given() -> None:
    assert check_parameters({"temperature": None, "nonsense": None}, OPENAI) == {}


@pytest.mark.parametrize("name", sorted(OURS))
def test_fields_of_the_job_are_not_parameters(name: str) -> None:
    with pytest.raises(InvalidRequest, match=OURS[name]):
        check_parameters({name: "x"}, OPENAI)


@pytest.mark.parametrize("name", sorted(NOT_A_CHAT))
def test_what_is_not_a_chat_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(UnsupportedParameter, match=NOT_A_CHAT[name]):
        check_parameters({name: {}}, ECHO)


def test_an_unknown_parameter_points_to_extra_body() -> None:
    with pytest.raises(UnsupportedParameter, match="extra_body"):
        check_parameters({"mirostat": 1}, OPENAI)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_the_wrong_json_type_is_named(name: str) -> None:
    provider = OPENAI if name in BY_TYPE["openai-compatible"] else ANTHROPIC
    wrong: Any = "x" if str not in SHAPES[name] else 1
    with pytest.raises(InvalidRequest, match=f"'{name}' must be") as caught:
        check_parameters({name: wrong}, provider)
    assert caught.value.param == f"parameters.{name}"


@pytest.mark.parametrize("name", ["temperature", "max_tokens", "seed"])
def test_true_is_no_number(name: str) -> None:
    with pytest.raises(InvalidRequest, match=name):
        check_parameters({name: True}, OPENAI)


def test_a_number_without_a_fraction_is_whole() -> None:
    kept = check_parameters({"seed": 5.0, "max_tokens": 2.0}, OPENAI)
    assert {name: repr(value) for name, value in kept.items()} == {"seed": "5", "max_tokens": "2"}
    for value in (5.5, 1e300):
        with pytest.raises(InvalidRequest, match="seed"):
            check_parameters({"seed": value}, OPENAI)


INSIDE: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "one job per answer"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, "not both"),
    ({"extra_body": {"model": "other"}}, "'model' cannot be sent in extra_body"),
    ({"extra_body": {"stream": False}}, "'stream' cannot be sent in extra_body"),
    ({"extra_body": {"n": 8}}, "one job per answer"),
    ({"stop": ["a", 1]}, "array of strings"),
    ({"tools": ["look"]}, "object with a type"),
    ({"tools": [{"type": "function"}]}, "function.name"),
    ({"response_format": {}}, "needs a type"),
]


@pytest.mark.parametrize(("parameters", "message"), INSIDE)
@pytest.mark.parametrize("provider", [OPENAI, ANTHROPIC, ECHO], ids=lambda each: each.id)
def test_what_would_fail_late_is_refused_for_everyone(
    provider: Provider, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_parameters(parameters, provider)


ANTHROPIC_REFUSES: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_object"}}, "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "json_schema.schema"),
    ({"service_tier": "flex"}, "standard_only"),
    ({"reasoning_effort": "extreme"}, "xhigh"),
    ({"tool_choice": "any"}, "required"),
    ({"tool_choice": {"type": "allowed_tools"}}, "function"),
]


@pytest.mark.parametrize(("parameters", "message"), ANTHROPIC_REFUSES)
def test_anthropic_refuses_values_it_has_no_word_for(
    parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_parameters(parameters, ANTHROPIC)


@pytest.mark.parametrize(
    "parameters",
    [
        {"response_format": {"type": "text"}},
        {"tool_choice": {"type": "function", "function": {"name": "look"}}},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"service_tier": "default", "reasoning_effort": "none", "stop": "x"},
    ],
)
def test_anthropic_takes_what_translates(parameters: dict[str, Any]) -> None:
    assert check_parameters(parameters, ANTHROPIC) == parameters
