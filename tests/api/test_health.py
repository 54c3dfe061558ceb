"""Health, and the start of a server: what is not right is said in a sentence."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from api.main import listen, serve, who_may
from backchannel import __version__, keys, lifecycle
from backchannel.db import Database
from backchannel.errors import SetupError
from backchannel.settings import Settings
from tests import makers
from tests.api.play import serving
from tests.api.test_auth import new_key
from tests.servers import Postgres, Valkey, valkey


async def test_a_healthy_process_counts_workers_and_what_waits(
    client: httpx2.AsyncClient, database: Database
) -> None:
    database.write_now(lambda c: lifecycle.sign_on(c, "w:1", "host", 1, 10))
    makers.queued(database)
    makers.queued(database, lane="batch")
    makers.queued(database, lane="batch", session_id=makers.session(database))
    makers.finished(database)
    assert (await client.get("/healthz")).json() == {"status": "ok", "version": __version__}
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()) == (
        200,
        {
            "status": "ok",
            "database": "ok",
            "redis": "ok",
            "workers": 1,
            "queued": {"interactive": 1, "batch": 2},
        },
    )


async def test_what_all_callers_have_waiting_is_for_who_may_see_it(
    database: Database, client: httpx2.AsyncClient
) -> None:
    whole, own = new_key(database, "operator", scopes=["admin"]), new_key(database, "alice")
    for headers, told in ({}, False), (own, False), (whole, True):
        answer = await client.get("/readyz", headers=headers)
        assert (answer.status_code, answer.json()["workers"]) == (200, 0)
        assert ("queued" in answer.json()) == told


@pytest.mark.parametrize("away", [Valkey.freeze, Valkey.kill], ids=["frozen", "killed"])
async def test_without_redis_it_is_ready_and_says_so(
    database_url: str, tmp_path: Path, away: Callable[[Valkey], None]
) -> None:
    with valkey() as server:
        settings = Settings(home=tmp_path, database_url=database_url, redis_url=server.url)
        async with serving(settings) as url, httpx2.AsyncClient(base_url=url) as client:
            away(server)
            answer = await client.get("/readyz")
            assert answer.status_code == 200
            assert answer.json()["redis"].startswith("unavailable: ")
            assert answer.json()["database"] == "ok"


async def test_without_its_database_it_lives_but_is_not_ready(
    postgres_server: Postgres, redis_url: str, tmp_path: Path
) -> None:
    url_of_database = postgres_server.create("health", template="migrated")
    settings = Settings(home=tmp_path, database_url=url_of_database, redis_url=redis_url)
    async with serving(settings) as url, httpx2.AsyncClient(base_url=url) as client:
        postgres_server.drop("health")
        assert (await client.get("/healthz")).status_code == 200
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["status"] == "unavailable"
        assert answer.json()["database"].startswith("unavailable: ")
        assert answer.json()["redis"] == "ok"
        refused = await client.post("/v1/jobs", json={"prompt": "x", "model": "echo"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "database_unavailable"
        assert refused.headers["retry-after"] == "1"


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_machines_are_let_in_only_when_the_operator_says_so(
    host: str, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKCHANNEL_DATABASE_URL", sqlite_url)
    with pytest.raises(SetupError, match="BACKCHANNEL_ALLOW_OPEN_BIND"):
        serve(host, 0)


def test_with_the_operator_s_word_it_listens_anywhere() -> None:
    with listen("0.0.0.0", 0, open_bind=True) as listening:
        assert listening.getsockname()[0] == "0.0.0.0"


def test_with_a_key_it_listens_anywhere_and_without_any_good_one_it_is_not_open(
    database: Database, settings: Settings
) -> None:
    wide = settings.model_copy(update={"allow_open_bind": True})
    assert who_may(settings, "127.0.0.1") == (False, True)
    assert who_may(settings, "0.0.0.0") == (False, False)
    assert who_may(wide, "0.0.0.0") == (False, True)
    database.write_now(lambda c: keys.add(c, keys.NewKey("alice")))
    for host in ("127.0.0.1", "0.0.0.0"):
        assert who_may(settings, host) == who_may(wide, host) == (True, False)
    database.write_now(lambda c: keys.revoke(c, "alice"))
    assert who_may(wide, "127.0.0.1") == (False, False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.9.9.9"])
def test_loopback_needs_nobody_s_word(host: str) -> None:
    with listen(host, 0, open_bind=False) as listening:
        assert listening.getsockname()[1] > 0


def test_a_port_in_use_is_a_sentence_that_names_the_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SetupError, match=rf"Port {port} is in use.*--port {port + 1}"):
            listen("127.0.0.1", port, open_bind=False)


def test_an_address_of_another_machine_is_a_sentence_too() -> None:
    with pytest.raises(SetupError, match=r"Cannot listen on 192\.0\.2\.1"):
        listen("192.0.2.1", 8000, open_bind=True)


async def test_it_starts_while_redis_is_away_and_finds_it_later(
    sqlite_url: str, tmp_path: Path
) -> None:
    with valkey() as server:
        server.kill()
        settings = Settings(home=tmp_path, database_url=sqlite_url, redis_url=server.url)
        async with serving(settings) as url, httpx2.AsyncClient(base_url=url) as client:
            job = await client.post("/v1/jobs", json={"prompt": "x", "model": "echo"})
            assert job.status_code == 202
            server.start()
            await asyncio.sleep(0.1)
            assert (await client.get("/readyz")).json()["redis"] == "ok"
