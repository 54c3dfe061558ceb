"""Batch files: lines accepted a second, the memory that takes, and durable jobs a second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from benchmarks.installation import Installation
from benchmarks.processes import cpu_by_role, resident_kb
from benchmarks.progress import say
from benchmarks.work import SHORT, WARM_UP, Pace

LINE = (
    '{"custom_id":"%d","method":"POST","url":"/v1/chat/completions","body":{"model":"%s",'
    '"messages":[{"role":"user","content":"Hello?"}]}}\n'
)
LOOK_S = 0.1


def run(home: Installation, jobs: int) -> dict[str, float]:
    """A batch to its end, the provider being no limit: one worker process, one API process."""
    say(f"batch of {jobs:,} on {home.kind}")
    with _client(home) as api:
        _to_its_end(api, 50, WARM_UP.pace)
        before = cpu_by_role(home.roles)
        started = time.monotonic()
        _to_its_end(api, jobs, SHORT)
        took = time.monotonic() - started
        after = cpu_by_role(home.roles)
    found = {
        "jobs_per_s": jobs / took,
        **{f"{role}_ms": (after[role] - before[role]) * 1e3 / jobs for role in after},
    }
    return {f"batch.{home.kind}.{name}": value for name, value in found.items()}


def lines(home: Installation, number: int) -> dict[str, float]:
    """A long file up to the moment when all its lines are checked; it is cancelled then."""
    say(f"a batch file of {number:,} lines")
    with _client(home) as api:
        _accepted(api, home, number // 10)
        short_kb = _accepted(api, home, number // 10)[1]
        seconds, long_kb = _accepted(api, home, number)
    return {
        "lines.number": number,
        "lines.per_s": number / seconds,
        "lines.growth_mb": (long_kb - short_kb) / 1024,
        "lines.peak_mb": long_kb / 1024,
    }


@contextmanager
def _client(home: Installation) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=home.url, timeout=120, trust_env=False) as api:
        yield api


def _to_its_end(api: httpx2.Client, number: int, pace: Pace) -> None:
    batch = _batch(api, number, pace)
    while (now := _get(api, batch))["status"] != "completed":
        assert now["status"] in ("validating", "in_progress", "finalizing"), now
        time.sleep(LOOK_S)
    assert now["request_counts"] == {"total": number, "completed": number, "failed": 0}, now


def _accepted(api: httpx2.Client, home: Installation, number: int) -> tuple[float, int]:
    """Seconds until every line is checked, and the most memory of API and worker meanwhile."""
    pids = [*home.roles["api"], *home.roles["worker"]]
    started = time.monotonic()
    batch = _batch(api, number, SHORT)
    peak = resident_kb(pids)
    while _get(api, batch)["status"] == "validating":
        peak = max(peak, resident_kb(pids))
        time.sleep(LOOK_S)
    took = time.monotonic() - started
    api.post(f"/v1/batches/{batch}/cancel").raise_for_status()
    while _get(api, batch)["status"] != "cancelled":
        time.sleep(LOOK_S)
    return took, peak


def _batch(api: httpx2.Client, number: int, pace: Pace) -> str:
    file = "".join(LINE % (line, f"openai:{pace.model}") for line in range(number)).encode()
    form: dict[str, Any] = {"data": {"purpose": "batch"}, "files": {"file": ("lines.jsonl", file)}}
    uploaded = api.post("/v1/files", **form).raise_for_status().json()["id"]
    asked = {
        "input_file_id": uploaded,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    batch: str = api.post("/v1/batches", json=asked).raise_for_status().json()["id"]
    return batch


def _get(api: httpx2.Client, batch: str) -> dict[str, Any]:
    found: dict[str, Any] = api.get(f"/v1/batches/{batch}").raise_for_status().json()
    return found
