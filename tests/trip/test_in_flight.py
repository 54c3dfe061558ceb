"""A thousand jobs at once in one worker process, against a slow provider."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx2

from tests.trip.stack import Stack

JOBS = 1_000
TOKENS = 60
MODEL = f"openai:ok-t{TOKENS}-d200-f100"  # 12 s each, so that all of them overlap


def resident_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


async def test_a_thousand_jobs_in_flight_in_one_process(
    new_stack: Callable[..., Stack], sqlite_url: str
) -> None:
    # three missed heartbeats on two loaded cores are no crash: the lease is the product's own
    stack = new_stack(
        sqlite_url,
        BACKCHANNEL_LEASE_S="20",
        BACKCHANNEL_HEARTBEAT_S="5",
        BACKCHANNEL_FENCE_S="15",
    )
    url = stack.api()
    worker = stack.worker(jobs_in_flight=JOBS)
    stack.finished(stack.post("openai:ok")["id"])  # the SDK is imported now
    base = resident_kb(worker.pid)
    peaks = [await one_wave(stack, url, sqlite_url, worker.pid) for _ in range(2)]
    each_kb = (peaks[0] - base) / JOBS
    print(f"base {base / 1024:.0f} MB; {each_kb:.0f} KB a job; peaks {peaks} KB")
    assert each_kb < 300
    assert peaks[1] < peaks[0] * 1.25, "the second wave needs no more memory than the first"


async def one_wave(stack: Stack, url: str, database_url: str, pid: int) -> int:
    """Run all jobs at once; returns the worker's highest resident memory meanwhile."""
    async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
        body = {"model": MODEL, "prompt": "Hello", "lane": "interactive"}
        answers = await asyncio.gather(*[client.post("/v1/jobs", json=body) for _ in range(JOBS)])
        job_ids = [answer.json()["id"] for answer in answers]
        peak, most = 0, 0
        async with asyncio.timeout(100):
            while True:
                running = count(database_url, "running")
                most = max(most, running)
                peak = max(peak, resident_kb(pid))
                if not running and not count(database_url, "queued"):
                    break
                await asyncio.sleep(0.5)
        print(f"in flight at once: {most}")
        assert most > 0.9 * JOBS
        for job_id in job_ids[:: JOBS // 50]:
            job = (await client.get(f"/v1/jobs/{job_id}")).json()
            assert (job["state"], job["usage"]["output_tokens"]) == ("succeeded", TOKENS)
    usage = stack.usage()
    assert usage["jobs"] % JOBS == 1
    assert usage["output_tokens"] == (usage["jobs"] - 1) * TOKENS + 16
    assert usage["unbilled"]["attempts"] == 0
    return peak


def count(database_url: str, state: str) -> int:
    with closing(sqlite3.connect(database_url.removeprefix("sqlite:///"))) as connection:
        query = "SELECT count(*) FROM jobs WHERE state = ?"
        number: int = connection.execute(query, (state,)).fetchone()[0]
        return number
