"""Limits of providers with real worker processes; the provider's ledger says what was called."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import httpx2
import pytest

from tests.trip.stack import Stack

LIMITS = "BACKCHANNEL_LIMITS"


@pytest.fixture
def limited(new_stack: Callable[..., Stack], database_url: str) -> Callable[..., Stack]:
    """An API and two worker processes, with limits of `openai`."""

    def make(**limits: int) -> Stack:
        stack = new_stack(database_url, **{LIMITS: json.dumps({"openai": limits})})
        for start in (stack.api, stack.worker, stack.worker):
            start()
        return stack

    return make


def post(stack: Stack, model: str, count: int, **body: Any) -> list[str]:
    return [stack.post(model, f"number {n}", **body)["id"] for n in range(count)]


def finished(stack: Stack, job_ids: Iterable[str]) -> list[dict[str, Any]]:
    return [stack.finished(job_id) for job_id in job_ids]


def most_at_once(stack: Stack, model: str) -> int:
    """How many calls of a model the provider had at the same time."""
    entries = [json.loads(line) for line in stack.ledger.read_text().splitlines()]
    ours = {entry["call"] for entry in entries if entry.get("model") == model}
    moments = [
        (entry["time"], 1 if entry["at"] == "start" else -1)
        for entry in entries
        if entry["call"] in ours
    ]
    running = most = 0
    for _, change in sorted(moments):
        running += change
        most = max(most, running)
    return most


def call_times(stack: Stack, model: str) -> list[float]:
    return sorted(entry["time"] for entry in stack.calls() if entry["model"] == model)


def test_requests_are_counted_over_all_workers_and_nobody_loses_an_attempt(
    limited: Callable[..., Stack],
) -> None:
    stack = limited(requests_per_minute=120)
    burst, step_s = 5, 60 / 116
    batch = post(stack, "openai:ok-t6", 30, lane="batch", stream=False)
    others = finished(stack, post(stack, "anthropic:ok-t5", 10, lane="batch"))
    assert len(call_times(stack, "ok-t6")) < 30, "the others did not wait for these"
    done = finished(stack, batch) + others
    assert {(job["state"], job["attempt"]) for job in done} == {("succeeded", 1)}
    times = call_times(stack, "ok-t6")
    assert len(times) == 30
    for place, first in enumerate(times):
        for more, at in enumerate(times[place:]):
            # a call is made a moment after it was let in
            assert more <= burst + (at - first + 1.0) / step_s
    assert 10 < times[-1] - times[0] < 60, "25 steps after the burst, of which few are left out"


def test_what_runs_at_once_is_counted_over_all_workers_and_a_dead_one_s_places_are_freed(
    limited: Callable[..., Stack],
) -> None:
    stack = limited(concurrency=2)
    slow = post(stack, "openai:ok-t30-d50", 8)
    deadline = time.monotonic() + 30
    while len(stack.calls()) < 3:
        assert time.monotonic() < deadline, stack.logs()
        time.sleep(0.05)
    victim = next(process for process in stack.processes if process.pid in stack.worker_logs)
    os.kill(victim.pid, signal.SIGKILL)
    done = finished(stack, slow)
    assert {job["state"] for job in done} == {"succeeded"}
    assert {job["attempt"] for job in done} <= {1, 2}
    # one that was not called yet when its worker died is no crash
    again = sum(job["attempt"] - 1 for job in done)
    assert sum(job["crashes"] for job in done) <= again <= 2
    assert most_at_once(stack, "ok-t30-d50") <= 2


def test_another_limit_counts_without_a_restart(limited: Callable[..., Stack]) -> None:
    stack = limited()
    url = stack.fake()
    own = {"name": "Own", "base_url": f"{url}/v1", "default_model": "ok", "allow_loopback": True}
    own["limits"] = {"requests_per_minute": 1}
    assert httpx2.post(f"{stack.url}/v1/providers", json=own).status_code == 201
    jobs = post(stack, "own:ok-t5", 6)
    time.sleep(4)
    assert len(call_times(stack, "ok-t5")) == 1
    limits: dict[str, Any] = {"limits": {"requests_per_minute": None, "concurrency": 3}}
    answer = httpx2.patch(f"{stack.url}/v1/providers/own", json=limits).json()
    assert answer["limits"] == {
        "requests_per_minute": None, "tokens_per_minute": None, "concurrency": 3,
    }  # fmt: skip
    started = time.monotonic()
    done = finished(stack, jobs)
    assert time.monotonic() - started < 60  # six calls at one a minute take five
    assert {(job["state"], job["attempt"]) for job in done} == {("succeeded", 1)}


def test_all_workers_wait_for_whom_one_was_asked_to_wait_for(limited: Callable[..., Stack]) -> None:
    stack = limited()
    # asked again when the wait is over, it answers: a second one would catch a job between claim
    # and call, which then has an attempt more
    refused = stack.post(f"openai:until-{int(time.time()) + 5}-429-ra6")
    deadline = time.monotonic() + 30
    while not stack.ledger.exists() or not stack.calls():
        assert time.monotonic() < deadline, stack.logs()
        time.sleep(0.02)
    time.sleep(0.3)
    shown = httpx2.get(f"{stack.url}/v1/providers/openai").json()
    assert shown["held_until"], shown
    jobs = post(stack, "openai:ok-t5", 20)
    others = post(stack, "anthropic:ok-t6", 5)
    assert {job["attempt"] for job in finished(stack, others)} == {1}
    done = finished(stack, [*jobs, refused["id"]])
    assert {job["state"] for job in done} == {"succeeded"}
    assert [job["attempt"] for job in done[:-1]] == [1] * 20
    ours = sorted(e["time"] for e in stack.calls() if e["model"] != "ok-t6")
    gaps = [later - earlier for earlier, later in pairwise(ours)]
    assert gaps[0] >= 6.0, gaps
    assert len(call_times(stack, "ok-t6")) == 5
