"""A database that does not answer, is held up or full: it is said, and nothing is half-written."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import time
from contextlib import closing

import pytest
from sqlalchemy import Connection, make_url, text

from backchannel.db import Database, create, migrate
from backchannel.errors import Unavailable
from backchannel.tables import workers
from chaos.proxy import Proxy
from tests.backchannel.writing import Gate, owners, sign_on
from tests.servers import Postgres, postgres


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


def test_a_database_that_is_read_only_for_a_while_is_an_outage(postgres_url: str) -> None:
    with closing(Database(postgres_url, name="test")) as database:

        def demoted(connection: Connection) -> None:
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")
            connection.exec_driver_sql("DELETE FROM workers")

        with pytest.raises(Unavailable):
            database.write_now(demoted)
