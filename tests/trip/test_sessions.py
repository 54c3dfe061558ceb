"""Conversations and fallbacks over real processes: many at once, interrupted, walked around."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from tests.servers import free_port
from tests.trip.stack import Stack, events, text

SENDS = 100
MODELS = ("openai:ok-t2", "anthropic:ok-t3", "openai:ok-t4-d5", None)


def begin(stack: Stack, **fields: Any) -> str:
    answer = httpx2.post(f"{stack.url}/v1/sessions", json=fields, timeout=10)
    assert answer.status_code == 201, answer.text
    session: str = answer.json()["id"]
    return session


def messages(stack: Stack, session: str) -> list[dict[str, Any]]:
    whole = httpx2.get(f"{stack.url}/v1/sessions/{session}", timeout=10).json()
    found: list[dict[str, Any]] = whole["messages"]
    return found


async def test_a_hundred_sends_at_once_while_a_worker_dies(
    new_stack: Callable[..., Stack], database_url: str
) -> None:
    stack = new_stack(database_url)
    urls = [stack.api(), stack.api()]
    workers = [stack.worker(), stack.worker()]
    session = begin(stack, model="openai:ok-t1")

    async with httpx2.AsyncClient(timeout=60) as client:

        async def send(number: int) -> dict[str, Any]:
            body = {"prompt": f"question {number}", "session": session}
            if (model := random.choice(MODELS)) is not None:
                body["model"] = model
            answer = await client.post(f"{urls[number % 2]}/v1/jobs", json=body)
            assert answer.status_code == 202, answer.text
            job: dict[str, Any] = answer.json()
            return job

        jobs = await asyncio.gather(*map(send, range(SENDS)))
    os.kill(workers[0].pid, signal.SIGKILL)
    done = {job["id"]: await asyncio.to_thread(stack.finished, job["id"], 90) for job in jobs}
    assert {job["state"] for job in done.values()} == {"succeeded"}

    said = messages(stack, session)
    assert [message["seq"] for message in said] == list(range(1, 2 * SENDS + 1))
    model = "openai:ok-t1"
    for question, answer in zip(said[::2], said[1::2], strict=True):
        job = done[question["job_id"]]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert question["job_id"] == answer["job_id"]
        model = job["requested_model"] or model
        assert job["model"] == answer["model"] == model
        assert answer["content"] == job["message"]["content"]
    ends = [done[message["job_id"]]["finished_at"] for message in said[::2]]
    assert ends == sorted(ends), "they finish in the order of the conversation"


async def test_a_running_stream_is_interrupted_and_the_next_turn_has_read_it(
    new_stack: Callable[..., Stack], database_url: str
) -> None:
    stack = new_stack(database_url)
    stack.api()
    stack.worker()
    session = begin(stack, double_texting="interrupt")
    first = stack.post("openai:ok-t1000-d20", "Tell me of cats.", session=session)
    heard, second = [], None
    async for event in events(stack.url, first["id"]):
        heard.append(event)
        if len(heard) == 8:
            second = await asyncio.to_thread(
                stack.post, "anthropic:echo", "No, dogs.", session=session
            )
    assert heard[-1].fields["state"] == "cancelled"
    assert second is not None
    cut = stack.finished(first["id"], within_s=20)
    assert (cut["state"], cut["interrupted_by"]) == ("cancelled", second["id"])
    partial = cut["message"]["content"]
    assert partial == text(heard)
    assert partial.startswith("w0 w1 ")
    answer = stack.finished(second["id"], within_s=20)
    assert answer["state"] == "succeeded"
    assert "No, dogs." in answer["message"]["content"]
    assert partial.strip() in answer["message"]["content"], "the new turn was told the partial text"
    told = [(m["role"], m["state"], m["interrupted"]) for m in messages(stack, session)]
    assert told == [
        ("user", "cancelled", True),
        ("assistant", "cancelled", True),
        ("user", "succeeded", False),
        ("assistant", "succeeded", False),
    ]


async def test_an_interrupted_turn_whose_worker_is_killed_ends_once(stack: Stack) -> None:
    worker = stack.worker()
    session = begin(stack, double_texting="interrupt")
    first = stack.post("openai:ok-t1000-d20", "Tell me of cats.", session=session)
    heard = 0
    async for _ in events(stack.url, first["id"]):
        heard += 1
        if heard == 8:
            break
    os.kill(worker.pid, signal.SIGKILL)
    second = stack.post("openai:ok-t3", "No, dogs.", session=session)
    stack.worker()
    cut = stack.finished(first["id"], within_s=40)
    assert (cut["state"], cut["interrupted_by"]) == ("cancelled", second["id"])
    assert cut["message"]["content"].startswith("w0 w1 ")
    assert stack.finished(second["id"], within_s=40)["state"] == "succeeded"
    said = messages(stack, session)
    assert [message["seq"] for message in said] == [1, 2, 3, 4]
    assert said[1]["content"] == cut["message"]["content"]
    kinds = [event.event async for event in events(stack.url, first["id"])]
    assert kinds.count("end") == 1


@pytest.mark.parametrize("face", ["jobs", "chat"])
async def test_a_refused_port_is_walked_around_at_once(
    new_stack: Callable[..., Stack], sqlite_url: str, face: str
) -> None:
    stack = new_stack(
        sqlite_url,
        GROQ_API_KEY="key",
        BACKCHANNEL_PROVIDERS__GROQ__BASE_URL=f"http://127.0.0.1:{free_port()}/v1",
        BACKCHANNEL_TIERS__FAST='["gemini:no-key", "groq:refused", "openai:ok-t5"]',
    )
    stack.api()
    stack.worker()
    answer: dict[str, Any] = {}
    if face == "jobs":
        fallbacks = ["openai:ok-t5", "anthropic:ok"]
        job = stack.post("groq:refused", fallbacks=fallbacks)
    else:
        asked = {"model": "tier:fast", "messages": [{"role": "user", "content": "Hi"}]}
        sent = httpx2.post(f"{stack.url}/v1/chat/completions", json=asked, timeout=60)
        answer, fallbacks = sent.json(), ["openai:ok-t5"]
        job = {"id": sent.headers["x-backchannel-job"]}
        assert answer["model"] == "openai:ok-t5"
        assert answer["choices"][0]["message"]["content"] == "w0 w1 w2 w3 w4 "
    done = stack.finished(job["id"])
    assert (done["state"], done["model"], done["fallback_from"]) == (
        "succeeded",
        "openai:ok-t5",
        "groq:refused",
    )
    assert (done["attempt"], done["retries"], done["fallbacks"]) == (2, 0, fallbacks)
    assert done["model_reason"].endswith("; fell back from groq:refused (unreachable)")
    log = [event async for event in events(stack.url, job["id"])]
    assert [event.event for event in log][:3] == ["started", "retrying", "reset"]
    assert done["message"]["content"] == "w0 w1 w2 w3 w4 "
    assert len(stack.calls()) == 1


async def test_a_stream_that_has_begun_stays_with_its_model(stack: Stack) -> None:
    stack.env["BACKCHANNEL_MAX_RETRIES"] = "1"
    stack.worker()
    job = stack.post("openai:cut-3", fallbacks=["anthropic:ok"])
    done = stack.finished(job["id"])
    assert (done["state"], done["error"]["code"]) == ("failed", "disconnected")
    assert (done["model"], done["fallback_from"], done["attempt"]) == ("openai:cut-3", None, 2)
    assert {call["model"] for call in stack.calls()} == {"cut-3"}
