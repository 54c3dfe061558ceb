"""The database: engines, a process's way to read and write, and migrations before first use."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import stamina
import structlog
from sqlalchemy import BigInteger, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from backchannel.errors import SetupError
from backchannel.outages import translated, unavailable
from backchannel.writer import Asked, Awaited, Part, Work, Writer

log = structlog.get_logger()
T = TypeVar("T")
I = TypeVar("I")  # noqa: E741

BUSY_S = 10.0


class now_ms(FunctionElement[int]):
    """The database's clock in milliseconds: the server's on PostgreSQL, the host's on SQLite."""

    type = BigInteger()
    inherit_cache = True


@compiles(now_ms, "postgresql")
def _now_ms_postgresql(_element: Any, _compiler: Any, **_kw: Any) -> str:
    # clock_timestamp, not now(): a group commit is one transaction, and its rows are not
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)"


@compiles(now_ms, "sqlite")
def _now_ms_sqlite(_element: Any, _compiler: Any, **_kw: Any) -> str:
    # 2440587.5 is the Julian day of 1970-01-01; unixepoch('subsec') needs SQLite 3.42
    return "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"


NOW = now_ms()

# How long a caller waits: for a dead connection to be noticed (9 s), for a new one (5 s), and some.
PATIENCE_S = 20.0


def _encode_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


# JSON columns are on every path: four times as fast as the standard library's
_JSON: dict[str, Any] = {
    "json_serializer": _encode_json,
    "json_deserializer": msgspec.json.decode,
}


def create(url: str, *, limited: bool = False) -> Engine:
    """An engine whose transactions on SQLite start with BEGIN IMMEDIATE.

    A deferred transaction that reads and then writes fails with "database is locked" whatever the
    busy timeout is (2,289 of 4,000 in a test); one that starts as a writer waits its turn.

    Args:
        limited: Give up on statements of more than 8 s; migrations may take longer.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        engine = create_engine(
            parsed, pool_size=8, max_overflow=0, pool_timeout=5, pool_pre_ping=True, **_JSON
        )
        if limited:
            event.listen(engine, "do_connect", _connect_limited)
        return engine
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        raise SetupError(
            f"BACKCHANNEL_DATABASE_URL is of type '{parsed.get_backend_name()}'; use "
            "postgresql://user:password@host/name, or leave it unset for SQLite."
        )
    Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        parsed,
        pool_size=8,
        max_overflow=0,
        connect_args={"timeout": BUSY_S, "isolation_level": None},
        **_JSON,
    )

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        # on a new file this waits for nobody: with processes that start together it is "locked"
        for attempt in stamina.retry_context(
            on=sqlite3.OperationalError,
            attempts=None,
            timeout=BUSY_S,
            wait_initial=0.01,
            wait_max=0.5,
        ):
            with attempt:
                connection.execute("PRAGMA journal_mode = WAL")
        # FULL: a commit that was acknowledged survives the power cord; group commit makes it cheap
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        reading = connection.get_execution_options().get("reading", False)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


def _connect_limited(_dialect: Any, _record: Any, args: Any, named: Any) -> Any:
    from backchannel.postgres import LIMITS, LimitedConnection

    return LimitedConnection.connect(*args, **{**LIMITS, **named})


class Database:
    """One process's way to the database: reads on a few threads, all writes through one.

    Open it after fork; `close` it at exit. Work is a function of a `Connection`; it must not
    commit, and it may run twice if the first try was rolled back.
    """

    def __init__(self, url: str, *, name: str) -> None:
        self.engine = create(url, limited=True)
        self._readers = ThreadPoolExecutor(4, thread_name_prefix=f"{name}-db-reader")
        self._writer = Writer(self.engine, name=f"{name}-db-writer")

    async def write(self, work: Work[T]) -> T:
        """Run work in the next group commit; returns once it is durable.

        Raises:
            Unavailable: The database does not answer; the work may or may not have happened.
        """
        result: T = await self._wait_for(work)
        return result

    async def write_together(
        self, together: Callable[[Connection, list[I]], list[T]], item: I
    ) -> T:
        """`write` for what costs far less for many at once: one call for all items of a group.

        Args:
            together: Answers for its items one by one, in their order.
        """
        result: T = await self._wait_for(Part(together, item))
        return result

    async def _wait_for(self, asked: Asked) -> Any:
        with _patience():
            async with asyncio.timeout(PATIENCE_S):
                reply = Awaited()
                self._writer.put(asked, reply)
                return await reply

    def submit(self, work: Work[T]) -> Future[T]:
        """`write` for threads: the future completes once the work is durable."""
        future: Future[T] = Future()
        self._writer.put(work, future)
        return future

    async def read(self, work: Work[T]) -> T:
        """Run a reading function on a reader thread.

        Raises:
            Unavailable: The database does not answer.
        """
        loop = asyncio.get_running_loop()
        with _patience():
            async with asyncio.timeout(PATIENCE_S):
                return await loop.run_in_executor(self._readers, self.read_now, work)

    def read_now(self, work: Work[T]) -> T:
        """`read` on this thread, for the command line and for start-up."""
        try:
            with self.engine.connect() as connection:
                return work(connection.execution_options(reading=True))
        except SQLAlchemyError as error:
            raise translated(error) from error

    def write_now(self, work: Work[T]) -> T:
        """`write` on this thread: waits for the commit."""
        return self.submit(work).result()

    def close(self) -> None:
        """Finish what was submitted, then let go of the threads and connections."""
        self._writer.close(BUSY_S + 5)
        self._readers.shutdown(cancel_futures=True)
        self.engine.dispose()


@contextmanager
def _patience() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise unavailable(f"The database has not answered for {PATIENCE_S:.0f} s.") from error


HEAD = "0009"  # the newest migration; a test compares it with the scripts


def migrate(url: str) -> None:
    """Bring the schema up to date; safe to call from many processes at once.

    Raises:
        SetupError: The database is newer than this code, or cannot be opened.
    """
    engine = create(url)
    try:
        with engine.begin() as connection:
            found = _revision(connection)
        if found == HEAD:
            return
        _upgrade(engine, found)
    except DBAPIError as error:
        cause = str(error.orig).strip().splitlines()[0]
        raise SetupError(
            f"Cannot open the database {engine.url!r}: {cause}. Is it running, and is "
            "BACKCHANNEL_DATABASE_URL right?"
        ) from error
    finally:
        engine.dispose()


def _revision(connection: Connection) -> str | None:
    if not connection.dialect.has_table(connection, "alembic_version"):
        return None
    return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()


def _upgrade(engine: Engine, found: str | None) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise SetupError(
            f"The database is at revision {found}, which is newer than this version of "
            "Backchannel. Upgrade Backchannel, or point BACKCHANNEL_DATABASE_URL elsewhere."
        )
    started = time.monotonic()
    # one transaction that starts as a writer (SQLite) or takes a lock (PostgreSQL): the other
    # processes that start now wait here, and then find nothing to do
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7266826)")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    log.info(
        "The database schema is up to date.",
        revision=HEAD,
        seconds=round(time.monotonic() - started, 2),
    )
