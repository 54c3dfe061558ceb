"""Backchannel as a user runs it: API and worker processes on a Valkey and a database of their own.

Durable as in production: SQLite and PostgreSQL wait for the disk. Settings are the defaults, but
for the slots of the worker.
"""

from __future__ import annotations

import asyncio
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from backchannel.db import Database, migrate
from benchmarks.processes import Child, cores, pin
from tests.servers import free_port, postgres, valkey

READY = "The worker is ready."
SLOTS = 1000
POLL_S = 0.02
# The interpreter itself writes down every import, whoever asks for it.
SPY = {"PYTHONPROFILEIMPORTTIME": "1"}
_FOREIGN = ("BACKCHANNEL_", "OPENAI_", "ANTHROPIC_")


class Installation:
    """One database, one Valkey, and the processes that were started on them."""

    def __init__(self, kind: str, provider: str, stack: ExitStack) -> None:
        self.kind = kind
        self._stack = stack
        self.home = Path(stack.enter_context(TemporaryDirectory(prefix="bench-")))
        self.roles: dict[str, list[int]] = {"worker": [], "api": []}
        self.valkey = stack.enter_context(valkey(appendonly=True))
        self.roles["valkey"] = [self.valkey.pid]
        if kind == "postgresql":
            server = stack.enter_context(postgres(durable=True))
            self.roles["postgres"] = [server.pid]
            self.database_url = server.create("benchmark")
        else:
            self.database_url = f"sqlite:///{self.home}/benchmark.db"
        migrate(self.database_url)
        self.database = Database(self.database_url, name="benchmark")
        stack.callback(self.database.close)
        own = {name: value for name, value in os.environ.items() if name.startswith(_FOREIGN)}
        self.env = {
            **dict.fromkeys(own, ""),
            "BACKCHANNEL_HOME": str(self.home),
            "BACKCHANNEL_DATABASE_URL": self.database_url,
            "BACKCHANNEL_REDIS_URL": self.valkey.url,
            "BACKCHANNEL_PROVIDERS__OPENAI__BASE_URL": f"{provider}/v1",
            "BACKCHANNEL_PROVIDERS__ANTHROPIC__BASE_URL": provider,
            "OPENAI_API_KEY": "sk-benchmark",
            "ANTHROPIC_API_KEY": "sk-benchmark",
        }
        self.url = ""

    def both(self, *, spy: bool = False) -> tuple[Child, Child]:
        """Start an API and a worker side by side."""
        api, worker = self._api(None, spy), self._worker(spy)
        self._until_answering(api)
        self._until_ready(worker)
        return api, worker

    def api(self, *, core: int | None = None) -> tuple[Child, float]:
        """Start the API; returns it and the seconds until it answered."""
        child = self._api(core)
        return child, self._until_answering(child)

    def worker(self) -> tuple[Child, float]:
        """Start a worker; returns it and the seconds until it was ready."""
        child = self._worker()
        return child, self._until_ready(child)

    def _api(self, core: int | None = None, spy: bool = False) -> Child:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        return self._start("api", "api", "--port", str(port), core=core, spy=spy)

    def _worker(self, spy: bool = False) -> Child:
        slots = ("--jobs-in-flight", str(SLOTS))
        return self._start("worker", "worker", *slots, core=cores()[1], spy=spy)

    def _until_answering(self, api: Child) -> float:
        return api.until(lambda: answers(f"{self.url}/healthz"), every_s=0.01)

    def _until_ready(self, worker: Child) -> float:
        return worker.until(lambda: READY in worker.log.read_text(), every_s=0.01)

    def _start(self, role: str, *argv: str, core: int | None, spy: bool) -> Child:
        child = Child(
            "backchannel",
            *argv,
            core=cores()[0] if core is None else core,
            log=self.home / f"{role}-{len(self.roles[role])}.log",
            env={**self.env, **(SPY if spy else {})},
        )
        self.roles[role].append(child.pid)
        self._stack.callback(child.stop)
        return child

    @contextmanager
    def measured(self, role: str) -> Iterator[None]:
        """Give a role the core of what is measured, and put all others on the driver's."""
        usual = {name: cores()[name == "worker"] for name in self.roles}
        self._pin({name: cores()[name == role] for name in self.roles})
        yield
        self._pin(usual)

    def _pin(self, places: dict[str, int]) -> None:
        for role, core in places.items():
            pin(self.roles[role], core)

    def states(self) -> dict[str, int]:
        """How many jobs are in each state."""
        rows = self._rows("SELECT state, count(*) FROM jobs GROUP BY state")
        return dict(rows)

    async def settled(self) -> None:
        """Wait until no job waits or runs; two partial indexes know, however many are done."""
        count = "SELECT count(*) FROM jobs WHERE state ="
        while self._rows(f"SELECT ({count} 'queued') + ({count} 'running')")[0][0]:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)

    def _rows(self, statement: str) -> list[Any]:
        return self.database.read_now(lambda c: list(c.exec_driver_sql(statement).all()))


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def serving(kind: str, provider: str) -> Iterator[Installation]:
    """An installation with an API and a worker."""
    with installation(kind, provider) as home:
        home.both()
        yield home


@contextmanager
def installation(kind: str, provider: str) -> Iterator[Installation]:
    """An installation with no process yet; everything is stopped at the end of the block."""
    with ExitStack() as stack:
        yield Installation(kind, provider, stack)
