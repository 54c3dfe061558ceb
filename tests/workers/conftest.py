"""A worker process's things inside the test, on real servers, with times short enough to see."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from backchannel import accept, bus, events
from backchannel.accept import NewJob
from backchannel.db import Database
from backchannel.settings import get_settings
from backchannel.tables import INTERACTIVE
from tests.fake_provider import FakeProvider
from workers import engine
from workers.process import Process
from workers.report import Report

FAST = {
    "LEASE_S": "2",
    "HEARTBEAT_S": "0.2",
    "FENCE_S": "1.5",
    "BACKOFF_MAX_S": "0.05",
    "MAX_RETRIES": "2",
    "FIRST_BYTE_S": "2",
    "IDLE_S": "1",
    "ATTEMPT_S": "4",
}


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Where the fake provider writes what was really called."""
    return tmp_path / "ledger.jsonl"


@pytest.fixture
async def fake(ledger: Path) -> AsyncIterator[FakeProvider]:
    """The one fake: a provider on loopback."""
    async with FakeProvider(ledger) as provider:
        yield provider


@pytest.fixture
def environment(
    monkeypatch: pytest.MonkeyPatch, database_url: str, redis_url: str, fake: FakeProvider
) -> pytest.MonkeyPatch:
    """Settings of a worker: openai and anthropic are the fake, all times are short."""
    fast = {f"BACKCHANNEL_{name}": value for name, value in FAST.items()}
    for name, value in {
        **fast,
        "BACKCHANNEL_DATABASE_URL": database_url,
        "BACKCHANNEL_REDIS_URL": redis_url,
        "BACKCHANNEL_PROVIDERS__OPENAI__BASE_URL": f"{fake.url}/v1",
        "BACKCHANNEL_PROVIDERS__ANTHROPIC__BASE_URL": fake.url,
        "OPENAI_API_KEY": "sk-test-openai",
        "ANTHROPIC_API_KEY": "sk-test-anthropic",
    }.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    return monkeypatch


@pytest.fixture
def new_process(environment: pytest.MonkeyPatch) -> Iterator[Callable[[], Process]]:
    """Open worker processes' things; closed at the end, the last first."""
    opened: list[Process] = []

    def make() -> Process:
        opened.append(Process(get_settings(), slots=10).open())
        return opened[-1]

    yield make
    for each in reversed(opened):
        each.close()


@pytest.fixture
def process(new_process: Callable[[], Process]) -> Process:
    """One worker process's things."""
    return new_process()


class Bench:
    """Accept jobs, run attempts, read what is on the books."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def accept(self, model: str = "openai:ok", prompt: str = "Hello", **fields: Any) -> str:
        """A committed job; the caretaker may find it, no doorbell is rung."""
        provider, _, name = model.partition(":")
        whole: dict[str, Any] = {
            "caller": "local",
            "lane": INTERACTIVE,
            "provider": provider,
            "model": name,
            "requested_model": model,
            "model_reason": "test",
            "messages": [{"role": "user", "content": prompt}],
            "parameters": {},
            "request_hash": "",
            "deadline_s": 60.0,
            **fields,
        }
        return self.database.write_now(lambda c: accept.accept(c, NewJob(**whole))).job_id

    def start(self, process: Process, job_id: str) -> Future[Report | None]:
        """One doorbell's coroutine on a process's loop."""
        return process.submit(engine.run(process, job_id))

    def rows(self, statement: str, *values: object) -> list[Any]:
        """Rows of a SELECT written for both databases, with ``?`` for each value."""

        def select(connection: Any) -> list[Any]:
            style = "%s" if connection.dialect.name == "postgresql" else "?"
            return list(connection.exec_driver_sql(statement.replace("?", style), values).all())

        return self.database.read_now(select)

    def job(self, job_id: str) -> Any:
        """The job's row."""
        (row,) = self.rows("SELECT * FROM jobs WHERE id = ?", job_id)
        return row

    def usage(self, job_id: str) -> list[Any]:
        """The job's usage rows in order of attempt."""
        return self.rows("SELECT * FROM usage WHERE job_id = ? ORDER BY attempt", job_id)

    def log(self, job_id: str) -> list[events.Event]:
        """The stored stream."""
        (row,) = self.rows("SELECT log FROM job_results WHERE job_id = ?", job_id)
        return events.unpack_log(bytes(row.log))

    async def live_log(self, process: Process, job_id: str) -> list[events.Event]:
        """The stream as Redis has it, once everything was flushed."""

        async def read() -> list[events.Event]:
            await process.publisher.flush()
            return await bus.read_log(process.redis, process.settings.redis_prefix, job_id)

        return process.submit(read()).result(timeout=10)


@pytest.fixture
def bench(environment: pytest.MonkeyPatch, database: Database) -> Bench:
    """The test's own way to the database the worker uses."""
    return Bench(database)
