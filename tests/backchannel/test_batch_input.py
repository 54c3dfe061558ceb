"""A batch's lines: what their bodies ask is kept, or refused by name; what answers them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from backchannel import batch_input
from backchannel.batch_input import CHAT, RESPONSES, Asked
from backchannel.batch_output import answer, failure
from backchannel.errors import InvalidRequest
from backchannel.registry import build_registry
from backchannel.settings import Settings

MESSAGES = [{"role": "user", "content": "Hi"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def job(**changes: Any) -> SimpleNamespace:
    """A row of a job that is over."""
    usual: dict[str, Any] = {
        "job_id": "job_123",
        "created_ms": 1_795_316_400_250,
        "provider": "openai",
        "model": "gpt-5-mini",
        "message": {"role": "assistant", "content": "Hello"},
        "finish_reason": "stop",
        "meta": {},
        "asked": None,
        "error_code": None,
        "error_message": None,
        "source": "final",
        "input_tokens": 5,
        "cached_tokens": 1,
        "cache_write_tokens": 0,
        "output_tokens": 7,
        "reasoning_tokens": 2,
        "cost_nanousd": 1_200_000,
        "price_date": None,
    }
    return SimpleNamespace(**usual | changes)


def ask(endpoint: str, body: dict[str, Any]) -> Asked:
    """What a line with this body asks."""
    registry = build_registry(Settings())
    return batch_input.ask(endpoint, json.dumps({"body": body}).encode(), registry)


def test_a_chat_is_taken_as_it_is() -> None:
    body = {"model": "echo", "messages": MESSAGES, "seed": 7, "stream": False, "user": None}
    asked = ask(CHAT, body | {"metadata": {"a": "b"}, "store": True})
    assert (asked.resolved.id, asked.messages) == ("echo:echo-1", MESSAGES)
    assert asked.parameters == {"seed": 7}
    assert (asked.order.system, asked.order.metadata) == (None, {"a": "b"})


@pytest.mark.parametrize(
    ("endpoint", "body", "param"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "usr", "content": "a"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": MESSAGES, "stream": True}, "stream"),
        (CHAT, {"messages": MESSAGES, "x_backchannel": {"lane": "batch"}}, "x_backchannel"),
        (CHAT, {"messages": MESSAGES, "n": 2}, "n"),
        (RESPONSES, {}, "input"),
        (RESPONSES, {"input": 7}, "input"),
        (RESPONSES, {"input": [{"type": "computer_call"}]}, "input[0].type"),
        (RESPONSES, {"input": "a", "background": True}, "background"),
        (RESPONSES, {"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        (RESPONSES, {"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        (RESPONSES, {"input": "a", "reasoning": {"effort": 7}}, "reasoning.effort"),
        (RESPONSES, {"input": "a", "truncation": "some"}, "truncation"),
    ],
)
def test_what_cannot_be_asked_is_named(endpoint: str, body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ask(endpoint, {"model": "echo"} | body)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("endpoint", "body"), [(CHAT, {"messages": MESSAGES}), (RESPONSES, {"input": "Hi"})]
)
def test_a_line_may_have_fallbacks_and_name_a_tier(
    endpoint: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {"x_backchannel": {"fallbacks": ["ollama:x", "groq:no-key"]}}
    asked = ask(endpoint, {"model": "echo"} | body | ours)
    assert (asked.resolved.id, asked.fallbacks) == ("echo:echo-1", ["ollama:x"])
    monkeypatch.setenv("BACKCHANNEL_TIERS__FAST", '["groq:none", "ollama:x", "echo:quick"]')
    asked = ask(endpoint, {"model": "auto"} | body)
    assert (asked.resolved.id, asked.fallbacks) == ("ollama:x", ["echo:quick"])
    line = SimpleNamespace(
        id="batch_1", caller="local", endpoint=endpoint, left_ms=1_000, models=None
    )
    raw = json.dumps({"body": {"model": "tier:fast"} | body}).encode()
    registry = build_registry(Settings())
    made = batch_input.job_of_line(line, raw, batch_input.Head(1, "a"), registry)
    assert (made.provider, made.model, made.fallbacks) == ("ollama", "x", ["echo:quick"])
    assert made.model_reason == (
        "'tier:fast'; first available is ollama; skipped groq:none (no key)"
    )


def test_a_response_s_body_becomes_a_chat() -> None:
    asked = ask(
        RESPONSES,
        {
            "model": "echo",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Look."}]},
                {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "call_1", "output": "7"},
            ],
            "instructions": "Be brief.",
            "max_output_tokens": 9,
            "reasoning": {"effort": "low"},
            "text": {"format": {"type": "json_schema", "name": "s", "schema": {}}},
            "tools": [{"type": "function", "name": "f", "parameters": {}}],
            "tool_choice": {"type": "function", "name": "f"},
        },
    )
    assert asked.order.system == "Be brief."
    assert asked.messages == [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "7"},
    ]
    assert asked.parameters == {
        "max_completion_tokens": 9,
        "reasoning_effort": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    }


def test_a_job_answers_as_a_chat_completion() -> None:
    body = answer(CHAT, job())
    found = ChatCompletion.model_validate(body, strict=True)
    assert found.choices[0].message.content == "Hello"
    assert found.usage is not None
    assert (found.usage.total_tokens, found.created) == (12, 1_795_316_400)
    assert body["usage"]["cost_usd"] == 0.0012


@pytest.mark.parametrize(
    ("changes", "kinds", "status"),
    [
        ({}, ["message"], "completed"),
        ({"finish_reason": "length"}, ["message"], "incomplete"),
        (
            {"message": {"content": None, "tool_calls": [CALL]}, "finish_reason": "tool_calls"},
            ["function_call"],
            "completed",
        ),
        ({"message": {"content": "a", "reasoning": "b"}}, ["reasoning", "message"], "completed"),
    ],
)
def test_a_job_answers_as_a_response(
    changes: dict[str, Any], kinds: list[str], status: str
) -> None:
    found = Response.model_validate(answer(RESPONSES, job(**changes)))
    assert ([item.type for item in found.output], found.status) == (kinds, status)


def test_unknown_usage_is_not_zero() -> None:
    unknown = {"input_tokens": None, "output_tokens": None, "source": "unknown"}
    for endpoint in (CHAT, RESPONSES):
        assert answer(endpoint, job(**unknown))["usage"] is None


@pytest.mark.parametrize(
    ("code", "status"), [("auth", 401), ("truncated", 502), ("content_filter", 400)]
)
def test_a_failure_is_an_http_error(code: str, status: int) -> None:
    found, body = failure(job(error_code=code, error_message="No.", source=None))
    assert (found, body["error"]["code"], "usage" in body) == (status, code, False)
    assert failure(job(error_code=code))[1]["usage"]["total_tokens"] == 12
