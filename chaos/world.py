"""One installation to be broken: a stack of real processes, what it promised, and what is true."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from backchannel.db import Database, migrate
from chaos.proxy import Proxy
from tests.servers import Postgres, Valkey, free_port
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
        *,
        proxy: Proxy | None = None,
        limit_s: float = 300.0,
    ) -> None:
        with _MIGRATING:
            migrate(database_url)
        self.stack = Stack(home, valkey, database_url, **settings)
        fake = self.stack.env["BACKCHANNEL_PROVIDERS__OPENAI__BASE_URL"].removesuffix("/v1")
        self.stack.env |= {
            "BACKCHANNEL_PROVIDERS__GROQ__BASE_URL": f"{fake}/v1",
            "GROQ_API_KEY": "gsk-test-groq",
            "BACKCHANNEL_PROVIDERS__OLLAMA__BASE_URL": f"{fake}/ollama/v1",
            "BACKCHANNEL_PROVIDERS__LMSTUDIO__BASE_URL": f"http://127.0.0.1:{free_port()}/v1",
            "BACKCHANNEL_EGRESS_ALLOW": "loopback",
        }
        self.valkey = valkey
        self.postgres = postgres
        self.proxy = proxy
        self.ends = time.monotonic() + limit_s
        self.database = Database(database_url, name="chaos")
        self.accepted: dict[str, str] = {}  # job id → prompt
        self.accept_s: list[float] = []
        self.answers: Counter[int] = Counter()  # status codes of POSTs
        self.workers: list[subprocess.Popen[bytes]] = []
        self.kills = 0
        self.killed: dict[int, float] = {}  # pid → wall-clock seconds

    def close(self) -> None:
        """Stop everything."""
        self.stack.close()
        self.database.close()

    # ------------------------------------------------------------ processes

    def worker(
        self,
        jobs_in_flight: int = 50,
        fault: str = "",
        env: dict[str, str] | None = None,
        *,
        wait: bool = True,
    ) -> subprocess.Popen[bytes]:
        """Start a worker; with a fault point armed it will kill itself there."""
        before = dict(self.stack.env)
        self.stack.env |= {"BACKCHANNEL_FAULT": fault, **(env or {})}
        try:
            # an armed one may be dead before it is ready
            process = self.stack.worker(jobs_in_flight, wait=wait and not fault)
        finally:
            self.stack.env = before
        self.workers.append(process)
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill -9."""
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            self.killed[process.pid] = time.time()
            process.wait()
            self.kills += 1
        self.workers.remove(process)

    def kill_all(self) -> None:
        """Kill -9 the API, the workers and Valkey; what has been stored is all that is left."""
        for process in self.stack.processes[1:]:  # the first is the provider, not ours to kill
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                self.kills += 1
        self.workers.clear()
        self.valkey.kill()  # does nothing when it is down
        self.kills += 1

    def start_api(self) -> None:
        """Start the API anew, elsewhere; jobs are sent there from now on."""
        self.stack.url = ""
        self.stack.api()

    def listen(self) -> None:
        """Ask to be told of every job's end, where nobody listens: each finish writes a notice."""
        url = f"http://127.0.0.1:{free_port()}/"
        asked = {"url": url, "event_types": [f"job.{state}" for state in TERMINAL]}
        httpx2.post(f"{self.stack.url}/v1/webhooks", json=asked, timeout=30).raise_for_status()

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

    async def accept(
        self, count: int, model: str, *, insist: bool = False, at_once: int = 50, **body: Any
    ) -> list[str]:
        """POST jobs, so many at once; every 202 is a promise to be checked.

        Args:
            insist: With an Idempotency-Key, and after a 503 again until it is accepted.
        """
        slots = asyncio.Semaphore(at_once)
        made: list[str] = []

        async def one(client: httpx2.AsyncClient, number: int) -> None:
            prompt = f"{model} {number} {len(self.accepted)} {time.monotonic_ns()}"
            async with slots:
                asked = {"model": model, "prompt": prompt, **body}
                headers = {"Idempotency-Key": prompt} if insist else {}
                while True:
                    started = time.monotonic()
                    answer = await client.post("/v1/jobs", json=asked, headers=headers)
                    self.accept_s.append(time.monotonic() - started)
                    self.answers[answer.status_code] += 1
                    if not insist or answer.status_code != 503 or started > self.ends:
                        break
                    await asyncio.sleep(float(answer.headers["Retry-After"]))
            if answer.status_code == 202:
                job_id = answer.json()["id"]
                self.accepted[job_id] = prompt
                made.append(job_id)

        # below the server's 5 s: a request on a connection it just closed would be no answer
        limits = httpx2.Limits(max_connections=at_once, keepalive_expiry=2)
        async with httpx2.AsyncClient(base_url=self.stack.url, timeout=60, limits=limits) as client:
            await asyncio.gather(*[one(client, number) for number in range(count)])
        return made

    def ledger(self) -> list[dict[str, Any]]:
        """The provider's own record: a line at each call's start, and one at its end."""
        return [json.loads(line) for line in self.stack.ledger.read_text().splitlines()]

    def states(self) -> dict[str, int]:
        """How many jobs are in each state."""
        rows = self.rows("SELECT state, count(*) AS n FROM jobs GROUP BY state")
        return {row.state: row.n for row in rows}

    def settle(self, within_s: float) -> float:
        """Wait until every job is finished; returns the seconds it took."""
        started = time.monotonic()
        while any(state not in TERMINAL for state in self.states()):
            if time.monotonic() > min(started + within_s, self.ends):
                return time.monotonic() - started  # the checker calls it lost
            time.sleep(0.25)
        time.sleep(1.0)  # zombies and late flushes may show themselves
        return time.monotonic() - started

    def memory_mb(self, pid: int, what: str = "VmHWM") -> float:
        """A process's memory as proc(5) calls it; by default the most it has held so far."""
        status = Path(f"/proc/{pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(what))
        return int(line.split()[1]) / 1024

    def limit_memory(self, process: subprocess.Popen[bytes], mb: float) -> None:
        """From now on the system gives it no more address space than this."""
        limit = int(mb) << 20
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))

    def rows(self, statement: str) -> list[Any]:
        """Rows of a SELECT."""
        return self.database.read_now(lambda c: list(c.exec_driver_sql(statement).all()))
