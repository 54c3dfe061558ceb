"""Flower sees every job as a Celery task, with its real runtime, and never what was said."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx2

from tests.servers import free_port
from tests.trip.stack import Stack

MODEL = "openai:ok-t10-d100"
SECRET = "a secret that only the provider may read"


def tasks_of(url: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = httpx2.get(f"{url}/api/tasks", timeout=10).json()
    return found


def test_flower_agrees_with_the_books_and_shows_no_prompt(stack: Stack) -> None:
    port = free_port()
    stack._spawn("flower", "backchannel", "flower", "--port", str(port))
    url = f"http://127.0.0.1:{port}"
    _until(lambda: httpx2.get(f"{url}/healthcheck", timeout=5).status_code == 200, stack)
    stack.env["BACKCHANNEL_PRICES"] = json.dumps({MODEL: {"input": 1, "output": 1000}})
    time.sleep(2)  # its events are subscribed a moment after it answers
    stack.worker()
    jobs = [stack.post(MODEL, f"{SECRET} {n}") for n in range(5)]
    jobs.append(stack.post("openai:auth", SECRET))
    done = [stack.finished(job["id"]) for job in jobs]
    assert [job["state"] for job in done] == ["succeeded"] * 5 + ["failed"]
    _until(lambda: sum(t["state"] == "SUCCESS" for t in tasks_of(url).values()) == 6, stack)

    tasks = tasks_of(url)
    tokens = 0
    for job in done:
        task = tasks[f"{job['id']}.1"]
        assert task["name"] == "backchannel.run_chat"
        assert job["id"] in task["args"]
        assert job["lane"] in task["args"]
        assert job["model"] in task["args"]
        assert job["state"] in task["result"]
        if job["state"] == "succeeded":
            assert task["runtime"] > 0.8, "ten tokens, 100 ms each: the coroutine's own runtime"
            assert f"${job['usage']['cost_usd']:.6f}" in task["result"]
            tokens += int(task["result"].split("+")[1].split()[0])
    assert tokens == stack.usage()["output_tokens"] == 50
    assert len(tasks) == 6
    pages = [httpx2.get(f"{url}{path}", timeout=10).text for path in ("/api/tasks", "/tasks")]
    pages += [httpx2.get(f"{url}/task/{task_id}", timeout=10).text for task_id in tasks]
    assert not any(SECRET in page or "sk-test" in page or "w0 w1" in page for page in pages)


def _until(condition: Any, stack: Stack) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if condition():
                return
        except httpx2.HTTPError:
            pass
        assert time.monotonic() < deadline, stack.logs()
        time.sleep(0.2)
