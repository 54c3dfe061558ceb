"""The database: one writer for all, clear errors, a schema that is what the tables say."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, make_url, select, text
from sqlmodel import SQLModel

import backchannel.migrations
from backchannel.db import HEAD, Database, create, migrate, now_ms
from backchannel.errors import SetupError, Unavailable
from backchannel.tables import workers
from chaos.proxy import Proxy
from tests.servers import Postgres, postgres

_numbers = count(1)
spawn = multiprocessing.get_context("spawn")


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'new' / 'empty.db'}"
        return
    server: Postgres = request.getfixturevalue("postgres_server")
    name = f"empty_{next(_numbers)}"
    yield server.create(name)
    server.drop(name)


def sign_on(owner: str) -> Any:
    row = {"owner": owner, "host": "h", "pid": 1, "slots": 1, "in_flight": 0}

    def work(connection: Connection) -> str:
        connection.execute(workers.insert(), row | {"started_ms": 1, "seen_ms": 1})
        return owner

    return work


def run_processes(target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
    processes = [spawn.Process(target=target, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def owners(database: Database) -> set[str]:
    return set(database.read_now(lambda c: c.execute(select(workers.c.owner))).scalars())


class Gate:
    """Work that holds the writer, so that what is submitted meanwhile becomes one group."""

    def __init__(self, database: Database) -> None:
        self._open = threading.Event()
        self._reached = threading.Event()
        self.done = database.submit(self._work)
        assert self._reached.wait(10)

    def _work(self, connection: Connection) -> None:
        connection.execute(text("SELECT 1"))
        self._reached.set()
        assert self._open.wait(10)

    def open(self) -> None:
        self._open.set()
        self.done.result(10)


# ---------------------------------------------------------------- group commit


def test_what_queued_during_a_commit_is_one_transaction(database: Database) -> None:
    transactions: list[Any] = []

    def work(connection: Connection) -> None:
        transactions.append(connection.get_transaction())

    gate = Gate(database)
    futures = [database.submit(work) for _ in range(20)]
    gate.open()
    for future in futures:
        future.result(10)
    assert len(set(map(id, transactions))) == 1


def test_each_piece_of_a_group_gets_its_own_answer(database: Database) -> None:
    gate = Gate(database)
    futures = {name: database.submit(sign_on(name)) for name in map(str, range(50))}
    gate.open()
    assert {name: future.result(10) for name, future in futures.items()} == {n: n for n in futures}
    assert owners(database) == set(futures)


def test_one_bad_piece_does_not_fail_its_neighbours(database: Database) -> None:
    def bad(connection: Connection) -> None:
        connection.execute(workers.insert(), [{"owner": "half", "host": None}])

    gate = Gate(database)
    before = database.submit(sign_on("before"))
    broken = database.submit(bad)
    wrong = database.submit(lambda _: {}["nothing"])
    after = database.submit(sign_on("after"))
    gate.open()
    assert (before.result(10), after.result(10)) == ("before", "after")
    assert isinstance(wrong.exception(10), KeyError)
    assert broken.exception(10) is not None
    assert owners(database) == {"before", "after"}


def test_a_failing_piece_leaves_nothing_behind(database: Database) -> None:
    def half(connection: Connection) -> None:
        sign_on("half")(connection)
        raise ValueError("changed its mind")

    with pytest.raises(ValueError, match="changed its mind"):
        database.write_now(half)
    assert owners(database) == set()


async def test_a_caller_that_goes_away_does_not_stop_the_writer(database: Database) -> None:
    gate = Gate(database)
    leaving = asyncio.create_task(database.write(sign_on("never begun")))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    gate.open()

    reached, go_on = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        reached.set()
        assert go_on.wait(10)
        sign_on("begun")(connection)

    leaving = asyncio.create_task(database.write(slow))
    assert await asyncio.to_thread(reached.wait, 10)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    go_on.set()
    assert await asyncio.wait_for(database.write(sign_on("next")), 10) == "next"
    assert owners(database) == {"begun", "next"}


def test_close_finishes_what_was_submitted(database_url: str) -> None:
    database = Database(database_url, name="closing")
    futures = [database.submit(sign_on(str(number))) for number in range(30)]
    database.close()
    assert all(future.done() and not future.exception() for future in futures)


def test_a_write_after_close_fails_instead_of_waiting_for_ever(sqlite_url: str) -> None:
    database = Database(sqlite_url, name="closed")
    database.close()
    with pytest.raises(Unavailable):
        database.submit(sign_on("late")).result(10)


async def test_reads_do_not_wait_for_the_writer(database: Database) -> None:
    gate = Gate(database)
    found = await asyncio.wait_for(
        database.read(lambda c: c.execute(text("SELECT 1")).scalar_one()), 10
    )
    gate.open()
    assert found == 1


# ---------------------------------------------------------------- several writers


def _count_up(url: str, times: int) -> None:
    """Read, then write: what fails with "database is locked" unless it starts as a writer."""
    database = Database(url, name="counter")
    try:
        for _ in range(times):
            database.write_now(_one_more)
    finally:
        database.close()


def _one_more(connection: Connection) -> None:
    slots = workers.c.slots
    found = connection.execute(select(slots).with_for_update()).scalar_one()
    connection.execute(workers.update().values(slots=found + 1))


def test_threads_that_read_and_then_write_lose_nothing(database_url: str) -> None:
    database = Database(database_url, name="test")
    database.write_now(sign_on("sum"))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(_count_up, [database_url] * 4, [50] * 4))
    assert database.read_now(lambda c: c.execute(select(workers.c.slots)).scalar()) == 201
    database.close()


def test_processes_that_read_and_then_write_are_never_locked_out(sqlite_url: str) -> None:
    database = Database(sqlite_url, name="test")
    database.write_now(sign_on("sum"))
    run_processes(_count_up, [(sqlite_url, 100)] * 2)
    assert database.read_now(lambda c: c.execute(select(workers.c.slots)).scalar()) == 201
    database.close()


def test_two_groups_that_deadlock_are_both_written_in_the_end(postgres_url: str) -> None:
    left, right = (Database(postgres_url, name=name) for name in ("left", "right"))
    for owner in ("a", "b"):
        left.write_now(sign_on(owner))
    both_hold_one = threading.Barrier(2)

    def add(first: str, second: str) -> Any:
        tries = count()

        def work(connection: Connection) -> None:
            for owner in (first, second):
                connection.execute(
                    workers.update()
                    .where(workers.c.owner == owner)
                    .values(slots=workers.c.slots + 1)
                )
                if owner == first and next(tries) == 0:
                    both_hold_one.wait(10)

        return work

    futures = [left.submit(add("a", "b")), right.submit(add("b", "a"))]
    for future in futures:
        future.result(30)
    assert left.read_now(lambda c: c.execute(select(workers.c.slots)).scalars().all()) == [3, 3]
    left.close()
    right.close()


# ---------------------------------------------------------------- outages


async def test_a_stopped_server_is_unavailable_and_then_back() -> None:
    with postgres() as server:
        migrate(server.create("mine"))
        database = Database(server.url("mine"), name="test")
        await database.write(sign_on("before"))
        server.stop()
        with pytest.raises(Unavailable, match="The database does not answer"):
            await database.write(sign_on("meanwhile"))
        with pytest.raises(Unavailable, match="The database does not answer"):
            await database.read(lambda c: c.execute(text("SELECT 1")))
        server.start()
        await database.write(sign_on("after"))
        assert owners(database) == {"before", "after"}
        database.close()


async def test_all_of_a_group_hear_of_an_outage() -> None:
    with postgres() as server:
        migrate(server.create("mine"))
        database = Database(server.url("mine"), name="test")
        gate = Gate(database)
        futures = [database.submit(sign_on(str(number))) for number in range(5)]
        server.kill()
        with pytest.raises(Unavailable):
            gate.open()
        for future in futures:
            assert isinstance(future.exception(30), Unavailable)
        database.close()


def test_a_locked_sqlite_file_is_unavailable(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backchannel.db.BUSY_S", 0.05)
    database = Database(sqlite_url, name="test")
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable, match="locked"):
            database.write_now(sign_on("waiting"))
        other.rollback()
    assert database.write_now(sign_on("waiting")) == "waiting"
    database.close()


def test_a_conflict_that_never_ends_is_unavailable(postgres_url: str) -> None:
    def refused(connection: Connection) -> None:
        connection.exec_driver_sql("DO $$ BEGIN RAISE 'again' USING ERRCODE = '40001'; END $$")

    with closing(Database(postgres_url, name="test")) as database:
        with pytest.raises(Unavailable, match="held up: again"):
            database.write_now(refused)
        assert database.write_now(sign_on("after")) == "after"


def test_a_statement_that_is_wrong_is_no_outage(sqlite_url: str) -> None:
    # SQLite calls it an OperationalError too
    with closing(Database(sqlite_url, name="test")) as database:
        gate = Gate(database)
        wrong = database.submit(lambda c: c.execute(text("SELECT nonsense")))
        neighbour = database.submit(sign_on("neighbour"))
        gate.open()
        assert neighbour.result(10) == "neighbour"
        assert not isinstance(wrong.exception(10), Unavailable)


def test_a_locked_row_fails_the_work_that_needs_it_and_a_locked_table_all(
    postgres_url: str,
) -> None:
    with closing(Database(postgres_url, name="test")) as database:
        database.write_now(sign_on("locked"))

        def touch(connection: Connection) -> None:
            connection.execute(text("SET LOCAL lock_timeout = '100ms'"))
            connection.execute(workers.delete().where(workers.c.owner == "locked"))

        with create(postgres_url).connect() as other:
            other.execute(text("SELECT * FROM workers FOR UPDATE"))
            gate = Gate(database)
            held_up = database.submit(touch)
            neighbours = [database.submit(sign_on(str(number))) for number in range(5)]
            gate.open()
            assert isinstance(held_up.exception(10), Unavailable)
            assert [each.result(10) for each in neighbours] == list("01234")

            other.execute(text("LOCK TABLE workers"))
            gate = Gate(database)
            many = [database.submit(touch) for _ in range(200)]
            began = time.monotonic()
            gate.open()
            assert all(isinstance(each.exception(10), Unavailable) for each in many)
            assert time.monotonic() - began < 5  # and not 200 times 100 ms
        other.engine.dispose()


def test_a_full_disk_says_so_and_leaves_nothing_behind(sqlite_url: str) -> None:
    with closing(Database(sqlite_url, name="test")) as database:

        def too_much(connection: Connection) -> None:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")  # SQLite's own full disk
            for number in range(2000):
                sign_on(f"{number}".zfill(500))(connection)

        with pytest.raises(Unavailable, match="disk is full") as error:
            database.write_now(too_much)
        assert error.value.code == "disk_full"
        assert owners(database) == set()


@pytest.mark.parametrize("old", [False, True])
async def test_a_path_that_swallows_packets_is_noticed(
    postgres_server: Postgres, postgres_url: str, monkeypatch: pytest.MonkeyPatch, *, old: bool
) -> None:
    monkeypatch.setattr("backchannel.postgres.SILENCE_S", 1.0)
    path = Proxy(socket.AF_UNIX, str(postgres_server.folder / ".s.PGSQL.5432"))
    far = make_url(postgres_url).set(host="127.0.0.1", port=path.port, query={})
    with closing(path), closing(Database(far.render_as_string(), name="test")) as database:
        await database.write(sign_on("before"))
        path.swallow()
        waiting = asyncio.create_task(database.write(sign_on("waiting")))
        await asyncio.sleep(0.5)
        path.heal(old=old)
        await asyncio.wait([waiting], timeout=5)
        assert waiting.done()
        assert waiting.exception() is None
        assert await asyncio.wait_for(database.write(sign_on("after")), 5) == "after"


# ---------------------------------------------------------------- migrations


def _migrate_together(others: Barrier, url: str) -> None:
    others.wait(60)
    migrate(url)


def test_processes_that_start_together_migrate_once(empty_url: str) -> None:
    together = spawn.Barrier(3)
    run_processes(_migrate_together, [(together, empty_url)] * 3)
    engine = create(empty_url)
    with engine.connect() as connection:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all()
    engine.dispose()
    assert found == [HEAD]


def test_a_second_migration_changes_nothing(database_url: str) -> None:
    migrate(database_url)


def test_an_upgrade_keeps_every_row(empty_url: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(backchannel.migrations.__file__).parent))
    engine = create(empty_url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.exec_driver_sql(
            "INSERT INTO jobs (id, caller, request_hash, state, lane, provider, model, "
            "model_reason, stream, meta, created_ms, run_ms, deadline_ms, rank, attempt, retries, "
            "crashes) VALUES ('job_1', 'local', '', 'queued', 'batch', 'echo', 'echo', '', true, "
            "'{}', 1, 1, 1, 1, 0, 0, 0)"
        )
        connection.exec_driver_sql(
            "INSERT INTO job_requests (job_id, messages, parameters) VALUES ('job_1', '[]', '{}')"
        )
    migrate(empty_url)
    with engine.connect() as connection:
        (kind,) = connection.exec_driver_sql("SELECT kind FROM jobs").one()
        (job_id,) = connection.exec_driver_sql("SELECT job_id FROM job_requests").one()
    engine.dispose()
    assert (kind, job_id) == ("job", "job_1")


def test_a_database_newer_than_the_code_says_what_to_do(database_url: str) -> None:
    engine = create(database_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(SetupError, match=r"9999, which is newer.* Upgrade Backchannel"):
        migrate(database_url)


def test_the_head_is_the_newest_script() -> None:
    scripts = ScriptDirectory(str(Path(backchannel.migrations.__file__).parent))
    assert scripts.get_current_head() == HEAD


def test_the_migrations_make_what_the_tables_say(database_url: str) -> None:
    engine = create(database_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        differences = compare_metadata(context, SQLModel.metadata)
    engine.dispose()
    assert differences == []


def test_the_partial_indexes_are_partial_in_the_migration_too(database_url: str) -> None:
    # Alembic does not compare an index's WHERE
    engine = create(database_url)
    dialect = engine.dialect.name
    found = {
        index["name"]: " ".join(sorted(_words(index["dialect_options"][f"{dialect}_where"])))
        for table in ("jobs", "usage", "batches", "batch_lines")
        for index in inspect(engine).get_indexes(table)
        if index.get("dialect_options", {}).get(f"{dialect}_where") is not None
    }
    engine.dispose()
    wanted = {
        index.name: " ".join(sorted(_words(where)))
        for table in ("jobs", "usage", "batches", "batch_lines")
        for index in SQLModel.metadata.tables[table].indexes
        if (where := index.dialect_options[dialect]["where"]) is not None
    }
    assert len(wanted) == 10
    assert found == wanted


def _words(where: Any) -> list[str]:
    """The words of a condition, without the casts and brackets that PostgreSQL puts in."""
    plain = str(where).replace("::text", "").replace("::character varying", "")
    return plain.replace("(", " ").replace(")", " ").split()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://root@localhost/x", r"is of type 'mysql'; use postgresql://"),
        ("sqlite://", "use postgresql://"),
    ],
)
def test_another_kind_of_database_is_refused_with_the_way_out(url: str, says: str) -> None:
    with pytest.raises(SetupError, match=says):
        migrate(url)


def test_an_unreachable_server_says_so_without_the_password(tmp_path: Path) -> None:
    url = f"postgresql+psycopg://me:secret@/x?host={tmp_path}"
    with pytest.raises(SetupError, match=r"Cannot open the database .* Is it running") as error:
        migrate(url)
    assert "secret" not in str(error.value)


def test_a_file_that_is_no_database_says_so(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("This is not a database. " * 500)
    with pytest.raises(SetupError, match="Cannot open the database"):
        migrate(f"sqlite:///{file}")


# ---------------------------------------------------------------- clocks and safety


def test_the_databases_clock_is_the_time_of_day(database: Database) -> None:
    found = database.read_now(lambda c: c.execute(select(now_ms())).scalar_one())
    assert isinstance(found, int)
    assert abs(found - time.time() * 1000) < 1000


def test_the_clock_goes_on_within_a_transaction(database: Database) -> None:
    def twice(connection: Connection) -> tuple[int, int]:
        first = connection.execute(select(now_ms())).scalar_one()
        time.sleep(0.02)
        return first, connection.execute(select(now_ms())).scalar_one()

    first, second = database.write_now(twice)
    assert second > first


def test_sqlite_is_durable_and_checks_its_references(sqlite_url: str) -> None:
    engine = create(sqlite_url)
    with engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    engine.dispose()
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_a_database_that_is_read_only_for_a_while_is_an_outage(postgres_url: str) -> None:
    with closing(Database(postgres_url, name="test")) as database:

        def demoted(connection: Connection) -> None:
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")
            connection.exec_driver_sql("DELETE FROM workers")

        with pytest.raises(Unavailable):
            database.write_now(demoted)
