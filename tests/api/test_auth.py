"""Who is let in: nobody without a key once there is one, and with a key only where it is good."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.routing import APIRoute

import api.auth
from api import auth
from api.deps import StrictRoute
from api.main import ROUTERS, create_app
from backchannel import batch_lines, keys
from backchannel.batch_input import job_of_line
from backchannel.db import Database
from backchannel.errors import ModelNotAllowed
from backchannel.keys import NewKey
from backchannel.registry import get_registry
from backchannel.settings import Settings
from tests import makers
from tests.api.play import serving
from tests.api.test_batches import uploaded
from tests.backchannel import batching
from tests.backchannel.batching import CHAT, line

ASKED = {"model": "echo", "prompt": "Hello?"}


def new_key(database: Database, name: str = "alice", **wishes: Any) -> dict[str, str]:
    """The header of a new caller."""
    _, key = database.write_now(lambda c: keys.add(c, NewKey(name, **wishes)))
    return {"Authorization": f"Bearer {key}"}


@asynccontextmanager
async def listening(settings: Settings, host: str) -> AsyncIterator[httpx2.AsyncClient]:
    """An API process as it is when it listens on `host`."""
    app = create_app(settings, host)
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://localhost") as calling,
    ):
        yield calling


# ---------------------------------------------------------------- keys


async def test_a_key_is_taken_as_either_sdk_sends_it(
    database: Database, client: httpx2.AsyncClient
) -> None:
    headers = new_key(database)
    key = headers["Authorization"].removeprefix("Bearer ")
    for given in (
        headers,
        {"authorization": f"bearer {key}"},
        {"x-api-key": key},
        {"x-api-key": key, "Authorization": "Basic YTpi"},
    ):
        assert (await client.post("/v1/jobs", json=ASKED, headers=given)).status_code == 202
    assert {row["caller"] for row in makers.rows(database, "jobs")} == {"alice"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer unused"},
        {"Authorization": "Basic YTpi"},
        {"x-api-key": "bk_" + "A" * 43},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/jobs"), ("GET", "/v1/jobs"), ("POST", "/v1/files")]
)
async def test_without_a_good_key_it_is_a_401(
    database: Database,
    client: httpx2.AsyncClient,
    headers: dict[str, str],
    method: str,
    path: str,
) -> None:
    new_key(database)
    before = makers.everything(database)
    answer = await client.request(method, path, headers=headers, content=b"{")
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.headers["x-should-retry"] == "false"
    assert makers.everything(database) == before


async def test_anthropic_s_clients_are_told_in_their_form(
    database: Database, client: httpx2.AsyncClient
) -> None:
    headers = new_key(database, models=["groq:*"])
    asked = {"model": "echo", "max_tokens": 1, "messages": [{"role": "user", "content": "?"}]}
    answer = await client.post("/v1/messages", json=asked)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    answer = await client.post("/v1/messages", json=asked, headers=headers)
    assert answer.status_code == 403
    assert answer.json()["error"]["type"] == "permission_error"


async def test_health_and_the_document_need_no_key(
    database: Database, client: httpx2.AsyncClient
) -> None:
    new_key(database)
    for path in ("/healthz", "/readyz", "/openapi.json", "/docs"):
        assert (await client.get(path)).status_code == 200


async def test_who_may_not_call_is_refused_before_the_body_is_read(
    database: Database, settings: Settings
) -> None:
    new_key(database)
    async with serving(settings) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
        writer.write(head.encode())
        async with asyncio.timeout(5):
            assert await reader.readline() == b"HTTP/1.1 401 Unauthorized\r\n"
        writer.close()


# ---------------------------------------------------------------- in time


async def test_a_revoked_key_is_good_for_seconds_only(
    database: Database, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.auth, "REMEMBER_S", 0.5)
    headers = new_key(database)
    assert (await client.get("/v1/jobs", headers=headers)).status_code == 200
    database.write_now(lambda c: keys.revoke(c, "alice"))
    assert (await client.get("/v1/jobs", headers=headers)).status_code == 200
    await asyncio.sleep(0.6)
    assert (await client.get("/v1/jobs", headers=headers)).status_code == 401
    assert (await client.get("/v1/jobs")).status_code == 401


async def test_a_key_expires_though_it_is_remembered(
    database: Database, client: httpx2.AsyncClient
) -> None:
    headers = new_key(database, expires_in_s=1)
    assert (await client.get("/v1/jobs", headers=headers)).status_code == 200
    await asyncio.sleep(1.1)
    assert (await client.get("/v1/jobs", headers=headers)).status_code == 401


async def test_the_first_key_closes_a_running_api_for_good(
    database: Database, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.auth, "OPEN_S", 0.3)
    mine = (await client.post("/v1/jobs", json=ASKED)).json()["id"]
    headers = new_key(database)
    await asyncio.sleep(0.4)
    assert (await client.get("/v1/jobs")).status_code == 401
    assert (await client.get(f"/v1/jobs/{mine}", headers=headers)).status_code == 404
    local = new_key(database, "local")
    assert (await client.get(f"/v1/jobs/{mine}", headers=local)).status_code == 200
    for name in ("alice", "local"):
        database.write_now(lambda c: keys.revoke(c, name))  # noqa: B023
    await asyncio.sleep(0.4)
    assert (await client.get("/v1/jobs")).status_code == 401


async def test_keys_are_not_asked_for_at_every_request_and_their_use_is_on_record(
    database: Database, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    find = keys.find
    monkeypatch.setattr(keys, "find", lambda *args: asked.append(args) or find(*args))
    headers = new_key(database)
    answers = await asyncio.gather(*(client.get("/v1/jobs", headers=headers) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(asked) == 1
    for _ in range(100):
        (row,) = makers.rows(database, "caller_keys")
        if row["used_ms"] is not None:
            break
        await asyncio.sleep(0.02)
    assert row["used_ms"] >= row["created_ms"]


async def test_no_more_keys_are_remembered_than_there_is_room_for(
    database: Database, client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.auth, "MOST_REMEMBERED", 2)
    for _ in range(4):
        answer = await client.get("/v1/jobs", headers=new_key(database))
        assert answer.status_code == 200
    gate = client._transport.app.state.resources.gate  # type: ignore[attr-defined]
    assert len(gate._known) == 2


# ---------------------------------------------------------------- open


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.9.9.9:80", "[::1]:8000", "x.localhost"],
)
async def test_on_loopback_everybody_is_local(client: httpx2.AsyncClient, host: str) -> None:
    for key in ({}, {"Authorization": "Bearer unused"}):
        answer = await client.post("/v1/jobs", json=ASKED, headers={"Host": host, **key})
        assert answer.status_code == 202


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "",
     "192.0.2.1", "[::2]", "api"],
)  # fmt: skip
async def test_a_page_that_was_led_here_is_refused(
    client: httpx2.AsyncClient, database: Database, host: str
) -> None:
    for method, path in (("POST", "/v1/jobs"), ("GET", "/v1/jobs")):
        answer = await client.request(method, path, json=ASKED, headers={"Host": host})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "host_not_allowed"
    headers = new_key(database)
    await asyncio.sleep(0)
    assert makers.rows(database, "jobs") == []
    async with listening(_settings_of(client), "127.0.0.1") as closed:
        answer = await closed.get("/v1/jobs", headers={"Host": host, **headers})
        assert answer.status_code == 200


def _settings_of(client: httpx2.AsyncClient) -> Settings:
    found: Settings = client._transport.app.state.resources.settings  # type: ignore[attr-defined]
    return found


async def test_beyond_loopback_it_is_never_open_by_itself(settings: Settings) -> None:
    async with listening(settings, "0.0.0.0") as calling:
        assert (await calling.get("/v1/jobs")).status_code == 401


async def test_with_the_operator_s_word_it_is_open_under_any_name(
    settings: Settings, database: Database
) -> None:
    allowed = settings.model_copy(update={"allow_open_bind": True})
    async with listening(allowed, "0.0.0.0") as calling:
        answer = await calling.post("/v1/jobs", json=ASKED, headers={"Host": "api:8000"})
        assert answer.status_code == 202
    new_key(database)
    async with listening(allowed, "0.0.0.0") as calling:
        assert (await calling.get("/v1/jobs")).status_code == 401


# ---------------------------------------------------------------- scopes


def routes() -> list[APIRoute]:
    return [each for router in ROUTERS for each in router.routes if isinstance(each, APIRoute)]


def test_every_route_says_what_a_key_must_be_good_for() -> None:
    guarded = [route for route in routes() if isinstance(route, StrictRoute)]
    assert {route.path for route in routes()} - {route.path for route in guarded} == {
        "/healthz", "/readyz",
    }  # fmt: skip
    nouns = {route.path.removeprefix("/v1/").partition("/")[0] for route in guarded}
    assert nouns == set(auth.SCOPES), "api/auth.py: SCOPES"


ROUTES = sorted(
    {
        (method, route.path, auth.scope_of(route.path, route.methods or ()))
        for route in routes()
        if isinstance(route, StrictRoute)
        for method in route.methods or ()
    }
)


async def test_a_key_opens_what_its_scopes_say_and_nothing_else(
    sqlite_url: str, redis_url: str, tmp_path: Path
) -> None:
    settings = Settings(home=tmp_path, database_url=sqlite_url, redis_url=redis_url)
    database = Database(sqlite_url, name="test")
    async with listening(settings, "127.0.0.1") as calling:
        for scope in keys.SCOPES:
            headers = new_key(database, scopes=[scope])
            for method, path, needed in ROUTES:
                answer = await calling.request(method, path, headers=headers)
                body = answer.json()["error"] if answer.status_code == 403 else {}
                if scope in (needed, keys.ADMIN):
                    assert answer.status_code != 403, (scope, method, path)
                else:
                    assert body["code"] == "insufficient_scope", (scope, method, path)
                    assert f"'{needed}'" in body["message"]
    database.close()


# ---------------------------------------------------------------- models


async def test_a_key_for_some_models_is_for_no_other_wherever_one_is_named(
    database: Database, client: httpx2.AsyncClient
) -> None:
    free, bound = new_key(database), new_key(database, models=["ollama:*"])
    session = (await client.post("/v1/sessions", json={"model": "echo"}, headers=free)).json()["id"]
    job = (await client.post("/v1/jobs", json=ASKED, headers=free)).json()["id"]
    await client.post(f"/v1/jobs/{job}/cancel", headers=free)
    said = [{"role": "user", "content": "?"}]
    before = makers.everything(database)
    for method, path, body in (
        ("POST", "/v1/jobs", ASKED),
        ("POST", "/v1/jobs", {"prompt": "x"}),  # the default model
        ("POST", "/v1/jobs", {"prompt": "x", "session": session}),
        ("POST", f"/v1/jobs/{job}/retry", None),
        ("POST", "/v1/chat/completions", {"model": "echo", "messages": said}),
        ("POST", "/v1/responses", {"model": "echo", "input": "x"}),
        ("POST", "/v1/messages", {"model": "echo", "max_tokens": 1, "messages": said}),
        ("POST", "/v1/sessions", {"model": "echo:echo-1"}),
        ("PATCH", f"/v1/sessions/{session}", {"model": "echo:other"}),
    ):
        answer = await client.request(method, path, json=body, headers=bound)
        assert answer.status_code == 403, (path, answer.text)
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_allowed", "model")
    after = makers.everything(database)
    assert {**after, "caller_keys": []} == {**before, "caller_keys": []}
    assert (
        await client.post("/v1/jobs", json={"prompt": "x", "model": "ollama:llama3"}, headers=bound)
    ).status_code == 202
    offered = (await client.get("/v1/models", headers=bound)).json()["data"]
    assert {each["owned_by"] for each in offered} == {"ollama"}
    assert (await client.get("/v1/models/echo", headers=bound)).status_code == 404
    assert (await client.get("/v1/models/echo", headers=free)).status_code == 200


async def test_a_batch_keeps_to_the_models_of_its_caller_s_key(
    database: Database, client: httpx2.AsyncClient
) -> None:
    client.headers.update(new_key(database, models=["ollama:*"]))
    said = [{"role": "user", "content": "?"}]
    lines = [
        line(custom_id, body={"model": model, "messages": said})
        for custom_id, model in (("a", "echo"), ("b", "ollama:llama3"))
    ]
    file_id = await uploaded(client, *lines)
    asked = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    dry = {**asked, "x_backchannel": {"dry_run": True}}
    estimate = (await client.post("/v1/batches", json=dry)).json()["x_backchannel"]["estimate"]
    assert estimate["lines_that_would_fail"] == 1
    assert list(estimate["models"]) == ["ollama:llama3"]
    batch_id = (await client.post("/v1/batches", json=asked)).json()["id"]
    batching.validate_once(database, batching.row(database, batch_id))
    batch = batching.row(database, batch_id)
    # what the planner makes the line's error of
    with pytest.raises(ModelNotAllowed, match="'echo:echo-1'"):
        batching.plan_once(database, batch, room=1)
    (head,) = database.read_now(lambda c: batch_lines.unplanned(c, batch_id, 2, 1))
    assert job_of_line(batch, lines[1], head, get_registry()).model == "llama3"
