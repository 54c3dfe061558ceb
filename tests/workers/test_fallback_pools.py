"""The same task under Celery's own pools: it waits for the loop on a thread, or in a child."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from backchannel.books import Doorbell
from backchannel.queue import render
from backchannel.settings import get_settings
from tests.workers.conftest import Bench

WORKER = """
import sys
from backchannel.settings import get_settings
from workers.tasks import app
app.Worker(pool_cls=sys.argv[1], concurrency=2, hostname="fallback", without_gossip=True,
           without_mingle=True, loglevel="INFO").start()
"""


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_jobs_run_under_celery_s_own_pools(bench: Bench, tmp_path: Path, pool: str) -> None:
    jobs = [bench.accept("echo:echo-1", prompt=f"number {n}") for n in range(5)]
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, pool], env=dict(os.environ), stdout=log, stderr=log
        )
    try:
        _ring_all(bench)
        deadline = time.monotonic() + 60
        while {bench.job(job).state for job in jobs} != {"succeeded"}:
            assert time.monotonic() < deadline, (tmp_path / "worker.log").read_text()
            time.sleep(0.1)
    finally:
        worker.terminate()
        try:
            worker.wait(timeout=30)
        finally:
            worker.kill()
            worker.wait()
    assert [len(bench.usage(job)) for job in jobs] == [1] * 5


def _ring_all(bench: Bench) -> None:
    """By hand: a process of these pools opens, dispatcher and all, with its first task."""
    settings = get_settings()
    with redis.Redis.from_url(settings.redis) as client:
        for row in bench.rows("SELECT id FROM jobs"):
            bell = Doorbell(row.id, "interactive", "echo:echo-1", 1)
            client.lpush(f"{settings.redis_prefix}interactive", render(bell))
