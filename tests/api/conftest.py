"""The API on real servers: in this process for plain calls, on loopback where it must stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from api.main import create_app
from backchannel.db import Database
from backchannel.settings import Settings
from tests.api.play import Play, serving


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    """Of an API process on each kind of database."""
    return Settings(
        home=tmp_path, database_url=database_url, redis_url=redis_url, default_model="echo:echo-1"
    )


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[httpx2.AsyncClient]:
    """Plain calls, without a socket between; streams would be held back until they end."""
    app = create_app(settings)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app, raise_app_exceptions=False),
            base_url="http://localhost",
        ) as calling,
    ):
        yield calling


@pytest.fixture
async def served(settings: Settings) -> AsyncIterator[httpx2.AsyncClient]:
    """The same over loopback, by the server of `backchannel api`."""
    async with serving(settings) as url, httpx2.AsyncClient(base_url=url, timeout=30) as calling:
        yield calling


@pytest.fixture
async def play(database: Database, redis_url: str) -> AsyncIterator[Play]:
    """The part of a worker, played by the test."""
    async with Play.on(database, redis_url) as playing:
        yield playing
