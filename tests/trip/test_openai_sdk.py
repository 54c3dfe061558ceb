"""The official OpenAI SDK, unchanged and strict, over real processes and both types of upstream."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from tests.servers import valkey
from tests.trip.stack import Stack

UPSTREAMS = ("openai", "anthropic")
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello?"}]
IMAGE = "data:image/png;base64,iVBORw0KGgo="
both_upstreams = pytest.mark.parametrize("upstream", UPSTREAMS)
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"q": {"type": "string"}},
    "required": ["q"],
    "additionalProperties": False,
}


class Seen(BaseModel):
    """What the fake provider's `echo` answers with, as far as a test wants it."""

    path: str


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One installation with two API processes and a worker."""
    with valkey() as server, contextlib.ExitStack() as cleanup:
        made = Stack(tmp_path_factory.mktemp("sdk"), server, "", BACKCHANNEL_MAX_RETRIES="1")
        cleanup.callback(made.close)
        made.api()
        made.worker()
        yield made


@pytest.fixture(scope="module")
def other_url(stack: Stack) -> str:
    """A second API process of the same installation."""
    return stack.api()


def sdk(url: str, **options: Any) -> OpenAI:
    """The client as a service has it; strict, which services are not."""
    return OpenAI(
        base_url=f"{url}/v1",
        api_key="unused",
        timeout=60,
        _strict_response_validation=True,
        **options,
    )


@pytest.fixture
def client(stack: Stack) -> Iterator[OpenAI]:
    with sdk(stack.url) as made:
        yield made


def kill_a_worker_in_the_middle(stack: Stack) -> None:
    """kill -9 the only worker, and start another."""
    [worker] = [each for each in stack.processes if each.poll() is None and _runs(each, "worker")]
    os.kill(worker.pid, signal.SIGKILL)
    stack.worker()


def _runs(process: Any, what: str) -> bool:
    with open(f"/proc/{process.pid}/cmdline", "rb") as line:
        return what.encode() in line.read().split(b"\0")


# ---------------------------------------------------------------- models


def test_models_are_listed_and_fetched_by_their_full_names(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert {"openai:gpt-5-mini", "anthropic:claude-haiku-4-5", "echo:echo-1", "fast"} <= {*names}
    assert not any(name.startswith("groq") for name in names)  # no key
    assert client.models.retrieve("anthropic:claude-haiku-4-5").owned_by == "anthropic"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("groq:openai/gpt-oss-120b")
    assert error.value.code == "model_not_found"


# ---------------------------------------------------------------- chat completions


@both_upstreams
def test_a_chat_is_answered_stored_listed_and_deleted(client: OpenAI, upstream: str) -> None:
    model = f"{upstream}:ok-t4-c3"
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=HELLO, metadata={"for": upstream}, store=True, max_tokens=20
    )
    made = raw.parse()
    assert raw.headers["x-backchannel-job"] == f"job_{made.id.removeprefix('chatcmpl-')}"
    assert (made.model, made.choices[0].message.content) == (model, "w0 w1 w2 w3 ")
    assert made.choices[0].finish_reason == "stop"
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (5, 4)
    assert made.usage.prompt_tokens_details is not None
    assert made.usage.prompt_tokens_details.cached_tokens == 3
    assert made.usage.model_extra is not None
    assert "cost_usd" in made.usage.model_extra

    assert client.chat.completions.retrieve(made.id) == made
    pages = client.chat.completions.list(metadata={"for": upstream}, limit=1)
    assert [each.id for each in pages] == [made.id]
    changed = client.chat.completions.update(made.id, metadata={"for": "somebody"})
    assert changed.metadata == {"for": "somebody"}
    assert [*client.chat.completions.list(metadata={"for": upstream})] == []

    assert client.chat.completions.delete(made.id).deleted
    for gone in (client.chat.completions.retrieve, client.chat.completions.delete):
        with pytest.raises(openai.NotFoundError):
            gone(made.id)


def test_the_messages_of_a_chat_are_given_back(client: OpenAI) -> None:
    asked: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
    ]
    made = client.chat.completions.create(model="echo", messages=asked)
    # the SDK's own type knows no role but the assistant's here
    lenient = OpenAI(base_url=client.base_url, api_key="unused")
    said = [*lenient.chat.completions.messages.list(made.id, limit=1)]
    assert [(each.role, each.content) for each in said] == [
        ("system", "Be brief."),
        ("user", "Hello?"),
    ]


@both_upstreams
def test_a_chat_streams_with_usage_at_the_end(client: OpenAI, upstream: str) -> None:
    chunks = [
        *client.chat.completions.create(
            model=f"{upstream}:ok-t6-d5",
            messages=HELLO,
            stream=True,
            stream_options={"include_usage": True},
        )
    ]
    *said, usage = chunks
    assert "".join(each.choices[0].delta.content or "" for each in said) == "w0 w1 w2 w3 w4 w5 "
    assert said[0].choices[0].delta.role == "assistant"
    assert [each.choices[0].finish_reason for each in said][-1] == "stop"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 6
    assert len({each.id for each in chunks}) == 1
    stored = client.chat.completions.retrieve(usage.id)
    assert stored.choices[0].message.content == "w0 w1 w2 w3 w4 w5 "


@both_upstreams
def test_the_stream_helper_gives_the_whole_answer(client: OpenAI, upstream: str) -> None:
    with client.chat.completions.stream(model=f"{upstream}:reasoning-t3", messages=HELLO) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    message = final.choices[0].message
    assert message.content == "w0 w1 w2 "
    assert message.model_extra is not None
    assert message.model_extra["reasoning_content"] == "think think think "


@both_upstreams
def test_tools_are_called_and_their_results_sent_back(client: OpenAI, upstream: str) -> None:
    tools: Any = [
        {
            "type": "function",
            "function": {"name": "weather", "parameters": WEATHER, "strict": True},
        }
    ]
    made = client.chat.completions.create(
        model=f"{upstream}:tools", messages=HELLO, tools=tools, tool_choice="required"
    )
    [choice] = made.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert (call.id, call.function.name) == ("call_1", "weather")
    assert json.loads(call.function.arguments) == {"q": "w0"}

    with client.chat.completions.stream(
        model=f"{upstream}:tools", messages=HELLO, tools=tools
    ) as stream:
        stream.until_done()
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.tool_calls is not None
    assert streamed.tool_calls[0].function.parsed_arguments == {"q": "w0"}

    result: ChatCompletionMessageParam = {
        "role": "tool",
        "tool_call_id": call.id,
        "content": "rain",
    }
    for answer in (choice.message, streamed):
        messages: Any = [*HELLO, answer, result]
        echoed = client.chat.completions.create(
            model=f"{upstream}:echo", messages=messages, tools=tools
        )
        assert "rain" in (echoed.choices[0].message.content or "")


@both_upstreams
def test_images_and_schemas_reach_the_provider(client: OpenAI, upstream: str) -> None:
    parts: Any = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": IMAGE}},
    ]
    made = client.chat.completions.parse(
        model=f"{upstream}:echo",
        messages=[{"role": "user", "content": parts}],
        response_format=Seen,
    )
    message = made.choices[0].message
    assert message.parsed is not None
    assert message.parsed.path.startswith("/v1/")
    sent = json.loads(message.content or "")["body"]
    assert "iVBORw0KGgo=" in json.dumps(sent["messages"])
    assert '"path"' in json.dumps(sent.get("response_format") or sent["output_config"])
    with client.chat.completions.stream(
        model=f"{upstream}:echo", messages=HELLO, response_format=Seen
    ) as stream:
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert parsed == message.parsed


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"extra_body": {"no_such": 1}}, "no_such", "unsupported_parameter"),
        ({"model": "anthropic:ok", "seed": 1}, "seed", "unsupported_parameter"),
        ({"model": "groq:x"}, "model", "provider_key_missing"),
        ({"messages": []}, "messages", "invalid_request"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_request"),
        ({"messages": [{"role": "u"}]}, "messages[0].role", "invalid_request"),
        ({"extra_body": {"x_backchannel": {"lane": "x"}}}, "x_backchannel.lane", "invalid_request"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    client: OpenAI, options: dict[str, Any], param: str, code: str
) -> None:
    usual = {"model": "openai:ok", "messages": HELLO}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**usual | options)
    assert (error.value.param, error.value.code) == (param, code)


@pytest.mark.parametrize(
    ("script", "kind", "code"),
    [
        ("context", openai.BadRequestError, "context_length_exceeded"),
        ("status-401", openai.AuthenticationError, "auth"),
        ("badjson-0", openai.InternalServerError, "malformed"),
    ],
)
def test_a_failed_job_is_an_error_and_never_sent_again_by_the_sdk(
    stack: Stack, client: OpenAI, script: str, kind: type[openai.APIStatusError], code: str
) -> None:
    before = len(stack.calls())
    with pytest.raises(kind) as error:
        client.chat.completions.create(model=f"openai:{script}", messages=HELLO)
    assert error.value.code == code
    job = stack.job(error.value.response.headers["x-backchannel-job"])
    assert job["state"] == "failed"
    # the queue's own attempts, and no second job
    assert len(stack.calls()) - before == job["attempt"]

    with (
        pytest.raises(openai.APIError) as broken,
        client.chat.completions.create(
            model=f"openai:{script}", messages=HELLO, stream=True
        ) as stream,
    ):
        list(stream)
    assert broken.value.code == code


def test_the_same_key_gives_the_same_completion(client: OpenAI) -> None:
    key = {"Idempotency-Key": "once"}
    asked: Any = {"model": "openai:ok", "messages": HELLO, "extra_headers": key}
    first = client.chat.completions.create(**asked)
    assert client.chat.completions.create(**asked) == first
    with pytest.raises(openai.ConflictError) as error:
        client.chat.completions.create(**asked | {"temperature": 0})
    assert error.value.code == "idempotency_mismatch"


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("cancels", [False, True])
def test_hanging_up_cancels_only_if_asked_to(stack: Stack, streams: bool, cancels: bool) -> None:
    headers = {"x-backchannel-cancel-on-disconnect": "true"} if cancels else {}
    prompt = f"{streams} {cancels}"
    with sdk(stack.url, max_retries=0) as client, contextlib.suppress(openai.APITimeoutError):
        made = client.chat.completions.create(
            model="openai:ok-t30-d50",
            messages=[{"role": "user", "content": prompt}],
            stream=streams,
            extra_headers=headers,
            timeout=0.7,
        )
        for _ in zip(made, range(5), strict=False):
            pass
        made.close()
    [job] = httpx2.get(f"{stack.url}/v1/jobs?limit=1").json()["data"]
    assert stack.finished(job["id"])["state"] == ("cancelled" if cancels else "succeeded")


def test_a_cancelled_chat_says_so(stack: Stack, client: OpenAI) -> None:
    stream = client.chat.completions.create(model="openai:ok-t90-d50", messages=HELLO, stream=True)
    first = next(stream)
    httpx2.post(f"{stack.url}/v1/jobs/job_{first.id.removeprefix('chatcmpl-')}/cancel")
    with pytest.raises(openai.APIError) as error:
        list(stream)
    assert error.value.code == "cancelled"
    with pytest.raises(openai.ConflictError) as stored:
        client.chat.completions.retrieve(first.id)
    assert stored.value.code == "cancelled"


def test_a_chat_may_be_a_turn_of_a_session_and_wait_in_the_batch_lane(
    stack: Stack, client: OpenAI
) -> None:
    session = httpx2.post(f"{stack.url}/v1/sessions", json={"model": "openai:echo"}).json()["id"]
    ours = {"x_backchannel": {"session": session, "lane": "batch", "deadline_s": 60}}
    for _ in range(2):
        made = client.chat.completions.create(model="openai:echo", messages=HELLO, extra_body=ours)
    asked = json.loads(made.choices[0].message.content or "")["body"]["messages"]
    assert [message["role"] for message in asked] == ["user", "assistant", "user"]
    job = stack.job(f"job_{made.id.removeprefix('chatcmpl-')}")
    assert (job["session"], job["lane"]) == (session, "batch")


# ---------------------------------------------------------------- responses

ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def bytes_of(url: str, response_id: str, after: int | None = None) -> bytes:
    """A response's stream as it crosses HTTP, without the comments that keep it open."""
    query = "?stream=true" if after is None else f"?stream=true&starting_after={after}"
    answer = httpx2.get(f"{url}/v1/responses/{response_id}{query}", timeout=60)
    return answer.content.replace(b": ping\n", b"")


@both_upstreams
def test_a_response_is_made_fetched_and_deleted(client: OpenAI, upstream: str) -> None:
    raw = client.responses.with_raw_response.create(
        model=f"{upstream}:ok-t4-c3",
        input="Hello?",
        instructions="Be brief.",
        metadata={"for": upstream},
        max_output_tokens=50,
    )
    made = raw.parse()
    assert raw.headers["x-backchannel-job"] == f"job_{made.id.removeprefix('resp_')}"
    assert (made.status, made.output_text) == ("completed", "w0 w1 w2 w3 ")
    assert (made.instructions, made.metadata) == ("Be brief.", {"for": upstream})
    assert made.usage is not None
    assert made.usage.output_tokens == 4
    assert made.usage.input_tokens_details.cached_tokens == 3
    assert client.responses.retrieve(made.id) == made
    [item] = client.responses.input_items.list(made.id)
    assert item.type == "message"
    assert (item.role, item.content[0].to_dict()["text"]) == ("user", "Hello?")
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


@both_upstreams
def test_a_response_streams_in_order_and_replays_to_the_byte(
    stack: Stack, other_url: str, client: OpenAI, upstream: str
) -> None:
    live = [
        *client.responses.create(model=f"{upstream}:reasoning-t8-d5", input="Hello?", stream=True)
    ]
    assert [each.sequence_number for each in live] == [*range(len(live))]
    # the reasoning is item 0
    kinds = [each.type for each in live if getattr(each, "output_index", 1) == 1]
    assert [*dict.fromkeys(kinds)] == ORDER
    last: Any = live[-1]
    assert [item.type for item in last.response.output] == ["reasoning", "message"]
    assert last.response.output_text == "".join(f"w{n} " for n in range(8))
    response_id = last.response.id
    assert client.responses.retrieve(response_id) == last.response

    again = [*client.responses.retrieve(response_id, stream=True)]
    assert again == live
    rest = [*client.responses.retrieve(response_id, stream=True, starting_after=5)]
    assert rest == live[6:]
    whole, tail = bytes_of(stack.url, response_id), bytes_of(stack.url, response_id, 5)
    assert whole.endswith(tail)
    assert stack.valkey.say("FLUSHALL") == "+OK\r\n"
    assert bytes_of(other_url, response_id) == whole
    assert bytes_of(other_url, response_id, 5) == tail
    assert bytes_of(other_url, response_id, len(live) - 1) == b""


def test_a_running_response_is_resumed_through_another_api(
    stack: Stack, other_url: str, client: OpenAI
) -> None:
    got = []
    with client.responses.create(
        model="openai:ok-t40-d30", input="Hello?", stream=True, background=True
    ) as stream:
        for event in stream:
            got.append(event)
            if len(got) == 8:
                break
    created: Any = got[0]
    with sdk(other_url) as other:
        resumed = other.responses.retrieve(
            created.response.id, stream=True, starting_after=got[-1].sequence_number
        )
        rest = [*resumed]
    assert got + rest == [*client.responses.retrieve(created.response.id, stream=True)]


@both_upstreams
def test_the_response_helpers_stream_and_parse(client: OpenAI, upstream: str) -> None:
    with client.responses.stream(model=f"{upstream}:ok-t5", input="Hello?") as stream:
        text = "".join(each.delta for each in stream if each.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == "w0 w1 w2 w3 w4 "
    with client.responses.stream(response_id=final.id) as replay:
        assert replay.get_final_response().output_text == text

    parsed = client.responses.parse(
        model=f"{upstream}:echo", input="Hello?", text_format=Seen, reasoning={"effort": "low"}
    )
    assert parsed.output_parsed is not None
    assert parsed.output_parsed.path.startswith("/v1/")
    sent = json.loads(parsed.output_text)["body"]
    assert '"low"' in json.dumps(sent)
    assert '"path"' in json.dumps(sent.get("response_format") or sent["output_config"])
    with client.responses.stream(
        model=f"{upstream}:echo", input="Hello?", text_format=Seen
    ) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed


@both_upstreams
def test_function_tools_and_images_cross_both_ways(client: OpenAI, upstream: str) -> None:
    tools: Any = [{"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}]
    with client.responses.stream(
        model=f"{upstream}:tools", input="Hello?", tools=tools, tool_choice="required"
    ) as stream:
        kinds = [event.type for event in stream]
        made = stream.get_final_response()
    assert kinds.count("response.function_call_arguments.delta") == 2
    assert "response.function_call_arguments.done" in kinds
    [call] = made.output
    assert call.type == "function_call"
    assert (call.call_id, call.name, call.parsed_arguments) == ("call_1", "weather", {"q": "w0"})

    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    followed = client.responses.create(
        model=f"{upstream}:echo", input=[result], previous_response_id=made.id, tools=tools
    )
    picture: Any = [
        {"role": "user", "content": [
            {"type": "input_text", "text": "Hello?"},
            {"type": "input_image", "image_url": IMAGE},
        ]},
    ]  # fmt: skip
    sent_back = client.responses.create(
        model=f"{upstream}:echo",
        input=[*picture, *(item.to_dict() for item in made.output), result],
        tools=tools,
        store=False,
    )
    for answer in (followed, sent_back):
        asked = json.loads(answer.output_text)["body"]["messages"]
        assert [each["role"] for each in asked][:2] == ["user", "assistant"]
        assert "call_1" in json.dumps(asked[1])
        assert "rain" in json.dumps(asked[2])
    assert "iVBORw0KGgo=" in sent_back.output_text
    items = [*client.responses.input_items.list(sent_back.id, order="asc", limit=2)]
    assert [item.type for item in items] == ["message", "function_call", "function_call_output"]


def roles(answer: Any) -> list[str]:
    """Who said something to the fake provider, which echoed what it was sent."""
    return [each["role"] for each in json.loads(answer.output_text)["body"]["messages"]]


def test_responses_follow_one_another_and_branch(client: OpenAI) -> None:
    ask: Any = {"model": "openai:echo"}
    first = client.responses.create(**ask, input="one", instructions="Only here.")
    assert roles(first) == ["system", "user"]
    # behind one that still runs: it waits
    slow = client.responses.create(
        model="openai:ok-t10-d50", input="two", previous_response_id=first.id, background=True
    )
    third = client.responses.create(**ask, input="three", previous_response_id=slow.id)
    assert roles(third) == ["user", "assistant"] * 2 + ["user"]
    assert client.responses.retrieve(slow.id).status == "completed"
    branch = client.responses.create(**ask, input="other", previous_response_id=first.id)
    assert roles(branch) == ["user", "assistant", "user"]
    deeper = client.responses.create(**ask, input="more", previous_response_id=branch.id)
    assert roles(deeper) == ["user", "assistant"] * 2 + ["user"]
    sessions = [each.to_dict()["x_backchannel"] for each in (first, slow, third, branch, deeper)]
    assert len({each["session"] for each in sessions}) == 2  # type: ignore[index]

    unkept = client.responses.create(**ask, input="one", store=False)
    for missing in (unkept.id, "resp_0"):
        with pytest.raises(openai.NotFoundError) as error:
            client.responses.create(**ask, input="two", previous_response_id=missing)
        assert error.value.code == "previous_response_not_found"


def test_two_at_once_behind_one_response_do_not_share_its_session(
    stack: Stack, client: OpenAI
) -> None:
    first = client.responses.create(model="openai:ok-t2", input="one")
    made = [
        client.responses.create(
            model="openai:echo", input="two", previous_response_id=first.id, background=True
        )
        for _ in range(2)
    ]
    for each in made:
        stack.finished(f"job_{each.id.removeprefix('resp_')}")
        assert roles(client.responses.retrieve(each.id)) == ["user", "assistant", "user"]


def test_a_background_response_is_cancelled(client: OpenAI) -> None:
    made = client.responses.create(model="openai:ok-t90-d50", input="Hello?", background=True)
    assert made.status == "queued"
    for event in client.responses.retrieve(made.id, stream=True):
        if event.type == "response.output_text.delta":
            break
    assert client.responses.cancel(made.id).status == "cancelled"
    last: Any = [*client.responses.retrieve(made.id, stream=True)][-1]
    assert (last.type, last.response.status) == ("response.incomplete", "cancelled")
    assert client.responses.cancel(made.id) == last.response


@both_upstreams
def test_responses_end_as_they_did(client: OpenAI, upstream: str) -> None:
    cut = client.responses.create(model=f"{upstream}:length", input="Hello?")
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model=f"{upstream}:context", input="Hello?")
    assert error.value.code == "context_length_exceeded"
    failed: Any = [
        *client.responses.create(model=f"{upstream}:context", input="Hello?", stream=True)
    ][-1]
    assert (failed.type, failed.response.error.code) == ("response.failed", "invalid_prompt")
    assert client.responses.retrieve(failed.response.id) == failed.response


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"conversation": "c"}, "conversation"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call"}]}, "input[0]"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"model": "anthropic:ok", "text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"model": "anthropic:ok", "reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"max_output_tokens": "9"}, "max_output_tokens"),
    ],
)
def test_what_a_response_cannot_honour_is_refused_by_name(
    client: OpenAI, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(**{"model": "openai:ok", "input": "Hello?"} | options)
    assert error.value.param == param


def test_a_worker_dies_in_the_middle_of_both_kinds_of_streams(stack: Stack, client: OpenAI) -> None:
    whole = "".join(f"w{n} " for n in range(40))
    asked: Any = {"model": "openai:ok-t40-d50"}
    with (
        client.responses.stream(**asked, input="Hello?") as helper,
        client.chat.completions.create(**asked, messages=HELLO, stream=True) as chat,
    ):
        begun = [next(chat) for _ in range(5)]
        indexes = []
        for event in helper:
            if event.type == "response.output_text.delta":
                indexes.append(event.output_index)
                if len(indexes) == 5:
                    kill_a_worker_in_the_middle(stack)
        final = helper.get_final_response()
        # a chat's chunks cannot be taken back: it breaks off rather than mix two attempts
        with pytest.raises(openai.APIError) as error:
            begun.extend(chat)
    assert error.value.code == "attempt_restarted"
    assert whole.startswith("".join(each.choices[0].delta.content or "" for each in begun))
    answer = client.chat.completions.retrieve(begun[0].id).choices[0].message
    assert answer.content == whole

    # exactly the second attempt
    assert final.output_text == whole
    assert {*indexes} == {0, 1}
    replayed = [*client.responses.retrieve(final.id, stream=True)]
    done = [each.item for each in replayed if each.type == "response.output_item.done"]
    assert [getattr(item, "status", "") for item in done] == ["incomplete", "completed"]
    assert client.responses.retrieve(final.id).output_text == whole
