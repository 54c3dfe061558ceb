"""Webhooks over real processes: verified by OpenAI's SDK, outliving receivers and workers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from openai import InvalidWebhookSignatureError, OpenAI

from tests.receiver import Message, Receiver, receiver
from tests.trip.stack import ROOT, Stack

SOON = "UPDATE deliveries SET next_ms = 1 WHERE state = 'pending'"


@pytest.fixture
def stack(new_stack: Callable[..., Stack], sqlite_url: str) -> Stack:
    """An API process that may call loopback; the test starts its workers."""
    made = new_stack(sqlite_url, BACKCHANNEL_EGRESS_ALLOW="loopback")
    made.api()
    return made


@pytest.fixture
def listening() -> Iterator[Receiver]:
    """A receiver."""
    with receiver() as made:
        yield made


@pytest.fixture
def sdk(stack: Stack) -> Iterator[OpenAI]:
    """OpenAI's SDK as our client."""
    with OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def type_(stack: Stack, *words: str) -> subprocess.CompletedProcess[str]:
    """Type a command of ours."""
    command = [sys.executable, "-m", "backchannel", "webhooks", *words]
    env = {**stack.env, "BACKCHANNEL_API_URL": stack.url, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def typed(stack: Stack, *words: str) -> Any:
    """What a command of ours prints as JSON."""
    said = type_(stack, *words, "--json")
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def unwrapped(sdk: OpenAI, message: Message, secret: str) -> Any:
    return sdk.webhooks.unwrap(message.body, message.headers, secret=secret)


def test_openai_s_sdk_verifies_the_ends_of_responses_batches_and_jobs(
    stack: Stack, sdk: OpenAI, listening: Receiver
) -> None:
    stack.worker()
    secret = typed(stack, "add", listening.url)["signing_secret"]
    response = sdk.responses.create(model="openai:ok-t2", input="Hello", background=True)
    job = stack.post("openai:ok-t2")
    line = {
        "custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
        "body": {"model": "openai:ok-t2", "messages": [{"role": "user", "content": "Hi"}]},
    }  # fmt: skip
    file = sdk.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = sdk.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    messages = listening.until(3)
    events = [unwrapped(sdk, message, secret) for message in messages]
    assert {(event.type, event.data.id) for event in events} == {
        ("response.completed", response.id),
        ("job.succeeded", job["id"]),
        ("batch.completed", batch.id),
    }
    assert [event.id for event in events] == [message.id for message in messages]
    forged = Message(messages[0].headers, messages[0].body.replace(b"resp_", b"resp-"))
    forged = forged._replace(body=forged.body + b" ")
    with pytest.raises(InvalidWebhookSignatureError):
        unwrapped(sdk, forged, secret)


def test_a_receiver_that_is_down_is_told_when_it_is_back(stack: Stack, sdk: OpenAI) -> None:
    with receiver() as away:
        port = away.port
    made = typed(stack, "add", f"http://127.0.0.1:{port}/", "--event", "job.succeeded")
    stack.worker()
    job = stack.post("openai:ok-t2")
    assert stack.finished(job["id"])["state"] == "succeeded"

    def tries() -> int:
        (found,) = typed(stack, "deliveries", made["id"])["data"]
        assert found["state"] == "pending"
        count: int = found["tries"]
        return count

    while tries() < 2:  # 5 s after the first
        pass
    (failed,) = typed(stack, "deliveries", made["id"])["data"]
    assert "Cannot connect" in failed["error"]
    with receiver(port) as back:
        stack.execute(SOON)
        (message,) = back.until(1)
    assert unwrapped(sdk, message, made["signing_secret"]).data.id == job["id"]


def test_a_worker_killed_between_sending_and_writing_sends_again_with_the_same_id(
    stack: Stack, sdk: OpenAI, listening: Receiver
) -> None:
    made = typed(stack, "add", listening.url)
    stack.env["BACKCHANNEL_FAULT"] = "webhook.sent@1"
    doomed = stack.worker()
    stack.env["BACKCHANNEL_FAULT"] = ""
    job = stack.post("openai:ok-t2")
    assert stack.finished(job["id"])["state"] == "succeeded"
    assert doomed.wait(timeout=30) == -9
    (first,) = listening.until(1)
    (delivery,) = typed(stack, "deliveries", made["id"])["data"]
    assert (delivery["state"], delivery["tries"]) == ("pending", 1)
    stack.worker()
    stack.execute(SOON)  # its lease is a minute
    _, second = listening.until(2)
    assert first.id == second.id == delivery["id"]
    assert first.body == second.body
    for message in (first, second):
        assert unwrapped(sdk, message, made["signing_secret"]).data.id == job["id"]


def test_dead_letters_are_listed_and_replayed_and_both_secrets_sign(
    stack: Stack, sdk: OpenAI, listening: Receiver
) -> None:
    made = typed(stack, "add", listening.url, "--event", "job.succeeded", "--name", "mine")
    webhook_id, old = made["id"], made["signing_secret"]
    stack.worker()
    listening.status = 500
    job = stack.post("openai:ok-t2")
    listening.until(1)
    stack.execute("UPDATE deliveries SET tries = 10 WHERE state = 'pending'")
    stack.execute(SOON)
    while not (dead := typed(stack, "deliveries", webhook_id, "--state", "dead")["data"]):
        pass
    assert (dead[0]["subject"], dead[0]["status_code"]) == (job["id"], 500)

    new = typed(stack, "rotate", webhook_id)["signing_secret"]
    listening.status = 204
    before = len(listening.messages)
    assert typed(stack, "replay", webhook_id) == {"replayed": 1}
    message = listening.until(before + 1)[-1]
    assert message.id == dead[0]["id"]
    for secret in (old, new):
        assert unwrapped(sdk, message, secret).data.id == job["id"]
    while typed(stack, "deliveries", webhook_id)["data"][0]["state"] != "delivered":
        pass
    assert typed(stack, "replay", webhook_id, message.id)["state"] == "pending"
    assert listening.until(before + 2)[-1].id == message.id

    assert typed(stack, "test", webhook_id)["status_code"] == 204
    assert typed(stack, "show", webhook_id)["name"] == "mine"
    assert [each["id"] for each in typed(stack, "list")["data"]] == [webhook_id]
    assert typed(stack, "enable", webhook_id)["enabled"]
    assert typed(stack, "remove", webhook_id)["deleted"]
    assert httpx2.get(f"{stack.url}/v1/webhooks/{webhook_id}").status_code == 404


def test_the_commands_say_in_words_what_they_did(stack: Stack, listening: Receiver) -> None:
    said = type_(stack, "add", listening.url, "--event", "batch.failed")
    facts = dict(line.split(maxsplit=1) for line in said.stdout.splitlines())
    assert facts["signing_secret"].startswith("whsec_")
    assert (facts["enabled"], facts["event_types"]) == ("True", "batch.failed")
    assert "not shown again" in said.stderr
    webhook_id = facts["id"]
    assert type_(stack).stdout.splitlines()[1].split("\t")[:3] == [webhook_id, "yes", listening.url]
    assert "signing_secret" not in type_(stack, "show", webhook_id).stdout
    assert type_(stack, "test", webhook_id).stdout == "It answered 204 to batch.failed.\n"
    listening.status = 500
    failed = type_(stack, "test", webhook_id)
    assert (failed.returncode, failed.stderr) == (1, "It answered 500.\n")
    assert "will be sent once more" in type_(stack, "replay", webhook_id).stdout
    assert type_(stack, "deliveries", webhook_id).stdout.startswith("ID\tEVENT_TYPE\t")
    assert type_(stack, "remove", webhook_id).stdout == f"{webhook_id} is removed.\n"
    refused = type_(stack, "add", "http://10.0.0.1/")
    assert refused.returncode == 1
    assert "BACKCHANNEL_EGRESS_ALLOW=10.0.0.1:80" in refused.stderr
