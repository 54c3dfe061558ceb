"""What every test stands on: a neutral environment, and real databases and a real Valkey."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

import backchannel.registry
from backchannel.db import Database, migrate
from backchannel.settings import get_settings
from tests.servers import Postgres, Valkey, postgres, valkey

# A developer's own keys and settings must neither change a test nor be spent by one. At import, so
# that whatever a session fixture starts does not inherit them either.
_FOREIGN = ("BACKCHANNEL_", "OPENAI_", "ANTHROPIC_", "GROQ_", "GEMINI_", "GOOGLE_API_KEY")
for _name in [name for name in os.environ if name.upper().startswith(_FOREIGN)]:
    del os.environ[_name]

_numbers = count(1)


@pytest.fixture(autouse=True)
def _fresh_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test reads its own environment: nothing is remembered from the test before."""
    monkeypatch.setattr(backchannel.registry, "_registry", None)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[Valkey]:
    """This session's Valkey. A test that kills or freezes one starts its own: `servers.valkey`."""
    with valkey() as server:
        yield server


@pytest.fixture
def redis_url(valkey_server: Valkey) -> str:
    """An empty Valkey."""
    assert valkey_server.say("FLUSHALL") == "+OK\r\n"
    return valkey_server.url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """This session's PostgreSQL; its database ``migrated`` is what tests get a copy of."""
    with postgres() as server:
        migrate(server.create("migrated"))
        yield server


@pytest.fixture
def postgres_url(postgres_server: Postgres) -> Iterator[str]:
    """A migrated, empty database on PostgreSQL."""
    name = f"test_{next(_numbers)}"
    yield postgres_server.create(name, template="migrated")
    postgres_server.drop(name)


@pytest.fixture(scope="session")
def _migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    migrate(f"sqlite:///{file}")
    return file


@pytest.fixture
def sqlite_url(_migrated_file: Path, tmp_path: Path) -> str:
    """A migrated, empty SQLite database."""
    return f"sqlite:///{shutil.copy(_migrated_file, tmp_path / 'backchannel.db')}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A migrated, empty database: the test runs once on each kind."""
    fixture = "sqlite_url" if request.param == "sqlite" else "postgres_url"
    url: str = request.getfixturevalue(fixture)
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """`Database` on each kind, closed afterwards."""
    opened = Database(database_url, name="test")
    yield opened
    opened.close()
