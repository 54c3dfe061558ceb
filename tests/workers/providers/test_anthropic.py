"""A chat-completions request in Anthropic's words, and its answers in ours."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from tests.workers.providers.asking import PROMPT, PROMPT_TOKENS, Asker
from workers.providers import Delta, ProviderEvent, Reasoning, Signature, ToolCall, Usage
from workers.providers.anthropic import _EVENT, FINISH, _Reading
from workers.providers.anthropic_body import DEFAULT_MAX_TOKENS

USER = {"role": "user", "content": "hi"}
TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Finds.",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    },
}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


async def sent(ask: Asker, **options: Any) -> dict[str, Any]:
    """The body that arrived."""
    heard = await ask("anthropic", "echo", **options)
    assert heard.error is None
    arrived = json.loads(heard.text)
    assert arrived["path"] == "/v1/messages"
    body: dict[str, Any] = arrived["body"]
    return body


async def test_the_least_request(ask: Asker) -> None:
    assert await sent(ask) == {
        "model": "echo",
        "max_tokens": DEFAULT_MAX_TOKENS,
        "stream": True,
        "messages": [{"role": "user", "content": [text(PROMPT)]}],
    }


async def test_a_conversation_with_everything_in_it(ask: Asker) -> None:
    call = {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    bare = {"id": "t2", "type": "function", "function": {"name": "g", "arguments": ""}}
    png = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    web = {"type": "image_url", "image_url": {"url": "https://example.com/a.jpg"}}
    file = {"file_data": "data:application/pdf;base64,BBBB", "filename": "a.pdf"}
    body = await sent(
        ask,
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "one"},
            {"role": "user", "content": [text("two"), text(""), png, web]},
            {"role": "developer", "content": [{**text("be kind"), "cache_control": {"type": "e"}}]},
            {"role": "assistant", "content": "let me see", "tool_calls": [call, bare]},
            {"role": "tool", "tool_call_id": "t1", "content": "42"},
            {"role": "tool", "tool_call_id": "t2", "content": [text("43")]},
            {"role": "user", "content": [{"type": "file", "file": file}]},
            {"role": "assistant", "content": None, "refusal": "no"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "go on"},
        ],
    )
    assert body["system"] == [text("be brief"), {**text("be kind"), "cache_control": {"type": "e"}}]
    assert body["messages"] == [
        {
            "role": "user",
            "content": [
                text("one"),
                text("two"),
                {
                    "type": "image",
                    "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"},
                },
                {"type": "image", "source": {"type": "url", "url": "https://example.com/a.jpg"}},
            ],
        },
        {
            "role": "assistant",
            "content": [
                text("let me see"),
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
                {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [text("42")]},
                {"type": "tool_result", "tool_use_id": "t2", "content": [text("43")]},
                {
                    "type": "document",
                    "source": {"type": "base64", "media_type": "application/pdf", "data": "BBBB"},
                    "title": "a.pdf",
                },
            ],
        },
        {"role": "assistant", "content": [text("no")]},
        {"role": "user", "content": [text("go on")]},
    ]


# Parameters in, what stands in the body for them.
TRANSLATED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_tokens": 9}, {"max_tokens": 9}),
    ({"max_completion_tokens": 9}, {"max_tokens": 9}),
    (
        {"temperature": 0.5, "top_p": 0.9, "top_k": 5},
        {"temperature": 0.5, "top_p": 0.9, "top_k": 5},
    ),
    ({"stop": "x"}, {"stop_sequences": ["x"]}),
    ({"stop": ["x", "y"]}, {"stop_sequences": ["x", "y"]}),
    ({"user": "u"}, {"metadata": {"user_id": "u"}}),
    ({"safety_identifier": "s", "user": "u"}, {"metadata": {"user_id": "s"}}),
    ({"service_tier": "auto"}, {"service_tier": "auto"}),
    ({"service_tier": "default"}, {"service_tier": "standard_only"}),
    ({"reasoning_effort": "high"}, {"output_config": {"effort": "high"}}),
    ({"reasoning_effort": "minimal"}, {"output_config": {"effort": "low"}}),
    ({"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}),
    (
        {"thinking": {"type": "enabled", "budget_tokens": 2000}},
        {
            "thinking": {"type": "enabled", "budget_tokens": 2000},
            "max_tokens": DEFAULT_MAX_TOKENS + 2000,
        },
    ),
    ({"response_format": {"type": "text"}}, {}),
    (
        {
            "reasoning_effort": "low",
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "strict": True, "schema": {"type": "object"}},
            },
        },
        {
            "output_config": {
                "effort": "low",
                "format": {"type": "json_schema", "schema": {"type": "object"}},
            }
        },
    ),
    ({"tool_choice": "none"}, {"tool_choice": {"type": "none"}}),
    ({"tool_choice": "required"}, {"tool_choice": {"type": "any"}}),
    (
        {"tool_choice": {"type": "function", "function": {"name": "search"}}},
        {"tool_choice": {"type": "tool", "name": "search"}},
    ),
    ({"parallel_tool_calls": False}, {}),
    ({"n": 1}, {}),
    ({"extra_body": {"inference_geo": "us", "model": "dear"}}, {"inference_geo": "us"}),
]


@pytest.mark.parametrize(("parameters", "body"), TRANSLATED)
async def test_parameters_are_translated(
    ask: Asker, parameters: dict[str, Any], body: dict[str, Any]
) -> None:
    arrived = await sent(ask, parameters=parameters, messages=[USER])
    assert arrived.pop("messages") == [{"role": "user", "content": [text("hi")]}]
    least = {"model": "echo", "stream": True, "max_tokens": DEFAULT_MAX_TOKENS}
    assert arrived == least | body


async def test_tools_are_translated(ask: Asker) -> None:
    own = {"type": "web_search_20250305", "name": "web_search"}
    parameterless = {"type": "function", "function": {"name": "now", "strict": True}}
    body = await sent(
        ask, parameters={"tools": [TOOL, parameterless, own], "parallel_tool_calls": False}
    )
    assert body["tools"] == [
        {
            "name": "search",
            "description": "Finds.",
            "input_schema": {"type": "object", "properties": {"q": {"type": "string"}}},
        },
        {"name": "now", "input_schema": {"type": "object", "properties": {}}, "strict": True},
        own,
    ]
    assert body["tool_choice"] == {"type": "auto", "disable_parallel_tool_use": True}


UNTRANSLATABLE: list[tuple[dict[str, Any], str]] = [
    ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "input_audio"),
    (
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x,y"}}]},
        "not base64",
    ),
    ({"role": "function", "name": "f", "content": "x"}, "role 'function'"),
    ({"role": "user"}, "role 'user'"),
    (
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{oops"}}],
        },
        "not JSON",
    ),
]


@pytest.mark.parametrize(("message", "why"), UNTRANSLATABLE)
async def test_what_cannot_be_translated_is_named_before_the_call(
    ask: Asker, message: dict[str, Any], why: str
) -> None:
    heard = await ask("anthropic", "echo", messages=[USER, message])
    assert heard.error
    assert heard.error.code == "invalid_request"
    assert "messages[1]" in heard.error.message
    assert why in heard.error.message
    assert ask.fake.entries == []


@pytest.mark.parametrize("stream", [True, False])
async def test_a_whole_answer(ask: Asker, stream: bool) -> None:
    heard = await ask("anthropic", "reasoning-t3-c10", stream=stream)
    assert heard.text == "w0 w1 w2 "
    assert heard.reasoning == "think think think "
    assert heard.usage == Usage(PROMPT_TOKENS + 10, 3, cached_tokens=10)
    assert heard.finish
    assert (heard.finish.reason, heard.finish.model) == ("stop", "reasoning-t3-c10")


@pytest.mark.parametrize("stream", [True, False])
async def test_reasoning_is_signed(ask: Asker, stream: bool) -> None:
    heard = await ask("anthropic", "signed", stream=stream, parameters={"tools": [TOOL]})
    kinds = [*dict.fromkeys(type(event).__name__ for event in heard.events)]
    assert [kind for kind in kinds if kind != "Usage"] == [
        "Reasoning",
        "Signature",
        "ToolCall",
        "Finish",
    ]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_tool_call(ask: Asker, stream: bool) -> None:
    heard = await ask("anthropic", "tools", stream=stream, parameters={"tools": [TOOL]})
    [(call_id, name, arguments)] = heard.tool_calls
    assert (call_id, name, json.loads(arguments)) == ("call_1", "search", {"q": "w0"})
    assert heard.finish
    assert heard.finish.reason == "tool_calls"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("model", "reason"),
    [("length", "length"), ("filter", "content_filter"), ("refusal", "content_filter")],
)
async def test_every_end_is_a_finish(ask: Asker, model: str, reason: str, stream: bool) -> None:
    heard = await ask("anthropic", model, stream=stream)
    assert heard.error is None
    assert heard.finish
    assert heard.finish.reason == reason


async def test_usage_comes_early(ask: Asker) -> None:
    heard = await ask("anthropic", "ok-t3")
    assert heard.events[0] == Usage(PROMPT_TOKENS, 1)


@pytest.mark.parametrize(("model", "code"), [("cutend", "disconnected"), ("nostop", "truncated")])
async def test_a_stop_reason_without_message_stop_is_no_end(
    ask: Asker, model: str, code: str
) -> None:
    heard = await ask("anthropic", model)
    assert heard.error
    assert heard.error.code == code
    assert heard.finish is None


@pytest.mark.parametrize("model", ["ok-t2", "late-t2"])
async def test_connections_are_used_again(ask: Asker, model: str) -> None:
    for _ in range(5):
        assert (await ask("anthropic", model)).finish
    assert ask.fake.connections == 1


def test_the_sdks_stop_reasons_are_all_mapped() -> None:
    from typing import get_args

    from anthropic.types.stop_reason import StopReason

    assert set(get_args(StopReason)) == set(FINISH)


def read(*events: dict[str, Any]) -> tuple[list[ProviderEvent], _Reading]:
    reading = _Reading()
    found: list[ProviderEvent] = []
    for event in events:
        found += reading.events(_EVENT.decode(msgspec.json.encode(event)))
    return found, reading


def start(index: int, **block: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def piece(index: int, **delta: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": delta}


def test_blocks_become_events() -> None:
    stop = {"type": "content_block_stop"}
    found, _ = read(
        start(0, type="thinking", thinking=""),
        piece(0, type="thinking_delta", thinking="hm"),
        piece(0, type="signature_delta", signature="s"),
        start(1, type="server_tool_use", id="srv", name="web_search", input={}),
        piece(1, type="input_json_delta", partial_json='{"q":1}'),
        {**stop, "index": 1},
        start(2, type="text", text="a"),
        piece(2, type="text_delta", text="b"),
        piece(2, type="citations_delta", citation={}),
        start(3, type="tool_use", id="t1", name="f", input={}),
        piece(3, type="input_json_delta", partial_json=""),
        piece(3, type="input_json_delta", partial_json="{}"),
        {**stop, "index": 3},
        start(4, type="tool_use", id="t2", name="g", input={}),
        {**stop, "index": 4},
        {"type": "ping"},
        {"type": "from_the_future", "delta": {"type": "odd"}},
    )
    assert found == [
        Reasoning("hm"),
        Signature("s"),
        Delta("a"),
        Delta("b"),
        ToolCall(0, "t1", "f"),
        ToolCall(0, arguments="{}"),
        ToolCall(1, "t2", "g"),
        ToolCall(1, arguments="{}"),
    ]


def test_usage_counts_cached_tokens_as_input_and_adds_up() -> None:
    counts = {
        "input_tokens": 10,
        "cache_read_input_tokens": 100,
        "cache_creation_input_tokens": 50,
        "output_tokens": 1,
    }
    last = {"output_tokens": 30, "output_tokens_details": {"thinking_tokens": 20}}
    found, reading = read(
        {"type": "message_start", "message": {"model": "m", "usage": counts}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": last},
    )
    assert found == [
        Usage(160, 1, cached_tokens=100, cache_write_tokens=50),
        Usage(160, 30, cached_tokens=100, cache_write_tokens=50, reasoning_tokens=20),
    ]
    assert not reading.stopped
