"""How the cost of the next job grows with how many wait behind it: it must not."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import Connection, String, Table, insert, literal, select

from backchannel import lifecycle
from backchannel.accept import NewJob, accept
from backchannel.db import Database, migrate
from backchannel.dispatch import dispatch
from backchannel.tables import BATCH, jobs, requests
from benchmarks.figures import median
from benchmarks.processes import cpu_s
from benchmarks.progress import say
from tests.servers import postgres

SHALLOW = 1_000
TAKEN = 100  # of each measurement; they go back afterwards
NEW = NewJob(
    caller="local",
    lane=BATCH,
    provider="openai",
    model="t1-f0-d0",
    requested_model="openai:t1-f0-d0",
    model_reason="benchmark",
    messages=[{"role": "user", "content": "Hello?"}],
    parameters={},
    request_hash="",
    deadline_s=86_400,
)


def run(deep: int, rounds: int, kinds: tuple[str, ...]) -> dict[str, float]:
    """CPU microseconds to dispatch and claim a job, with few and with many in the queue."""
    figures: dict[str, float] = {"backlog.deep": deep}
    for kind in kinds:
        say(f"a backlog of {deep:,} on {kind}")
        found: dict[str, list[float]] = {"shallow": [], "deep": []}
        with ExitStack() as stack:
            urls, servers = _urls(kind, tuple(found), stack)
            databases = {name: _filled(name, url, stack) for name, url in urls.items()}
            databases["deep"].write_now(partial(_multiply, copies=deep // SHALLOW - 1))
            for _ in range(rounds + 1):
                for name, database in databases.items():
                    found[name].append(_take_us(database, servers))
        for name, values in found.items():
            figures[f"backlog.{kind}.{name}_us"] = median(values[1:])  # the first one warms up
    return figures


def _urls(kind: str, names: tuple[str, ...], stack: ExitStack) -> tuple[dict[str, str], list[int]]:
    """A database for each name, and the pids of their server."""
    if kind == "postgresql":
        server = stack.enter_context(postgres(durable=True))
        return {name: server.create(name) for name in names}, [server.pid]
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="bench-")))
    return {name: f"sqlite:///{folder}/{name}.db" for name in names}, []


def _filled(name: str, url: str, stack: ExitStack) -> Database:
    migrate(url)
    database = Database(url, name=name)
    stack.callback(database.close)
    database.write_now(_accept)
    return database


def _accept(connection: Connection) -> None:
    for _ in range(SHALLOW):
        accept(connection, NEW)


def _multiply(connection: Connection, copies: int) -> None:
    # straight in SQL: what is measured is the queue, not how it came to be
    for copy in range(copies):
        _copy(connection, jobs, "id", copy)
        _copy(connection, requests, "job_id", copy)
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("ANALYZE")


def _copy(connection: Connection, table: Table, key: str, copy: int) -> None:
    # behind all others, in the index as in the table: as what is accepted later
    later = literal(f"z{copy:03}", String)
    columns: list[Any] = [
        (later + column).label(key) if column.name == key else column for column in table.columns
    ]
    originals = select(*columns).where(table.c[key].startswith("job_"))
    connection.execute(insert(table).from_select([c.name for c in table.columns], originals))


def _take_us(database: Database, servers: list[int]) -> float:
    with database.engine.connect() as connection:
        before = cpu_s(servers) + time.thread_time()
        transaction = connection.begin()
        bells = dispatch(connection, BATCH, window=TAKEN, in_queue=0)
        for bell in bells:
            claim = lifecycle.claim(connection, bell.job_id, "benchmark", 20.0)
            assert claim is not None
        used = cpu_s(servers) + time.thread_time() - before
        assert len(bells) == TAKEN
        transaction.rollback()
    return used * 1e6 / TAKEN
