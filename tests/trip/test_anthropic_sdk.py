"""The official Anthropic SDK, unchanged and strict, over real processes and both upstreams."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from pydantic import BaseModel

from tests.servers import valkey
from tests.trip.stack import Stack

HELLO: Any = [{"role": "user", "content": "Hello?"}]
WEATHER: Any = {
    "name": "weather",
    "description": "Of a town.",
    "input_schema": {"type": "object", "properties": {"q": {"type": "string"}}},
}
IMAGE: Any = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="},
}
both_upstreams = pytest.mark.parametrize("upstream", ["openai", "anthropic"])


class Seen(BaseModel):
    """What the fake provider's `echo` answers with, as far as a test wants it."""

    path: str


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One installation with a worker."""
    with valkey() as server, contextlib.ExitStack() as cleanup:
        made = Stack(tmp_path_factory.mktemp("sdk"), server, "", BACKCHANNEL_MAX_RETRIES="1")
        cleanup.callback(made.close)
        made.api()
        made.worker()
        yield made


@pytest.fixture
def client(stack: Stack) -> Iterator[Anthropic]:
    """The client as a service has it; strict, which services are not."""
    with Anthropic(
        base_url=stack.url, api_key="unused", timeout=60, _strict_response_validation=True
    ) as made:
        yield made


def ask(upstream: str, script: str, **more: Any) -> Any:
    """The arguments of a request."""
    return {"model": f"{upstream}:{script}", "max_tokens": 50, "messages": HELLO} | more


@both_upstreams
def test_a_message_is_answered(client: Anthropic, upstream: str) -> None:
    raw = client.messages.with_raw_response.create(**ask(upstream, "ok-t4-c3", system="Be brief."))
    made = raw.parse()
    assert raw.headers["x-backchannel-job"] == f"job_{made.id.removeprefix('msg_')}"
    assert (made.model, made.stop_reason) == (f"{upstream}:ok-t4-c3", "end_turn")
    assert [block.to_dict() for block in made.content] == [{"type": "text", "text": "w0 w1 w2 w3 "}]
    usage = made.usage
    # without what was cached, as Anthropic counts
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (
        4 if upstream == "openai" else 2,
        3,
    )
    assert usage.output_tokens == 4
    assert "cost_usd" in (usage.model_extra or {})


@both_upstreams
def test_a_message_streams_and_the_helper_puts_it_together(
    client: Anthropic, upstream: str
) -> None:
    with client.messages.stream(**ask(upstream, "reasoning-t5-d5")) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [kind for kind in dict.fromkeys(kinds) if kind not in ("thinking", "text")] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    thinking, text = final.content
    assert (thinking.type, text.type) == ("thinking", "text")
    assert thinking.to_dict()["thinking"] == "think think think "
    assert text.to_dict()["text"] == "w0 w1 w2 w3 w4 "
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 5)
    assert final.usage.input_tokens > 0

    events = [*client.messages.create(**ask(upstream, "ok-t3"), stream=True)]
    assert [event.type for event in events][-1] == "message_stop"


@both_upstreams
def test_tools_are_called_and_their_results_sent_back(client: Anthropic, upstream: str) -> None:
    tooled = {"tools": [WEATHER], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    made = client.messages.create(**ask(upstream, "tools", **tooled))
    assert made.stop_reason == "tool_use"
    [call] = made.content
    assert call.type == "tool_use"
    assert (call.id, call.name, call.input) == ("call_1", "weather", {"q": "w0"})
    with client.messages.stream(**ask(upstream, "tools", **tooled)) as stream:
        assert [block.to_dict() for block in stream.get_final_message().content] == [call.to_dict()]

    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain", "is_error": True}
    turns = [
        *HELLO,
        {"role": "assistant", "content": made.content},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}, IMAGE]},
    ]
    echoed = client.messages.create(**ask(upstream, "echo", messages=turns, **tooled))
    sent = json.loads(echoed.content[0].to_dict()["text"])["body"]  # type: ignore[arg-type]
    roles = [message["role"] for message in sent["messages"]]
    assert roles[:2] == ["user", "assistant"]
    told = json.dumps(sent)
    for word in ("call_1", "Error: rain", "And?", "iVBORw0KGgo=", "Of a town."):
        assert word in told


def test_signed_thinking_comes_back_to_its_provider_as_it_was(client: Anthropic) -> None:
    thinking: Any = {"thinking": {"type": "enabled", "budget_tokens": 20}, "tools": [WEATHER]}
    made = client.messages.create(**ask("anthropic", "signed", **thinking))
    thought = {"type": "thinking", "thinking": "think think think ", "signature": "sealed"}
    assert made.content[0].to_dict() == thought
    with client.messages.stream(**ask("anthropic", "signed", **thinking)) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_message().content == made.content
    assert "signature" in kinds
    assert made.content[1].type == "tool_use"

    result = {"type": "tool_result", "tool_use_id": made.content[1].id, "content": "rain"}
    redacted = {"type": "redacted_thinking", "data": "xyz"}
    turns = [
        *HELLO,
        {"role": "assistant", "content": [redacted, *made.content]},
        {"role": "user", "content": [result]},
    ]
    for upstream, expected in (("anthropic", [redacted, thought]), ("openai", [])):
        tools = {"tools": [WEATHER]}
        echoed = client.messages.create(**ask(upstream, "echo", messages=turns, **tools))
        text: Any = echoed.content[0].to_dict()["text"]
        said = json.loads(text)["body"]["messages"]
        assert "thinking_blocks" not in said[1]
        assert [each for each in said[1]["content"] or () if "thinking" in each["type"]] == expected


def test_tokens_are_counted_before_they_are_spent(client: Anthropic, stack: Stack) -> None:
    before = len(stack.calls())
    count = client.messages.count_tokens
    short = count(model="anthropic:ok", messages=HELLO).input_tokens
    assert short == 1 + 4
    asked: Any = {"model": "echo", "messages": [*HELLO, *HELLO], "system": "Be brief. " * 40}
    long = count(**asked).input_tokens
    assert long > short + 100
    assert count(**asked, tools=[WEATHER]).input_tokens > long
    with pytest.raises(anthropic.BadRequestError) as error:
        count(model="groq:x", messages=HELLO)
    body: Any = error.value.body
    assert (body["error"]["type"], body["error"]["param"]) == ("invalid_request_error", "model")
    assert len(stack.calls()) == before


@pytest.mark.parametrize("version", ["2023-01-01", "2023-06-01", "tomorrow", None])
def test_any_version_of_the_api_is_taken(client: Anthropic, version: str | None) -> None:
    headers: Any = {"anthropic-version": version or anthropic.Omit(), "anthropic-beta": "new-thing"}
    made = client.messages.create(**ask("openai", "ok-t1"), extra_headers=headers)
    assert made.stop_reason == "end_turn"
    assert client.beta.messages.create(**ask("openai", "ok-t1")).stop_reason == "end_turn"


@both_upstreams
def test_a_schema_a_stop_and_a_user_reach_the_provider(client: Anthropic, upstream: str) -> None:
    made = client.messages.parse(
        **ask(upstream, "echo", stop_sequences=["END"], metadata={"user_id": "me"}),
        output_format=Seen,
    )
    assert made.parsed_output is not None
    assert made.parsed_output.path.startswith("/v1/")
    told = json.dumps(json.loads(made.content[0].to_dict()["text"])["body"])  # type: ignore[arg-type]
    assert all(word in told for word in ('"path"', '"END"', '"me"'))


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"extra_body": {"no_such": 1}}, "no_such"),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        ({"messages": []}, "messages"),
        ({"model": "groq:x"}, "model"),
        ({"tool_choice": {"type": "x"}}, "tool_choice"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    client: Anthropic, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as error:
        client.messages.create(**ask("openai", "ok") | options)
    body: Any = error.value.body
    assert body["type"] == "error"
    assert (body["error"]["type"], body["error"]["param"]) == ("invalid_request_error", param)


@both_upstreams
def test_thinking_goes_to_those_who_know_it(client: Anthropic, upstream: str) -> None:
    asked = ask(upstream, "echo", output_config={"effort": "low"})
    made = client.messages.create(**asked)
    assert '"low"' in str(made.content[0].to_dict()["text"])


def test_a_failed_job_is_an_error_in_anthropics_form_and_not_sent_again(
    stack: Stack, client: Anthropic
) -> None:
    before = len(stack.calls())
    with pytest.raises(anthropic.InternalServerError) as error:
        client.messages.create(**ask("openai", "badjson-0"))
    body: Any = error.value.body
    assert (body["error"]["type"], body["error"]["code"]) == ("api_error", "malformed")
    assert len(stack.calls()) - before == 2  # the queue's own two attempts

    with (
        pytest.raises(anthropic.APIStatusError) as broken,
        client.messages.stream(**ask("openai", "context")) as stream,
    ):
        stream.until_done()
    streamed: Any = broken.value.body
    assert streamed["error"]["type"] == "invalid_request_error"


def test_a_message_cut_by_the_cap_says_so(client: Anthropic) -> None:
    assert client.messages.create(**ask("openai", "length")).stop_reason == "max_tokens"


def test_a_stream_never_mixes_two_attempts(stack: Stack, client: Anthropic) -> None:
    with client.messages.stream(**ask("openai", "ok-t40-d50")) as stream:
        begun = [text for _, text in zip(range(5), stream.text_stream, strict=False)]
        os.kill(stack.processes[-1].pid, signal.SIGKILL)
        stack.worker()
        with pytest.raises(anthropic.APIStatusError) as error:
            begun.extend(stream.text_stream)
    body: Any = error.value.body
    assert body["error"]["code"] == "attempt_restarted"
    assert "".join(f"w{n} " for n in range(40)).startswith("".join(begun))
