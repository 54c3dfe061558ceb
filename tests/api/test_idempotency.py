"""Idempotency-Key: every POST that makes something makes it once, and says again what it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from api.main import create_app
from backchannel import idempotency
from backchannel.db import Database
from backchannel.settings import Settings
from tests import makers
from tests.api.test_auth import new_key

KEY = {"Idempotency-Key": "k"}
HOOK = {"url": "https://example.com/hooks"}
GATEWAY = {"name": "Gateway", "base_url": "https://llm.example.com/v1", "default_model": "m"}
# what is made by each POST that keeps its key among the used ones: body, another body, the table
MAKES = {
    "/v1/sessions": ({"model": "echo"}, {"model": "echo", "title": "other"}, "sessions"),
    "/v1/webhooks": (HOOK, {**HOOK, "name": "other"}, "webhooks"),
    "/v1/webhook_endpoints": (HOOK, {**HOOK, "name": "other"}, "webhooks"),
    "/v1/providers": (GATEWAY, {**GATEWAY, "default_model": "other"}, "providers"),
}
KEYED = {
    "/v1/jobs", "/v1/jobs/{job_id}/retry", "/v1/chat/completions", "/v1/responses", "/v1/messages",
    "/v1/files", "/v1/batches", "/v1/batches/{batch_id}/retry", "/v1/sessions", "/v1/webhooks",
    "/v1/webhooks/{webhook_id}/rotate", "/v1/providers",
}  # fmt: skip
# To do them twice comes to the same, or is what was asked for.
NEEDS_NONE = {
    "/v1/jobs/{job_id}/cancel", "/v1/batches/{batch_id}/cancel",
    "/v1/responses/{response_id}/cancel", "/v1/chat/completions/{completion_id}",
    "/v1/messages/count_tokens", "/v1/providers/{provider_id}/discover",
    "/v1/providers/{provider_id}/test", "/v1/webhooks/{webhook_id}/test",
    "/v1/webhooks/{webhook_id}/deliveries/replay",
    "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/replay",
}  # fmt: skip


async def test_the_document_names_the_header_where_it_works(client: httpx2.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    posts = {path: each["post"] for path, each in paths.items() if "post" in each}
    told = {
        path
        for path, post in posts.items()
        if any(each["name"] == "Idempotency-Key" for each in post.get("parameters", ()))
    }
    assert told == KEYED
    assert posts.keys() - told == NEEDS_NONE


@pytest.mark.parametrize("path", MAKES)
async def test_the_same_again_is_the_first_answer_and_another_body_a_409(
    client: httpx2.AsyncClient, second: httpx2.AsyncClient, database: Database, path: str
) -> None:
    body, other, table = MAKES[path]
    first = await client.post(path, json=body, headers=KEY)  # commits, then perhaps dies
    again = await second.post(path, json=body, headers=KEY)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert again.headers.get("Location") == first.headers.get("Location")
    replays = [each.headers.get("Idempotent-Replay") for each in (first, again)]
    assert replays == [None, "true"]

    before = makers.everything(database)
    refused = await client.post(path, json=other, headers=KEY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "idempotency_mismatch")
    assert makers.everything(database) == before
    assert len(makers.rows(database, table)) == 1


@pytest.mark.parametrize("path", MAKES)
async def test_fifty_at_once_make_one(
    client: httpx2.AsyncClient, second: httpx2.AsyncClient, database: Database, path: str
) -> None:
    body, _, table = MAKES[path]
    answers = await asyncio.gather(
        *((client, second)[n % 2].post(path, json=body, headers=KEY) for n in range(50))
    )
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.text for answer in answers}) == 1
    replays = [answer.headers.get("Idempotent-Replay") for answer in answers]
    assert (replays.count(None), replays.count("true")) == (1, 49)
    assert len(makers.rows(database, table)) == 1


@pytest.fixture
async def second(settings: Settings) -> AsyncIterator[httpx2.AsyncClient]:
    """Another API process, which never saw what the first one answered."""
    app = create_app(settings)
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://localhost") as calling,
    ):
        yield calling


@pytest.mark.parametrize("path", MAKES)
async def test_a_refused_post_leaves_its_key_free(
    client: httpx2.AsyncClient, database: Database, path: str
) -> None:
    bad = {"name": "Groq", "base_url": "https://a.example/v1", "default_model": "m"}
    refused = {"/v1/sessions": {"model": "nobody:x"}, "/v1/providers": bad}
    answer = await client.post(path, json=refused.get(path, {"url": "http://x"}), headers=KEY)
    assert answer.is_client_error
    assert makers.rows(database, "used_keys") == []
    assert (await client.post(path, json=MAKES[path][0], headers=KEY)).status_code == 201


async def test_a_key_is_its_caller_s_own(client: httpx2.AsyncClient, database: Database) -> None:
    alice, carol = (new_key(database, name) for name in ("alice", "carol"))
    for path in ("/v1/sessions", "/v1/webhooks"):
        body, other, table = MAKES[path]
        first = await client.post(path, json=body, headers=KEY | alice)
        theirs = await client.post(path, json=other, headers=KEY | carol)
        assert (first.status_code, theirs.status_code) == (201, 201)
        assert theirs.headers.get("Idempotent-Replay") is None
        assert len(makers.rows(database, table)) == 2


# ---------------------------------------------------------------- webhooks and their secrets


async def rotated(client: httpx2.AsyncClient, webhook: str, key: str, **asked: Any) -> Any:
    return await client.post(
        f"/v1/webhooks/{webhook}/rotate", json=asked, headers={"Idempotency-Key": key}
    )


async def test_a_rotation_whose_answer_was_lost_is_not_done_twice(
    client: httpx2.AsyncClient, database: Database
) -> None:
    made = (await client.post("/v1/webhooks", json=HOOK)).json()
    answers = await asyncio.gather(*(rotated(client, made["id"], "k") for _ in range(20)))
    (secret,) = {answer.json()["signing_secret"] for answer in answers}
    assert secret not in (None, made["signing_secret"])
    (row,) = makers.rows(database, "webhooks")
    assert row["old_secret"] is not None  # the one that receivers still have
    other = await rotated(client, made["id"], "k", keep_old_secret_active_for_24_hours=False)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_mismatch")


async def test_a_secret_that_was_changed_is_not_shown_again(client: httpx2.AsyncClient) -> None:
    made = (await client.post("/v1/webhooks", json=HOOK, headers=KEY)).json()
    first = (await rotated(client, made["id"], "1")).json()
    again = (await client.post("/v1/webhooks", json=HOOK, headers=KEY)).json()
    assert (again["id"], again["signing_secret"]) == (made["id"], None)
    assert (await rotated(client, made["id"], "1")).json() == first
    await rotated(client, made["id"], "2")
    assert (await rotated(client, made["id"], "1")).json()["signing_secret"] is None


async def test_the_last_webhook_there_can_be_is_found_again(client: httpx2.AsyncClient) -> None:
    for n in range(20):
        made = await client.post("/v1/webhooks", json=HOOK, headers={"Idempotency-Key": str(n)})
    again = await client.post("/v1/webhooks", json=HOOK, headers={"Idempotency-Key": "19"})
    assert again.json() == made.json()


# ---------------------------------------------------------------- what is removed


@pytest.mark.parametrize("path", ["/v1/webhooks", "/v1/providers"])
async def test_a_key_is_free_again_when_its_thing_is_removed(
    client: httpx2.AsyncClient, database: Database, path: str
) -> None:
    body, other, _ = MAKES[path]
    first = (await client.post(path, json=body, headers=KEY)).json()["id"]
    assert (await client.delete(f"{path}/{first}")).status_code == 200
    second = await client.post(path, json=other, headers=KEY)
    assert (second.status_code, second.headers.get("Idempotent-Replay")) == (201, None)
    await client.delete(f"{path}/{second.json()['id']}")
    database.write_now(idempotency.forget_free)
    assert makers.rows(database, "used_keys") == []


async def test_the_key_of_a_removed_provider_does_not_stand_for_its_successor(
    client: httpx2.AsyncClient,
) -> None:
    await client.post("/v1/providers", json=GATEWAY, headers=KEY)
    await client.delete("/v1/providers?confirm=true")
    assert (await client.post("/v1/providers", json=GATEWAY)).status_code == 201
    again = await client.post("/v1/providers", json=GATEWAY, headers=KEY)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "provider_exists")
