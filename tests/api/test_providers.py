"""Providers over HTTP: who is available and why, never a key; adding and changing one's own."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest
from sqlalchemy import Connection, text

from api.main import create_app
from backchannel.db import Database
from backchannel.limits import Hold, Limiter, account_of
from backchannel.pubsub import connect
from backchannel.registry import build_registry
from backchannel.settings import Settings
from backchannel.stored_keys import bump, put
from tests.makers import rows

SECRET = "sk-secret-0123456789"
ATTIC = {"name": "Attic Ollama", "base_url": "http://ollama.test:11434/v1", "default_model": "m"}


@pytest.fixture(autouse=True)
def _an_attic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCHANNEL_EGRESS_ALLOW", "ollama.test")


async def api(stack: AsyncExitStack, settings: Settings, host: str = "127.0.0.1") -> Any:
    """A client of an API process of its own."""
    app = create_app(settings)
    await stack.enter_async_context(app.router.lifespan_context(app))
    transport = httpx2.ASGITransport(app, client=(host, 1), raise_app_exceptions=False)
    calling = httpx2.AsyncClient(transport=transport, base_url="http://localhost")
    return await stack.enter_async_context(calling)


async def test_the_list_says_who_is_available_and_why_and_shows_no_key(
    sqlite_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("BACKCHANNEL_PROVIDERS__GROQ__API_KEY", SECRET)
    monkeypatch.setenv("BACKCHANNEL_PROVIDERS__OLLAMA__BASE_URL", "http://box:11434/v1")
    app = create_app(Settings(database_url=sqlite_url, redis_url=redis_url))
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app), base_url="http://localhost"
        ) as client,
    ):
        answer = await client.get("/v1/providers")
        assert SECRET not in answer.text
        listed = {each["id"]: each for each in answer.json()["data"]}
        ollama = await client.get("/v1/providers/ollama")
    assert ollama.json() == listed["ollama"]
    assert {name: each["available"] for name, each in listed.items()} == {
        "anthropic": False,
        "openai": True,
        "groq": True,
        "gemini": False,
        "ollama": True,
        "lmstudio": True,
        "echo": True,
    }
    assert listed["anthropic"]["reason"] == "no key: set ANTHROPIC_API_KEY"
    assert listed["openai"]["reason"] == "its key is set"
    assert listed["ollama"]["reason"] == "needs no key"
    assert listed["ollama"]["base_url"] == "http://box:11434/v1"
    assert listed["echo"] == {
        "id": "echo",
        "object": "provider",
        "name": "Echo (offline)",
        "type": "echo",
        "base_url": "",
        "default_model": "echo-1",
        "models": ["echo-1"],
        "capabilities": {"structured_output": True, "multimodal": True, "tools": True},
        "prices": {},
        "limits": {"requests_per_minute": None, "tokens_per_minute": None, "concurrency": None},
        "held_until": None,
        "needs_key": False,
        "key": None,
        "allow_loopback": False,
        "max_tokens_field": "max_tokens",
        "reports_stream_usage": True,
        "available": True,
        "reason": "needs no key",
        "builtin": True,
    }


async def test_an_unknown_provider_is_not_found(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/v1/providers/nobody")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


# ---------------------------------------------------------------- one's own


async def test_one_that_is_added_can_be_named_at_once_and_is_modest(
    client: httpx2.AsyncClient,
) -> None:
    answer = await client.post("/v1/providers", json=ATTIC)
    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert (made["id"], made["available"], made["builtin"]) == ("attic-ollama", True, False)
    assert made["capabilities"] == {"structured_output": False, "multimodal": False, "tools": True}
    listed = (await client.get("/v1/providers")).json()
    assert listed["data"][-1] == made == (await client.get("/v1/providers/attic-ollama")).json()
    assert listed["version"] == 1
    assert [each["version"] for each in listed["processes"]] == [1]
    job = (await client.post("/v1/jobs", json={"prompt": "Hi", "model": "attic-ollama"})).json()
    assert job["model"] == "attic-ollama:m"
    assert "attic-ollama:m" in {
        each["id"] for each in (await client.get("/v1/models")).json()["data"]
    }


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 51}, "name"),
        ({"name": "  "}, "name"),
        ({"name": "日本"}, "name"),
        ({"base_url": "ftp://host/v1"}, "base_url"),
        ({"base_url": "llm.example.com/v1"}, "base_url"),
        ({"base_url": "https://user:pass@llm.example.com/v1"}, "base_url"),
        ({"base_url": "https://llm.example.com/v1?key=x"}, "base_url"),
        ({"base_url": "https://llm.example.com/v1#x"}, "base_url"),
        ({"base_url": "https://llm.example.com:99999/v1"}, "base_url"),
        ({"base_url": "https://[::1/v1"}, "base_url"),
        ({"base_url": "https://llm.example.com/a b"}, "base_url"),
        ({"default_model": ""}, "default_model"),
        ({"default_model": None}, "default_model"),
        ({"models": ["a b"]}, "models[0]"),
        ({"capabilities": {"sight": True}}, "capabilities.sight"),
        ({"prices": {"m": {"input": -1, "output": 1}}}, "prices.m.input"),
        ({"limits": {"concurrency": 0}}, "limits.concurrency"),
        ({"limits": {"requests_per_minute": "60"}}, "limits.requests_per_minute"),
        ({"limits": {"rpm": 60}}, "limits.rpm"),
        ({"type": "echo"}, "type"),
        ({"api_key": "sk-x"}, "api_key"),
    ],
)
async def test_what_is_wrong_with_one_is_named(
    client: httpx2.AsyncClient, changes: dict[str, Any], param: str
) -> None:
    answer = await client.post("/v1/providers", json=ATTIC | changes)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert "value error" not in answer.text.lower()
    assert (await client.get("/v1/providers")).json()["version"] == 0


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("attic ollama!", "provider_exists"),
        ("OpenAI", "provider_built_in"),
        ("auto", "provider_exists"),
        ("Tier", "provider_exists"),
    ],
)
async def test_an_id_that_is_taken_is_a_conflict(
    client: httpx2.AsyncClient, name: str, code: str
) -> None:
    assert (await client.post("/v1/providers", json=ATTIC)).status_code == 201
    answer = await client.post("/v1/providers", json=ATTIC | {"name": name})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, code)


async def test_the_built_in_ones_cannot_be_changed(client: httpx2.AsyncClient) -> None:
    for answer in (
        await client.patch("/v1/providers/openai", json={"default_model": "gpt-9"}),
        await client.delete("/v1/providers/openai"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "provider_built_in")
    for answer in (
        await client.patch("/v1/providers/nobody", json={"default_model": "x"}),
        await client.delete("/v1/providers/nobody"),
    ):
        assert answer.status_code == 404


async def test_an_edit_changes_what_it_names(client: httpx2.AsyncClient) -> None:
    prices = {"*": {"input": 1.0, "output": 2.5}}
    await client.post("/v1/providers", json=ATTIC | {"prices": prices})
    change = {"default_model": "n", "capabilities": {"multimodal": True}, "name": None}
    answer = await client.patch("/v1/providers/attic-ollama", json=change | {"name": "other"})
    assert answer.json()["error"]["param"] == "name"
    assert (await client.patch("/v1/providers/attic-ollama", json={})).status_code == 200
    change.pop("name")
    edited = (await client.patch("/v1/providers/attic-ollama", json=change)).json()
    assert edited["default_model"] == "n"
    assert edited["capabilities"] == {"structured_output": False, "multimodal": True, "tools": True}
    assert edited["prices"]["*"]["output"] == 2.5
    assert edited["base_url"] == ATTIC["base_url"]
    assert (await client.get("/v1/providers")).json()["version"] == 2


async def test_removing_one_removes_its_key_and_reset_removes_all(
    client: httpx2.AsyncClient, database: Database
) -> None:
    for name in ("a", "b", "c"):
        await client.post("/v1/providers", json=ATTIC | {"name": name})
        await database.write(lambda c, name=name: put(c, name, b"sealed"))  # type: ignore[misc]
    await database.write(lambda c: put(c, "groq", b"sealed"))
    assert (await client.get("/v1/providers/groq")).json()["reason"] == "its key is stored"
    gone = await client.delete("/v1/providers/b")
    assert gone.json() == {"id": "b", "object": "provider.deleted", "deleted": True}
    left = [row["name"] for row in rows(database, "secrets")]
    assert left == ["provider:a", "provider:c", "provider:groq"]
    job = await client.post("/v1/jobs", json={"prompt": "Hi", "model": "b:m"})
    assert job.json()["error"]["code"] == "provider_not_found"
    assert (await client.delete("/v1/providers")).status_code == 400
    assert (await client.delete("/v1/providers?confirm=false")).status_code == 400
    removed = await client.delete("/v1/providers?confirm=true")
    assert removed.json()["removed"] == ["a", "c"]
    assert [row["name"] for row in rows(database, "secrets")] == ["provider:groq"]
    assert (await client.get("/v1/providers")).json()["version"] == 9


async def test_only_who_is_on_this_machine_may_point_at_it(settings: Settings) -> None:
    body = ATTIC | {"base_url": "http://127.0.0.1:11435/v1", "allow_loopback": True}
    async with AsyncExitStack() as stack:
        far = await api(stack, settings, host="192.0.2.7")
        refused = await far.post("/v1/providers", json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "allow_loopback"
        near = await api(stack, settings)
        assert (await near.post("/v1/providers", json=body)).status_code == 201
        refused = await far.patch("/v1/providers/attic-ollama", json={"allow_loopback": True})
        assert refused.status_code == 400


async def test_of_two_processes_that_add_the_same_at_once_one_does(settings: Settings) -> None:
    async with AsyncExitStack() as stack:
        one, two = await api(stack, settings), await api(stack, settings)
        for number in range(5):
            body = ATTIC | {"name": f"Attic {number}"}
            answers = await asyncio.gather(
                *(each.post("/v1/providers", json=body) for each in (one, two) * 3)
            )
            assert sorted(each.status_code for each in answers) == [201] + [409] * 5


async def test_what_one_process_adds_the_other_can_name_at_once(settings: Settings) -> None:
    async with AsyncExitStack() as stack:
        one, two = await api(stack, settings), await api(stack, settings)
        for number in range(10):  # at once: no time for a message from one to the other
            name = f"attic-{number}"
            await one.post("/v1/providers", json=ATTIC | {"name": name})
            model = name if number % 2 else f"{name}:m"
            job = await two.post("/v1/jobs", json={"prompt": "Hi", "model": model})
            assert job.json()["model"] == f"{name}:m"
        await one.delete("/v1/providers/attic-0")
        async with asyncio.timeout(10):
            while True:  # and hears of what is gone
                job = await two.post("/v1/jobs", json={"prompt": "Hi", "model": "attic-0:m"})
                if job.status_code == 400:
                    break
        assert job.json()["error"]["code"] == "provider_not_found"


async def test_a_row_that_cannot_be_used_is_set_aside_and_the_others_live(
    client: httpx2.AsyncClient, database: Database
) -> None:
    for name in ("a", "b", "c", "d"):
        await client.post("/v1/providers", json=ATTIC | {"name": name})
    for statement in (
        "UPDATE providers SET base_url = 'gopher://x' WHERE id = 'a'",
        "UPDATE providers SET models = '{\"no\": \"list\"}' WHERE id = 'b'",
        "UPDATE providers SET id = 'openai' WHERE id = 'c'",
        "UPDATE versions SET version = 99",
    ):
        await database.write(lambda c, s=statement: c.exec_driver_sql(s))  # type: ignore[misc]
    if database.engine.dialect.name == "sqlite":  # which keeps any text as JSON
        await database.write(lambda c: c.exec_driver_sql("UPDATE providers SET prices = '{'"))
        listed = {each["id"]: each for each in (await client.get("/v1/providers")).json()["data"]}
        assert listed["d"]["reason"].startswith("set aside: prices: ")
        assert listed["echo"]["available"] is True
        await database.write(lambda c: c.exec_driver_sql("UPDATE providers SET prices = '{}'"))
        await database.write(lambda c: c.exec_driver_sql("UPDATE versions SET version = 100"))
    listed = {each["id"]: each for each in (await client.get("/v1/providers")).json()["data"]}
    assert listed["a"]["reason"].startswith("set aside: base_url: ")
    assert listed["b"]["reason"].startswith("set aside: models: ")
    assert listed["openai"]["available"] is False
    assert listed["d"]["available"] is True
    job = await client.post("/v1/jobs", json={"prompt": "Hi", "model": "a:m"})
    assert job.json()["error"]["code"] == "provider_not_found"
    assert "is set aside: base_url" in job.json()["error"]["message"]
    mended = await client.patch("/v1/providers/a", json={"base_url": "https://llm.example.com"})
    assert mended.json()["available"] is True
    assert (await client.patch("/v1/providers/b", json={"default_model": "x"})).status_code == 400
    assert (await client.delete("/v1/providers/b")).status_code == 200


# ---------------------------------------------------------------- without a worker


async def test_one_that_is_set_aside_is_not_tried_and_says_why(
    client: httpx2.AsyncClient, database: Database
) -> None:
    own = {"name": "Twice", "base_url": "https://llm.example.com/v1", "default_model": "m"}
    await client.post("/v1/providers", json=own)

    def spoil(connection: Connection) -> None:
        connection.exec_driver_sql("UPDATE providers SET base_url = 'http://10.0.0.1/v1'")
        bump(connection)

    database.write_now(spoil)
    for what in ("discover", "test"):
        answer = await client.post(f"/v1/providers/twice/{what}", json={})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (409, "provider_set_aside")
        assert "10.0.0.1 is not a public address" in error["message"]


@pytest.mark.parametrize("what", ["test", "discover"])
async def test_without_a_worker_nobody_can_be_tried_and_it_says_so(
    client: httpx2.AsyncClient, what: str
) -> None:
    await client.post("/v1/providers", json=ATTIC)
    answer = await client.post(f"/v1/providers/attic-ollama/{what}", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker")
    assert "backchannel worker" in answer.json()["error"]["message"]
    assert (await client.post(f"/v1/providers/nobody/{what}", json={})).status_code == 404


# ---------------------------------------------------------------- limits


async def test_limits_are_set_changed_one_by_one_and_taken_away(client: httpx2.AsyncClient) -> None:
    said = {"requests_per_minute": 60.0, "concurrency": 2}
    made = (await client.post("/v1/providers", json=ATTIC | {"limits": said})).json()
    assert made["limits"] == said | {"tokens_per_minute": None}
    url = "/v1/providers/attic-ollama"
    for change in ({"tokens_per_minute": 9_000}, {"concurrency": None}):
        answer = await client.patch(url, json={"limits": change})
        assert answer.status_code == 200, answer.text
    assert (await client.get(url)).json()["limits"] == {
        "requests_per_minute": 60,
        "tokens_per_minute": 9_000,
        "concurrency": None,
    }
    answer = await client.patch(url, json={"limits": {"concurrency": 0}})
    assert answer.json()["error"]["param"] == "limits.concurrency"


async def test_a_provider_of_before_there_were_limits_has_none(
    client: httpx2.AsyncClient, database: Database
) -> None:
    await client.post("/v1/providers", json=ATTIC)
    database.write_now(lambda c: c.execute(text("UPDATE providers SET limits = NULL")))
    await client.patch("/v1/providers/attic-ollama", json={"default_model": "n"})
    shown = (await client.get("/v1/providers/attic-ollama")).json()
    assert set(shown["limits"].values()) == {None}


async def test_a_provider_that_is_left_alone_says_until_when(
    sqlite_url: str, redis_url: str
) -> None:
    settings = Settings(database_url=sqlite_url, redis_url=redis_url)
    async with AsyncExitStack() as stack, connect(redis_url) as redis:
        calling = await api(stack, settings)
        openai = build_registry(settings).get("openai")
        limiter = Limiter(redis, settings.redis_prefix, settings.lease_s)
        await limiter.hold(Hold(account_of(openai, {}), 60_000))
        listed = (await calling.get("/v1/providers")).json()["data"]
        (held,) = [each for each in listed if each["held_until"]]
        assert held["id"] == "openai"
        left = datetime.fromisoformat(held["held_until"]) - datetime.now(UTC)
        assert 30 < left.total_seconds() <= 61
        await redis.flushall()
        assert (await calling.get("/v1/providers/openai")).json()["held_until"] is None
