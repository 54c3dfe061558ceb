"""One job from POST to SSE over real processes, and every way to come back to its stream."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.trip.stack import Stack, events, text


@pytest.mark.parametrize("model", ["openai:ok-t40-d10", "anthropic:ok-t40-d10", "echo:echo-1"])
async def test_a_job_is_followed_live_and_resumed_byte_for_byte(
    new_stack: Callable[..., Stack], database_url: str, model: str
) -> None:
    stack = new_stack(database_url)
    url, other_api = stack.api(), stack.api()
    stack.worker()
    job = stack.post(model, "one two three four five six seven eight nine ten " * 8)

    live = [event async for event in events(url, job["id"])]
    assert [event.id for event in live] == [str(seq) for seq in range(len(live))]
    assert live[0].event == "started"
    assert [event.event for event in live].count("end") == 1
    assert live[-1].event == "end"

    done = stack.finished(job["id"])
    assert done["state"] == live[-1].fields["state"] == "succeeded"
    assert done["message"]["content"] == text(live)
    assert done["usage"] == live[-1].fields["usage"]

    async def again(api: str, after: str | None = None) -> list[object]:
        return [event async for event in events(api, job["id"], after)]

    middle = len(live) // 2
    assert await again(url) == live
    assert await again(other_api, live[middle].id) == live[middle + 1 :]
    assert stack.valkey.say("FLUSHALL") == "+OK\r\n"
    assert await again(url) == live
    assert await again(other_api, live[middle].id) == live[middle + 1 :]
    assert await again(url, live[-1].id) == []


async def test_a_reader_that_leaves_in_the_middle_misses_nothing(stack: Stack) -> None:
    stack.worker()
    job = stack.post("openai:ok-t60-d20")
    first = []
    async for event in events(stack.url, job["id"]):
        first.append(event)
        if len(first) == 10:
            break  # disconnecting is not cancelling
    rest = [event async for event in events(stack.url, job["id"], first[-1].id)]
    assert [event.id for event in first + rest] == [str(n) for n in range(len(first) + len(rest))]
    assert text(first + rest) == stack.finished(job["id"])["message"]["content"]


async def test_redis_may_be_emptied_or_killed_in_the_middle_of_a_stream(stack: Stack) -> None:
    stack.worker()
    job = stack.post("openai:ok-t150-d20")
    got = []
    async for event in events(stack.url, job["id"]):
        got.append(event)
        if len(got) == 10:
            stack.valkey.say("FLUSHALL")
        if len(got) == 20:
            stack.valkey.kill()
            stack.valkey.start()
    assert [event.id for event in got] == [str(seq) for seq in range(len(got))]
    assert [event.event for event in got].count("end") == 1
    assert text(got) == stack.finished(job["id"])["message"]["content"]


def test_a_job_is_accepted_while_redis_is_down_and_runs_when_it_is_back(stack: Stack) -> None:
    stack.worker()
    stack.valkey.kill()
    jobs = [stack.post(prompt=f"number {n}") for n in range(5)]
    assert [job["state"] for job in jobs] == ["queued"] * 5
    stack.valkey.start()
    assert [stack.finished(job["id"])["state"] for job in jobs] == ["succeeded"] * 5
    assert len(stack.calls()) == 5


def test_a_conversation_remembers_and_switches_its_model(stack: Stack) -> None:
    import httpx2

    stack.worker()
    session = httpx2.post(f"{stack.url}/v1/sessions", json={"model": "openai:ok-t2"}).json()
    first = stack.post("openai:ok-t2", "one", session=session["id"])
    second = stack.post("anthropic:echo", "two", session=session["id"])
    assert stack.finished(first["id"])["state"] == "succeeded"
    asked = json.loads(stack.finished(second["id"])["message"]["content"])
    assert [turn["role"] for turn in asked["body"]["messages"]] == ["user", "assistant", "user"]
    now = httpx2.get(f"{stack.url}/v1/sessions/{session['id']}").json()
    assert (now["model"], now["model_version"]) == ("anthropic:echo", 2)
    assert [m["role"] for m in now["messages"]] == ["user", "assistant", "user", "assistant"]
