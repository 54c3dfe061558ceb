"""Workers that are killed, drained, hurried: the job finishes, once, and its stream says so."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import httpx2

from tests.trip.stack import Stack, events, text


async def test_a_worker_killed_in_the_middle_of_a_stream(stack: Stack) -> None:
    first = stack.worker()
    job = stack.post("openai:ok-t150-d20")
    got = []
    async for event in events(stack.url, job["id"]):
        got.append(event)
        if len(got) == 15:
            os.kill(first.pid, signal.SIGKILL)
            await asyncio.to_thread(stack.worker)
    kinds = [event.event for event in got]
    assert kinds.count("reset") == 1
    assert kinds.count("end") == 1
    assert [event.id for event in got] == [str(seq) for seq in range(len(got))]
    done = stack.finished(job["id"])
    assert (done["state"], done["attempt"], done["crashes"]) == ("succeeded", 2, 1)
    assert text(got) == done["message"]["content"] == "".join(f"w{n} " for n in range(150))
    usage = stack.usage()
    assert (usage["jobs"], usage["output_tokens"]) == (1, 150)
    assert usage["unbilled"]["attempts"] == 1
    assert len(stack.calls()) == 2


def test_a_drained_worker_finishes_what_fits_and_hands_the_rest_back(stack: Stack) -> None:
    stack.env["BACKCHANNEL_GRACE_S"] = "3"
    worker = stack.worker()
    short = stack.post("openai:ok-t20-d50")
    long = stack.post("openai:ok-t1000-d100")
    _until_running(stack, short["id"], long["id"])
    started = time.monotonic()
    os.kill(worker.pid, signal.SIGTERM)
    assert worker.wait(timeout=30) == 0
    assert time.monotonic() - started < 3 + 10
    assert stack.job(short["id"])["state"] == "succeeded"
    back = stack.job(long["id"])
    assert (back["state"], back["attempt"], back["crashes"], back["retries"]) == ("queued", 1, 0, 0)


def test_a_second_sigterm_is_immediate_and_still_loses_nothing(stack: Stack) -> None:
    worker = stack.worker()  # with its 20 s of grace
    job = stack.post("openai:ok-t1000-d100")
    _until_running(stack, job["id"])
    os.kill(worker.pid, signal.SIGTERM)
    time.sleep(1.0)
    assert worker.poll() is None, "the first SIGTERM waits for the job"
    os.kill(worker.pid, signal.SIGTERM)
    assert worker.wait(timeout=10) == 0
    assert stack.job(job["id"])["state"] == "queued"


def test_a_frozen_worker_comes_back_and_writes_nothing(stack: Stack) -> None:
    frozen = stack.worker()
    job = stack.post("openai:ok-t100-d40")
    _until_running(stack, job["id"])
    stack.freeze(frozen)
    stack.worker()
    done = stack.finished(job["id"])
    os.kill(frozen.pid, signal.SIGCONT)
    time.sleep(2.0)
    assert done["attempt"] == 2
    assert stack.job(job["id"]) == done
    assert stack.usage()["output_tokens"] == 100


def test_a_running_job_is_cancelled_within_a_second_or_so(stack: Stack) -> None:
    stack.worker()
    job = stack.post("openai:ok-t1000-d100")
    _until_running(stack, job["id"])
    started = time.monotonic()
    httpx2.post(f"{stack.url}/v1/jobs/{job['id']}/cancel")
    assert stack.finished(job["id"])["state"] == "cancelled"
    assert time.monotonic() - started < 5


def _until_running(stack: Stack, *job_ids: str) -> None:
    deadline = time.monotonic() + 30
    while any(stack.job(job_id)["state"] != "running" for job_id in job_ids):
        assert time.monotonic() < deadline, stack.logs()
        time.sleep(0.05)
    time.sleep(0.3)


def test_a_worker_stops_in_time_while_redis_is_frozen(stack: Stack) -> None:
    stack.env["BACKCHANNEL_GRACE_S"] = "2"
    worker = stack.worker()
    job = stack.post("openai:ok-t1000-d100")
    _until_running(stack, job["id"])
    stack.valkey.freeze()
    time.sleep(1.0)
    started = time.monotonic()
    os.kill(worker.pid, signal.SIGTERM)
    try:
        assert worker.wait(timeout=60) == 0
    finally:
        stack.valkey.thaw()
    assert time.monotonic() - started < 2 + 25
    assert stack.job(job["id"])["state"] == "queued"
