"""The database: a schema that is what the tables say, its clock, and clear errors at the start."""

from __future__ import annotations

import time
from collections.abc import Iterator
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
from sqlalchemy import Connection, inspect, select, text
from sqlmodel import SQLModel

import backchannel.migrations
from backchannel.db import HEAD, Database, create, migrate, now_ms
from backchannel.errors import SetupError
from tests.backchannel.writing import run_processes, spawn
from tests.servers import Postgres

_numbers = count(1)


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


def test_an_upload_s_key_moves_to_the_used_keys(empty_url: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(backchannel.migrations.__file__).parent))
    engine = create(empty_url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0007")
        connection.exec_driver_sql(
            "INSERT INTO files (id, caller, kind, purpose, filename, status, bytes, created_ms) "
            "VALUES ('key-ab', 'local', 'key', 'digest', 'file-1', 'key', 0, 7), "
            "('file-1', 'local', 'input', 'batch', 'in', 'processed', 1, 7)"
        )
    migrate(empty_url)
    with engine.begin() as connection:
        found = connection.exec_driver_sql("SELECT * FROM used_keys").all()
        files = connection.exec_driver_sql("SELECT id FROM files").scalars().all()
        config.attributes["connection"] = connection
        command.downgrade(config, "0007")
        back = connection.exec_driver_sql("SELECT id, filename, purpose FROM files").all()
    engine.dispose()
    key = "file-ab", "file", "local", "file-1", "file-1", "digest", 7
    assert (found, files) == ([key], ["file-1"])
    assert set(back) == {("key-ab", "file-1", "digest"), ("file-1", "in", "batch")}


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
