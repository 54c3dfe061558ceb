"""One installation to be broken: a stack of real processes, what it promised, and what is true."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from backchannel.db import Database, migrate
from tests.servers import Postgres, Valkey
from tests.trip.stack import Stack

_MIGRATING = threading.Lock()  # Alembic's context is one for all threads of a process
TERMINAL = ("succeeded", "failed", "cancelled", "expired")


class World:
    """A stack, the jobs it has answered 202 for, and how long each answer took."""

    def __init__(
        self,
        home: Path,
        valkey: Valkey,
        postgres: Postgres | None,
        database_url: str,
        settings: dict[str, str],
    ) -> None:
        with _MIGRATING:
            migrate(database_url)
        self.stack = Stack(home, valkey, database_url, **settings)
        self.valkey = valkey
        self.postgres = postgres
        self.database = Database(database_url, name="chaos")
        self.accepted: dict[str, str] = {}  # job id → prompt
        self.accept_s: list[float] = []
        self.workers: list[subprocess.Popen[bytes]] = []
        self.kills = 0

    def close(self) -> None:
        """Stop everything."""
        self.stack.close()
        self.database.close()

    # ------------------------------------------------------------ processes

    def worker(self, jobs_in_flight: int = 50, fault: str = "") -> subprocess.Popen[bytes]:
        """Start a worker; with a fault point armed it will kill itself there."""
        env = self.stack.env
        env["BACKCHANNEL_FAULT"] = fault
        try:
            # an armed one may be dead before it is ready
            process = self.stack.worker(jobs_in_flight, wait=not fault)
        finally:
            del env["BACKCHANNEL_FAULT"]
        self.workers.append(process)
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill -9."""
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            self.kills += 1
        self.workers.remove(process)

    @contextmanager
    def every(self, seconds: float, what: Any) -> Iterator[None]:
        """Do something again and again in the background while the block runs."""
        stop = threading.Event()

        def again() -> None:
            while not stop.wait(seconds):
                what()

        thread = threading.Thread(target=again, name="havoc", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=90)

    # ------------------------------------------------------------ jobs

    async def accept(self, count: int, model: str, **body: Any) -> list[str]:
        """POST jobs, 50 at a time; every 202 is a promise to be checked."""
        slots = asyncio.Semaphore(50)
        made: list[str] = []

        async def one(client: httpx2.AsyncClient, number: int) -> None:
            prompt = f"{model} {number} {len(self.accepted)} {time.monotonic_ns()}"
            async with slots:
                started = time.monotonic()
                asked = {"model": model, "prompt": prompt, **body}
                answer = await client.post("/v1/jobs", json=asked)
                self.accept_s.append(time.monotonic() - started)
            if answer.status_code == 202:
                job_id = answer.json()["id"]
                self.accepted[job_id] = prompt
                made.append(job_id)

        async with httpx2.AsyncClient(base_url=self.stack.url, timeout=60) as client:
            await asyncio.gather(*[one(client, number) for number in range(count)])
        return made

    def states(self) -> dict[str, int]:
        """How many jobs are in each state."""
        rows = self.rows("SELECT state, count(*) AS n FROM jobs GROUP BY state")
        return {row.state: row.n for row in rows}

    def settle(self, within_s: float) -> float:
        """Wait until every job is finished; returns the seconds it took."""
        started = time.monotonic()
        while any(state not in TERMINAL for state in self.states()):
            if time.monotonic() - started > within_s:
                return time.monotonic() - started  # the checker calls it lost
            time.sleep(0.25)
        time.sleep(1.0)  # zombies and late flushes may show themselves
        return time.monotonic() - started

    def rows(self, statement: str) -> list[Any]:
        """Rows of a SELECT."""
        return self.database.read_now(lambda c: list(c.exec_driver_sql(statement).all()))
