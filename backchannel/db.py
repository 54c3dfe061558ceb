"""The database: engines, one writer thread with group commit, and migrations before first use."""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import stamina
import structlog
from sqlalchemy import (
    BigInteger,
    Connection,
    Engine,
    Executable,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from backchannel.errors import SetupError, Unavailable

log = structlog.get_logger()
T = TypeVar("T")
I = TypeVar("I")  # noqa: E741
Work = Callable[[Connection], T]

# Rows of one group commit; past a few hundred a larger commit only delays its first row.
MAX_GROUP = 500
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


class _Awaited:
    """The future of a coroutine: settled on its loop, with all others of its group in one call."""

    __slots__ = ("_error", "_future", "_result", "loop")

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._future: asyncio.Future[Any] = self.loop.create_future()
        self._error: BaseException | None = None
        self._result: Any = None

    def __await__(self) -> Generator[Any, None, Any]:
        return self._future.__await__()

    def set_running_or_notify_cancel(self) -> bool:
        return not self._future.cancelled()

    def set_result(self, result: Any) -> None:
        self._result = result

    def set_exception(self, error: BaseException) -> None:
        self._error = error

    def settle(self) -> None:
        """On the loop; who went away meanwhile is not told."""
        if self._future.done():
            return
        if self._error is not None:
            self._future.set_exception(self._error)
        else:
            self._future.set_result(self._result)


class _Part(NamedTuple):
    """One item of a work that is done for all items of a group together."""

    together: Callable[[Connection, list[Any]], list[Any]]
    item: Any


_Reply = Future[Any] | _Awaited
_Asked = Work[Any] | _Part


def _settle(replies: Sequence[_Reply]) -> None:
    """Wake each loop once: a wake-up per row cost more than the row."""
    awaited: dict[asyncio.AbstractEventLoop, list[_Awaited]] = {}
    for reply in replies:
        if isinstance(reply, _Awaited):
            awaited.setdefault(reply.loop, []).append(reply)
    for loop, theirs in awaited.items():
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_settle_all, theirs)


def _settle_all(awaited: Sequence[_Awaited]) -> None:
    for each in awaited:
        each.settle()


_AT_END = "backchannel_at_end"


def at_end(connection: Connection, do: Callable[[Connection, list[T]], None], item: T) -> None:
    """Have `do` called once with all items of this transaction, just before it commits.

    For rows that many jobs share: one statement per group instead of one per job, and their locks
    are held for the commit only.
    """
    connection.info.setdefault(_AT_END, {}).setdefault(do, []).append(item)


def in_bulk(statement: Executable) -> Callable[[Connection, list[dict[str, Any]]], None]:
    """For `at_end`: one execution of a statement for the rows of a whole group.

    A row costs a fifth of its own execution then, and on PostgreSQL no round trip.
    """

    def execute(connection: Connection, rows: list[dict[str, Any]]) -> None:
        connection.execute(statement, rows)

    return execute


class Database:
    """One process's way to the database: reads on a few threads, all writes through one.

    Open it after fork; `close` it at exit. Work is a function of a `Connection`; it must not
    commit, and it may run twice if the first try was rolled back.
    """

    def __init__(self, url: str, *, name: str) -> None:
        self.engine = create(url, limited=True)
        self._readers = ThreadPoolExecutor(4, thread_name_prefix=f"{name}-db-reader")
        self._queue: queue.SimpleQueue[tuple[_Asked, _Reply] | None] = queue.SimpleQueue()
        self._closed = False
        self._writer = threading.Thread(
            target=self._write_forever, name=f"{name}-db-writer", daemon=True
        )
        self._writer.start()

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
        result: T = await self._wait_for(_Part(together, item))
        return result

    async def _wait_for(self, asked: _Asked) -> Any:
        with _patience():
            async with asyncio.timeout(PATIENCE_S):
                reply = _Awaited()
                self._put(asked, reply)
                return await reply

    def submit(self, work: Work[T]) -> Future[T]:
        """`write` for threads: the future completes once the work is durable."""
        future: Future[T] = Future()
        self._put(work, future)
        return future

    def _put(self, asked: _Asked, reply: _Reply) -> None:
        if self._closed:
            reply.set_exception(_closed())
            _settle([reply])
        else:
            self._queue.put((asked, reply))

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
            raise _translated(error) from error

    def write_now(self, work: Work[T]) -> T:
        """`write` on this thread: waits for the commit."""
        return self.submit(work).result()

    def close(self) -> None:
        """Finish what was submitted, then let go of the threads and connections."""
        self._closed = True
        self._queue.put(None)
        self._writer.join(timeout=BUSY_S + 5)
        with suppress(queue.Empty):
            while True:  # what slipped in behind the end
                if (item := self._queue.get_nowait()) is not None:
                    item[1].set_exception(_closed())
                    _settle([item[1]])
        self._readers.shutdown(cancel_futures=True)
        self.engine.dispose()

    def _write_forever(self) -> None:
        open_ = True
        while open_:
            item = self._queue.get()
            if item is None:
                return
            group = [item]
            # whatever queued while the last commit ran goes into this one; no timer
            while len(group) < MAX_GROUP:
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    open_ = False
                    break
                group.append(item)
            # From here on a caller that goes away cannot cancel its future under the writer's
            # hands, which would end this thread; what was cancelled before is not begun.
            group = [each for each in group if each[1].set_running_or_notify_cancel()]
            if group:
                self._commit(group)
                _settle([reply for _, reply in group])

    def _commit(self, group: Sequence[tuple[_Asked, _Reply]], tries: int = 5) -> bool:
        """Write a group; tells whether its transaction waited for a lock in vain."""
        try:
            with self.engine.begin() as connection:
                connection.info.pop(_AT_END, None)  # of a transaction that was rolled back
                results = _do(connection, [asked for asked, _ in group])
                for do, items in connection.info.pop(_AT_END, {}).items():
                    do(connection, items)
        except BaseException as error:
            # One bad piece of work must not fail its neighbours, and a deadlock between two groups
            # cannot happen between single pieces: each again, alone. The work is guarded, so doing
            # again what a lost reply left undecided changes nothing.
            if not _is_outage(error) and (len(group) > 1 or (_is_conflict(error) and tries > 1)):
                self._commit_each(group, tries - 1)
            else:
                for _, future in group:
                    future.set_exception(_translated(error))
            return _is_held_up(error)
        for (_, future), result in zip(group, results, strict=True):
            future.set_result(result)
        return False

    def _commit_each(self, group: Sequence[tuple[_Asked, _Reply]], tries: int) -> None:
        held_up = 0
        for each in group:
            if held_up < 2:
                held_up += self._commit([each], tries)
            else:  # no single row: the whole table is locked, and each would wait 5 s to hear it
                each[1].set_exception(_busy("others hold locks"))


def _do(connection: Connection, group: list[_Asked]) -> list[Any]:
    results: list[Any] = [None] * len(group)
    parts: dict[Any, list[int]] = {}
    for place, asked in enumerate(group):
        if isinstance(asked, _Part):
            parts.setdefault(asked.together, []).append(place)
        else:
            results[place] = asked(connection)
    for together, places in parts.items():
        items = [group[place].item for place in places]  # type: ignore[union-attr]
        for place, result in zip(places, together(connection, items), strict=True):
            results[place] = result
    return results


@contextmanager
def _patience() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise _unavailable(f"The database has not answered for {PATIENCE_S:.0f} s.") from error


def _closed() -> Unavailable:
    return Unavailable("The database was closed: this process is stopping.")


def _is_conflict(error: BaseException) -> bool:
    """Two PostgreSQL transactions met: serialization failure or deadlock; one goes again."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) in {"40001", "40P01"}


def _is_held_up(error: BaseException) -> bool:
    """A lock was not to be had in time, or a statement took too long (PostgreSQL)."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) in {"55P03", "57014"}


# PostgreSQL's own words for "not now": read-only (a failover), shutting down, out of resources,
# connection lost (https://www.postgresql.org/docs/current/errcodes-appendix.html).
_NOT_NOW = ("25006", "25P03", "57P", "53", "08")
# And SQLite's: busy, locked, out of memory, read-only, I/O error, full, cannot open, protocol
# (https://www.sqlite.org/rescode.html).
_SQLITE_NOT_NOW = {5, 6, 7, 8, 10, 13, 14, 15}
_FULL = ("53100", 13)


def _code(error: BaseException) -> str | int | None:
    """What the database itself calls it, if it said anything."""
    original = getattr(error, "orig", None)
    sqlite_code: int | None = getattr(original, "sqlite_errorcode", None)
    if sqlite_code is not None:
        return sqlite_code & 0xFF  # the rest is detail
    sqlstate: str | None = getattr(original, "sqlstate", None)
    return sqlstate


def _is_outage(error: BaseException) -> bool:
    """The database's fault and not the statement's: whatever else is asked now fails too."""
    match _code(error):
        case str(sqlstate):
            return sqlstate.startswith(_NOT_NOW)
        case int(sqlite_code):
            return sqlite_code in _SQLITE_NOT_NOW
        case _:  # it said nothing: there is no connection
            return isinstance(error, OperationalError | PoolTimeout) or (
                isinstance(error, DBAPIError) and error.connection_invalidated
            )


def _translated(error: BaseException) -> BaseException:
    cause = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
    if _code(error) in _FULL:
        return Unavailable(
            f"The database's disk is full ({cause}). Free some space: nothing else need be done.",
            code="disk_full",
        )
    if _is_conflict(error) or _is_held_up(error):
        return _busy(cause)
    if _is_outage(error):
        return _unavailable(f"The database does not answer: {cause}")
    return error


def _busy(cause: str) -> Unavailable:
    return _unavailable(f"The database is held up: {cause}")


def _unavailable(sentence: str) -> Unavailable:
    return Unavailable(sentence, code="database_unavailable")


HEAD = "0007"  # the newest migration; a test compares it with the scripts


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
