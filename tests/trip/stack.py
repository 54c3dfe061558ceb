"""Whole journeys: real API and worker processes, a real Valkey, the fake provider a process."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
from sqlalchemy import make_url

from tests.servers import Valkey, free_port

ROOT = Path(__file__).parents[2]
READY_S = 60.0  # two loaded cores may take many times the usual 3 s
QUICK = {  # times short enough to wait for
    "BACKCHANNEL_LEASE_S": "3",
    "BACKCHANNEL_HEARTBEAT_S": "0.5",
    "BACKCHANNEL_FENCE_S": "2",
    "BACKCHANNEL_BACKOFF_MAX_S": "0.2",
}


class Event(NamedTuple):
    """One SSE message as it came."""

    id: str
    event: str
    data: str

    @property
    def fields(self) -> dict[str, Any]:
        whole: dict[str, Any] = json.loads(self.data)
        return whole


class Stack:
    """Processes of one installation; everything started is stopped by `close`, by its pid."""

    def __init__(self, home: Path, valkey: Valkey, database_url: str, **settings: str) -> None:
        self.home = home
        self.valkey = valkey
        self.ledger = home / "ledger.jsonl"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.worker_logs: dict[int, Path] = {}
        self.env = {
            **os.environ,
            "BACKCHANNEL_HOME": str(home),
            "BACKCHANNEL_DATABASE_URL": database_url,
            "BACKCHANNEL_REDIS_URL": valkey.url,
            "OPENAI_API_KEY": "sk-test-openai",
            "ANTHROPIC_API_KEY": "sk-test-anthropic",
            "PYTHONUNBUFFERED": "1",
            **QUICK,
            **settings,
        }
        url = self.fake()
        self.env["BACKCHANNEL_PROVIDERS__OPENAI__BASE_URL"] = f"{url}/v1"
        self.env["BACKCHANNEL_PROVIDERS__ANTHROPIC__BASE_URL"] = url
        self.url = ""

    def fake(self, port: str = "0") -> str:
        """Start a fake provider, on a port of its own choice if none is given; returns its URL."""
        argv = ("--ledger", str(self.ledger), "--port", port)
        fake = self._spawn("fake", "tests.fake_provider", *argv, pipe=True)
        assert fake.stdout is not None
        url: str = json.loads(fake.stdout.readline())["url"]
        return url

    def _spawn(self, name: str, *argv: str, pipe: bool = False) -> subprocess.Popen[bytes]:
        with (self.home / f"{name}-{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *argv],
                cwd=ROOT,
                env=self.env,
                stdout=subprocess.PIPE if pipe else log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def api(self) -> str:
        """Start an API process and wait until it answers; returns its URL."""
        port = free_port()
        process = self._spawn("api", "backchannel", "api", "--port", str(port))
        url = f"http://127.0.0.1:{port}"
        self._until(process, lambda: httpx2.get(f"{url}/healthz", timeout=2).status_code == 200)
        self.url = self.url or url
        return url

    def worker(self, jobs_in_flight: int = 50, *, wait: bool = True) -> subprocess.Popen[bytes]:
        """Start a worker process and wait until it is ready."""
        log = self.home / f"worker-{len(self.processes)}.log"
        process = self._spawn(
            "worker", "backchannel", "worker", "--jobs-in-flight", str(jobs_in_flight)
        )
        self.worker_logs[process.pid] = log
        if wait:
            self._until(process, lambda: self.is_ready(process))
        return process

    def is_ready(self, worker: subprocess.Popen[bytes]) -> bool:
        """Whether a worker process takes jobs."""
        return "The worker is ready." in self.worker_logs[worker.pid].read_text()

    def freeze(self, process: subprocess.Popen[bytes]) -> None:
        """SIGSTOP, but not in the middle of a SQLite commit.

        There the frozen process would keep the file's write lock, and nobody else could write
        until it thaws: true of every SQLite program, and not what a test of fencing is about.
        """
        while True:
            os.kill(process.pid, signal.SIGSTOP)
            if self._writable():
                return
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.02)

    def _writable(self) -> bool:
        path = make_url(self.env["BACKCHANNEL_DATABASE_URL"]).database
        if not path or not Path(path).is_file():
            return True  # PostgreSQL locks rows, and lets go of what a lost client held
        with closing(sqlite3.connect(path, timeout=0.5, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
        return True

    def execute(self, statement: str) -> None:
        """Change rows behind everybody's back, as time would."""
        path = make_url(self.env["BACKCHANNEL_DATABASE_URL"]).database
        with closing(sqlite3.connect(str(path), timeout=10)) as connection, connection:
            connection.execute(statement)

    def workers(self) -> int:
        """How many worker processes the API knows to be alive."""
        count: int = httpx2.get(f"{self.url}/readyz", timeout=5).json()["workers"]
        return count

    def _until(self, process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                if ready():
                    return
            except httpx2.HTTPError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"a process did not become ready:\n{self.logs()}")
            time.sleep(0.05)

    def logs(self) -> str:
        """The end of every process's log, for a failing test."""
        return "\n".join(
            f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}"
            for file in sorted(self.home.glob("*.log"))
        )

    def calls(self) -> list[dict[str, Any]]:
        """The fake provider's own record of the calls that were made."""
        entries = [json.loads(line) for line in self.ledger.read_text().splitlines()]
        return [entry for entry in entries if entry["at"] == "start"]

    def close(self) -> None:
        """Stop every process that still runs, hard."""
        for process in self.processes:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    # ------------------------------------------------------------ a user's requests

    def post(self, model: str = "openai:ok", prompt: str = "Hello", **body: Any) -> dict[str, Any]:
        """Accept a job."""
        answer = httpx2.post(
            f"{self.url}/v1/jobs", json={"model": model, "prompt": prompt, **body}, timeout=10
        )
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def job(self, job_id: str, wait: float = 0) -> dict[str, Any]:
        """A job as the API has it, after waiting for its end."""
        answer = httpx2.get(f"{self.url}/v1/jobs/{job_id}?wait={wait}", timeout=wait + 10)
        job: dict[str, Any] = answer.json()
        return job

    def finished(self, job_id: str, within_s: float = 60) -> dict[str, Any]:
        """A job once it is finished."""
        deadline = time.monotonic() + within_s
        while True:
            job = self.job(job_id, wait=min(within_s, 30))
            if job["state"] not in ("queued", "running"):
                return job
            assert time.monotonic() < deadline, f"{job}\n{self.logs()}"

    def usage(self) -> dict[str, Any]:
        """The whole usage."""
        whole: dict[str, Any] = httpx2.get(f"{self.url}/v1/usage", timeout=10).json()["total"]
        return whole


async def events(url: str, job_id: str, last_event_id: str | None = None) -> AsyncIterator[Event]:
    """A job's SSE stream, message by message."""
    headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
    async with (
        httpx2.AsyncClient(timeout=60) as client,
        client.stream("GET", f"{url}/v1/jobs/{job_id}/events", headers=headers) as response,
    ):
        assert response.status_code == 200
        message: dict[str, str] = {}
        async for line in response.aiter_lines():
            if line.startswith(":"):
                continue
            if line:
                name, _, value = line.partition(": ")
                message[name] = value
            elif message:
                yield Event(**message)
                message = {}


def text(stream: list[Event]) -> str:
    """The answer as a reader of the stream has it: a reset forgets what came before."""
    words: list[str] = []
    for event in stream:
        if event.event == "reset":
            words.clear()
        elif event.event == "delta":
            words.append(event.fields["text"])
    return "".join(words)
