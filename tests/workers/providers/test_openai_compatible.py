"""What goes to a compatible server, and what its answers become."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import msgspec
import pytest

from tests.workers.providers.asking import PROMPT, PROMPT_TOKENS, Asker
from workers.providers import ProviderEvent, ToolCall, Usage, wire
from workers.providers.openai_compatible import _CHUNK, _Reading

TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}


async def sent(ask: Asker, flavour: str = "openai", **options: Any) -> dict[str, Any]:
    """The body that arrived."""
    heard = await ask(flavour, "echo", **options)
    assert heard.error is None
    body: dict[str, Any] = json.loads(heard.text)["body"]
    return body


async def test_messages_go_untouched(ask: Asker) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "be brief", "name": "d"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "ü 🙂 \u2028"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                {"type": "odd", "future": {"field": None}},
            ],
        },
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "unknown": True}]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    assert (await sent(ask, messages=messages))["messages"] == messages


async def test_parameters_go_through(ask: Asker) -> None:
    parameters = {
        "temperature": 0.1,
        "seed": 7,
        "tools": [TOOL],
        "tool_choice": "auto",
        "response_format": {"type": "json_object"},
        "stop": ["a"],
        "top_k": 3,
        "n": 1,
        "extra_body": {"mirostat": 1, "temperature": 0.2},
    }
    body = await sent(ask, parameters=parameters)
    del body["messages"]
    assert body == {
        "model": "echo",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.2,
        "seed": 7,
        "tools": [TOOL],
        "tool_choice": "auto",
        "response_format": {"type": "json_object"},
        "stop": ["a"],
        "top_k": 3,
        "mirostat": 1,
    }


@pytest.mark.parametrize("given", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_the_cap_has_the_servers_name(ask: Asker, given: str, field: str) -> None:
    body = await sent(ask, parameters={given: 9}, max_tokens_field=field)
    assert {name: body[name] for name in body if name.startswith("max")} == {field: 9}


async def test_usage_is_asked_for_where_the_server_knows_it(ask: Asker) -> None:
    assert "stream_options" not in await sent(ask, reports_stream_usage=False)
    assert "stream_options" not in await sent(ask, stream=False)


async def test_extra_body_changes_nothing_the_books_depend_on(ask: Asker) -> None:
    extra = {"model": "dear", "messages": [], "stream": False, "stream_options": {}, "n": 9}
    body = await sent(ask, parameters={"extra_body": extra})
    assert (body["model"], body["stream"], len(body["messages"])) == ("echo", True, 1)
    assert body["stream_options"] == {"include_usage": True}
    assert "n" not in body


async def test_what_another_provider_thought_is_not_sent_on(ask: Asker) -> None:
    plain = {"role": "assistant", "content": "Yes."}
    thoughts = {"reasoning": "Hm.", "thinking_blocks": [{"type": "thinking", "thinking": "Hm."}]}
    again = {"role": "user", "content": "Sure?"}
    body = await sent(ask, messages=[plain | thoughts, again])
    assert body["messages"] == [plain, again]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("flavour", ["openai", "ollama"])
async def test_a_whole_answer(ask: Asker, flavour: str, stream: bool) -> None:
    heard = await ask(flavour, "reasoning-t3-c10", stream=stream)
    assert heard.text == "w0 w1 w2 "
    assert heard.reasoning == "think think think "
    assert heard.usage == Usage(PROMPT_TOKENS + 10, 3, cached_tokens=10)
    assert heard.finish
    assert heard.finish.model == "reasoning-t3-c10"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("model", "reason", "text"),
    [
        ("length-t1", "length", "w0 "),
        ("filter", "content_filter", ""),
        ("refusal-t0", "content_filter", "no"),
        ("tools", "tool_calls", ""),
        ("ok-t0", "stop", ""),
    ],
)
async def test_every_end_is_a_finish(
    ask: Asker, model: str, reason: str, text: str, stream: bool
) -> None:
    heard = await ask("openai", model, stream=stream)
    assert heard.error is None
    assert heard.finish
    assert (heard.finish.reason, heard.text) == (reason, text)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_tool_call(ask: Asker, stream: bool) -> None:
    heard = await ask("openai", "tools", stream=stream, parameters={"tools": [TOOL]})
    assert heard.tool_calls == [("call_1", "search", '{"q": "w0"}')]


async def test_done_without_a_reason_is_an_end_where_there_was_content(ask: Asker) -> None:
    heard = await ask("openai", "done-t2")
    assert heard.finish
    assert (heard.finish.reason, heard.text) == ("stop", "w0 w1 ")
    assert heard.usage == Usage(PROMPT_TOKENS, 2)


async def test_a_server_that_never_closes_cannot_hold_a_whole_answer(
    ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "TAIL_S", 0.2)
    started = time.monotonic()
    heard = await ask("openai", "nodone-t2")
    assert heard.error is None
    assert heard.finish
    assert heard.text == "w0 w1 "
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("model", ["cutend-t2", "nostop-t2"])
async def test_a_connection_that_breaks_after_the_finish_reason_takes_nothing_back(
    ask: Asker, model: str
) -> None:
    heard = await ask("openai", model)
    assert heard.error is None
    assert heard.finish
    assert heard.text == "w0 w1 "


@pytest.mark.parametrize("model", ["ok-t2", "late-t2"])
async def test_connections_are_used_again(ask: Asker, model: str) -> None:
    for _ in range(5):
        assert (await ask("openai", model)).finish
    assert ask.fake.connections == 1


async def test_the_cap_of_an_answer_counts_bytes(ask: Asker) -> None:
    assert (await ask("openai", "utf8-t10", answer_cap=90)).finish  # "ü0 🙂 " has 9 bytes
    heard = await ask("openai", "utf8-t11", answer_cap=90)
    assert heard.error
    assert heard.error.code == "answer_too_large"


async def test_a_thousand_streams_at_once(ask: Asker) -> None:
    models = [f"ok-t4-d{1 + number % 50}-f300" for number in range(1000)]
    all_heard = await asyncio.gather(*(ask("openai", model) for model in models))
    assert {heard.text for heard in all_heard} == {"w0 w1 w2 w3 "}
    assert all(heard.finish for heard in all_heard)


def read(*messages: dict[str, Any]) -> tuple[list[ProviderEvent], _Reading]:
    reading = _Reading()
    events: list[ProviderEvent] = []
    for message in messages:
        events += reading.events(_CHUNK.decode(msgspec.json.encode(message)))
    return events, reading


@pytest.mark.parametrize(
    ("finish_reason", "reason"),
    [
        ("stop", "stop"),
        ("function_call", "tool_calls"),
        ("max_tokens", "length"),
        ("SAFETY", "content_filter"),
        ("eos_token", "stop"),
    ],
)
def test_finish_reasons_of_other_servers(finish_reason: str, reason: str) -> None:
    _, reading = read({"choices": [{"delta": {}, "finish_reason": finish_reason}]})
    assert reading.finish_reason
    assert reading.reason() == reason


USAGES: list[tuple[dict[str, Any], Usage]] = [
    ({"usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}}, Usage(5, 2)),
    ({"x_groq": {"usage": {"prompt_tokens": 5, "completion_tokens": 2}}}, Usage(5, 2)),
    (  # Gemini and xAI: reasoning only in the total
        {"usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 107}},
        Usage(5, 102),
    ),
    (
        {
            "usage": {
                "prompt_tokens": 5,
                "completion_tokens": 4,
                "prompt_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 1},
                "completion_tokens_details": {"reasoning_tokens": 2, "audio_tokens": None},
            }
        },
        Usage(5, 4, cached_tokens=3, cache_write_tokens=1, reasoning_tokens=2),
    ),
]


@pytest.mark.parametrize(("message", "usage"), USAGES)
def test_usage_in_every_form(message: dict[str, Any], usage: Usage) -> None:
    assert read({"choices": [], **message})[0] == [usage]
    assert read({"choices": None, **message})[0] == [usage]


def test_usage_that_repeats_is_said_once() -> None:
    chunk = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
    more = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}
    assert read(chunk, chunk, more)[0] == [Usage(5, 2), Usage(5, 3)]


def test_tool_calls_without_an_index_are_told_apart_by_id() -> None:
    def chunk(**call: Any) -> dict[str, Any]:
        return {"choices": [{"delta": {"tool_calls": [call]}}]}

    events, _ = read(
        chunk(id="a", function={"name": "f", "arguments": "{"}),
        chunk(function={"arguments": "}"}),
        chunk(id="b", function={"name": "g", "arguments": "{}"}),
    )
    assert events == [
        ToolCall(0, "a", "f", "{"),
        ToolCall(0, None, None, "}"),
        ToolCall(1, "b", "g", "{}"),
    ]


def test_the_prompt_estimate_of_the_fake() -> None:
    assert -(-len(PROMPT.encode()) // 4) == PROMPT_TOKENS
