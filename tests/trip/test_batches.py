"""Whole batches by the official OpenAI SDK, strictly validated, on real processes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from openai import ConflictError, NotFoundError, OpenAI
from openai.types import Batch
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from tests.trip.stack import Stack

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
END_S = 90.0


@pytest.fixture
def client(stack: Stack) -> Iterator[OpenAI]:
    """The SDK as a user has it, but for its patience with what it does not know."""
    with OpenAI(
        base_url=f"{stack.url}/v1", api_key="any", _strict_response_validation=True
    ) as made:
        yield made


def chats(*models: str) -> list[dict[str, Any]]:
    """One chat for each model, with ids c0, c1, …"""
    return [
        {
            "custom_id": f"c{n}",
            "method": "POST",
            "url": CHAT,
            "body": {"model": model, "messages": [{"role": "user", "content": f"number {n}"}]},
        }
        for n, model in enumerate(models)
    ]


def start(client: OpenAI, lines: list[dict[str, Any]], endpoint: Any = CHAT) -> Batch:
    """Upload and create."""
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    assert client.files.wait_for_processing(file.id).status == "processed"
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"trip": "yes"}
    )


def until(client: OpenAI, batch_id: str, reached: Callable[[Batch], bool]) -> Batch:
    """The batch, once it has come so far."""
    give_up = time.monotonic() + END_S
    while not reached(batch := client.batches.retrieve(batch_id)):
        assert time.monotonic() < give_up, batch
        time.sleep(0.1)
    return batch


def ended(client: OpenAI, batch_id: str) -> Batch:
    """The batch at its end."""
    over = ("completed", "failed", "expired", "cancelled")
    return until(client, batch_id, lambda batch: batch.status in over)


def records(client: OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """A file's lines by their ids, each of which is there once."""
    if file_id is None:
        return {}
    lines = [json.loads(each) for each in client.files.content(file_id).text.splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


def alike(body: dict[str, Any]) -> dict[str, Any]:
    """An answer without what only tells it from another one."""
    digits = body["id"].rpartition("_")[2].rpartition("-")[2]
    own = ("created", "created_at", "x_backchannel")
    kept = {name: value for name, value in body.items() if name not in own}
    return dict(json.loads(json.dumps(kept).replace(digits, "…")))


def test_one_file_for_several_providers(client: OpenAI, stack: Stack) -> None:
    stack.worker()
    lines = chats("openai:ok-t4", "anthropic:ok-t3", "echo", "openai:status-400", "groq:x")
    batch = start(client, lines)
    assert [each.id for each in client.batches.list(limit=1)] == [batch.id]
    batch = ended(client, batch.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 2)
    output, errors = (records(client, each) for each in (batch.output_file_id, batch.error_file_id))
    for record in output.values():
        answer = ChatCompletion.model_validate(record["response"]["body"], strict=True)
        assert answer.choices[0].finish_reason == "stop"
        assert client.chat.completions.retrieve(answer.id) == answer
    assert output["c2"]["response"]["body"]["choices"][0]["message"]["content"] == "number 2"
    assert {name: each["response"]["status_code"] for name, each in errors.items()} == {
        "c3": 400, "c4": 400,
    }  # fmt: skip
    assert batch.output_file_id is not None
    listed = {file.id: file.purpose for file in client.files.list()}
    assert listed[batch.input_file_id] == "batch"
    assert listed[batch.output_file_id] == "batch_output"
    size = client.files.retrieve(batch.output_file_id).bytes
    assert size == len(client.files.content(batch.output_file_id).read())
    assert batch.usage is not None
    books = stack.usage()
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (
        books["input_tokens"], books["output_tokens"],
    )  # fmt: skip

    child = httpx2.post(f"{stack.url}/v1/batches/{batch.id}/retry", timeout=10).json()
    again = ended(client, child["id"])
    assert child["parent_id"] == batch.id
    assert records(client, again.error_file_id).keys() == {"c3", "c4"}
    with pytest.raises(ConflictError):
        client.batches.cancel(batch.id)
    assert client.files.delete(batch.input_file_id).deleted
    with pytest.raises(NotFoundError):
        client.files.retrieve(batch.input_file_id)
    posted = httpx2.post(f"{stack.url}{CHAT}", json=lines[2]["body"], timeout=60).json()
    assert alike(output["c2"]["response"]["body"]) == alike(posted)


def test_responses_too(client: OpenAI, stack: Stack) -> None:
    stack.worker()
    bodies: list[dict[str, Any]] = [
        {"model": "openai:ok-t4", "input": "Hello", "instructions": "Be brief."},
        {
            "model": "anthropic:tools",
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "Look it up."}]}],
            "tools": [
                {"type": "function", "name": "lookup", "parameters": {"type": "object"},
                 "strict": False}
            ],
            "max_output_tokens": 20,
        },
        {"model": "echo", "input": 7},
    ]  # fmt: skip
    lines = [
        {"custom_id": f"r{n}", "method": "POST", "url": RESPONSES, "body": body}
        for n, body in enumerate(bodies)
    ]
    batch = ended(client, start(client, lines, RESPONSES).id)
    output = records(client, batch.output_file_id)
    answers = {
        name: Response.model_validate(each["response"]["body"]) for name, each in output.items()
    }
    for answer in answers.values():
        assert client.responses.retrieve(answer.id) == answer
    assert (answers["r0"].output_text, answers["r0"].instructions) == ("w0 w1 w2 w3 ", "Be brief.")
    (call,) = [item for item in answers["r1"].output if item.type == "function_call"]
    assert (call.name, call.arguments) == ("lookup", '{"q": "w0"}')
    for name, body in zip(("r0", "r1"), bodies, strict=False):
        posted = httpx2.post(f"{stack.url}{RESPONSES}", json=body, timeout=60).json()
        assert alike(output[name]["response"]["body"]) == alike(posted)
    refused = records(client, batch.error_file_id)["r2"]["response"]
    assert (refused["status_code"], refused["body"]["error"]["param"]) == (400, "input")


def test_a_bad_file_fails_with_its_lines(client: OpenAI, stack: Stack) -> None:
    stack.worker()
    lines = chats("echo", "echo")
    lines[1]["custom_id"] = "c0"
    batch = ended(client, start(client, lines).id)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(each.code, each.line) for each in batch.errors.data] == [("duplicate_custom_id", 2)]


def test_a_cancel_keeps_what_was_paid_for(client: OpenAI, stack: Stack) -> None:
    stack.worker(jobs_in_flight=5)
    lines = chats(*["openai:ok-t2"] * 5, *["openai:ok-t100-d100"] * 3_000)
    batch = start(client, lines)

    def some(batch: Batch) -> bool:
        return batch.request_counts is not None and batch.request_counts.completed >= 5

    running = until(client, batch.id, some)
    growing = records(client, running.output_file_id)
    assert len(growing) >= 5
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch.id)
    assert batch.status == "cancelled"
    output, errors = (records(client, each) for each in (batch.output_file_id, batch.error_file_id))
    assert {name: output[name] for name in growing} == growing
    assert output.keys() | errors.keys() == {line["custom_id"] for line in lines}
    assert not output.keys() & errors.keys()
    assert {each["error"]["code"] for each in errors.values()} == {"batch_cancelled"}
    # the five that ran were called, and stand in the batch's sums as in the books
    paid = [each["error"] for each in errors.values() if "kept" in each["error"]]
    assert 0 < len(paid) <= 5
    books = stack.usage()
    assert batch.usage is not None
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (
        books["input_tokens"], books["output_tokens"],
    )  # fmt: skip
    unknown = (batch.usage.model_extra or {})["unknown_tokens"]
    assert unknown == books["unknown_tokens"] == sum(each["usage"] is None for each in paid)
    assert len(output) + len(paid) == len(stack.calls())
    kept = httpx2.get(f"{stack.url}{paid[0]['kept']}", timeout=10).json()
    assert kept["state"] == "cancelled"
    assert kept["message"]["content"].startswith("w0 ")
    assert batch.cancelling_at is not None
    assert batch.cancelled_at is not None
    assert batch.cancelled_at - batch.cancelling_at < 20


def test_a_worker_that_is_killed_costs_no_line_and_doubles_none(
    client: OpenAI, stack: Stack
) -> None:
    first, _ = stack.worker(), stack.worker()
    lines = chats(*["openai:ok-t5-d20", "openai:ok-t3"] * 150)
    batch = start(client, lines)

    def begun(batch: Batch) -> bool:
        return batch.request_counts is not None and batch.request_counts.completed > 20

    until(client, batch.id, begun)
    os.kill(first.pid, signal.SIGKILL)
    batch = ended(client, batch.id)
    assert batch.status == "completed"
    output = records(client, batch.output_file_id)
    assert output.keys() == {line["custom_id"] for line in lines}
    assert records(client, batch.error_file_id) == {}
    usage = [each["response"]["body"]["usage"] for each in output.values()]
    books = stack.usage()
    assert batch.usage is not None
    assert books["jobs"] == 300
    assert (
        sum(each["completion_tokens"] for each in usage)
        == batch.usage.output_tokens
        == books["output_tokens"]
    )


def test_what_is_not_done_in_time_expires(client: OpenAI, stack: Stack) -> None:
    stack.worker(jobs_in_flight=3)
    content = b"".join(
        json.dumps(line).encode() + b"\n"
        for line in chats("openai:ok-t2", *["openai:ok-t100-d1000"] * 10)
    )
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    window: Any = "1m"  # the shortest there is; the test does not wait for it
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window=window)
    until(
        client, batch.id,
        lambda now: now.request_counts is not None and now.request_counts.completed == 1,
    )  # fmt: skip
    stack.execute("UPDATE batches SET expires_ms = 1")
    stack.execute("UPDATE jobs SET deadline_ms = 1 WHERE finished_ms IS NULL")
    until(client, batch.id, lambda now: now.status == "finalizing")
    # the running ones end by their own deadline, which their worker was told when they began
    stack.execute("UPDATE jobs SET cancel_ms = 1 WHERE state = 'running'")
    batch = ended(client, batch.id)
    assert batch.status == "expired"
    assert records(client, batch.output_file_id).keys() == {"c0"}
    errors = records(client, batch.error_file_id)
    assert errors.keys() == {f"c{n}" for n in range(1, 11)}
    assert "batch_expired" in {each["error"]["code"] for each in errors.values()}
