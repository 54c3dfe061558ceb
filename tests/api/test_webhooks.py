"""Webhooks over HTTP: their life, their secrets, the test event, and what became of deliveries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from api.webhooks import MOST
from backchannel import webhooks as store
from backchannel.db import Database
from backchannel.notices import EVENT_TYPES
from backchannel.settings import Settings
from backchannel.webhooks import Answer
from tests import makers
from tests.receiver import Receiver, receiver


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    """Loopback is allowed, for the receiver."""
    return Settings(
        home=tmp_path, database_url=database_url, redis_url=redis_url, egress_allow="loopback"
    )


@pytest.fixture
def listening() -> Iterator[Receiver]:
    """A receiver."""
    with receiver() as made:
        yield made


async def make(client: httpx2.AsyncClient, **asked: Any) -> dict[str, Any]:
    answer = await client.post("/v1/webhooks", json={"url": "https://example.com/h", **asked})
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/v1/webhooks/{answer.json()['id']}"
    made: dict[str, Any] = answer.json()
    return made


async def test_a_webhook_s_life(client: httpx2.AsyncClient, database: Database) -> None:
    made = await make(client, name="mine", event_types=["job.failed", "job.failed"])
    path = f"/v1/webhooks/{made['id']}"
    secret = made.pop("signing_secret")
    assert secret.startswith("whsec_")
    assert made["signing_secret_hint"] == f"whsec_…{secret[-4:]}"
    assert (made["object"], made["event_types"]) == ("webhook_endpoint", ["job.failed"])
    assert (made["enabled"], made["disabled_reason"]) == (True, None)
    assert (await client.get(path)).json() == made
    (row,) = makers.rows(database, "webhooks")
    assert secret.encode()[6:] not in repr(row).encode()

    change = {"event_types": ["batch.completed"], "enabled": False, "url": "https://b.example/"}
    changed = (await client.patch(path, json=change)).json()
    assert {name: changed[name] for name in change} == change
    assert changed["name"] == "mine"
    assert changed["disabled_reason"] == "It was switched off."
    back = (await client.patch(path, json={"enabled": True})).json()
    assert (back["enabled"], back["disabled_reason"]) == (True, None)

    makers.webhook(database, "wh_bob", caller="bob")
    listed = (await client.get("/v1/webhooks")).json()
    assert [each["id"] for each in listed["data"]] == [made["id"]]
    assert (await client.delete(path)).json() == {
        "id": made["id"], "object": "webhook_endpoint.deleted", "deleted": True,
    }  # fmt: skip
    assert (await client.get(path)).status_code == 404


async def test_without_a_word_it_is_told_of_everything(client: httpx2.AsyncClient) -> None:
    assert (await make(client))["event_types"] == list(EVENT_TYPES)


@pytest.mark.parametrize(
    ("asked", "code", "param"),
    [
        ({"url": "http://example.com/"}, "egress_refused", "url"),
        ({"url": "https://10.0.0.1/"}, "egress_refused", "url"),
        ({"url": "https://169.254.169.254/"}, "egress_refused", "url"),
        ({"url": "https://u:p@example.com/"}, "egress_refused", "url"),
        ({"url": "https://example.com/ö"}, "egress_refused", "url"),
        ({"url": ""}, "invalid_request", "url"),
        ({"url": "https://e.com/" + "x" * 2048}, "invalid_request", "url"),
        ({"url": "https://e.com/", "event_types": []}, "invalid_request", "event_types"),
        ({"url": "https://e.com/", "event_types": ["job.done"]}, "invalid_request", "event_types"),
        ({"url": "https://e.com/", "more": 1}, "invalid_request", "more"),
        ({}, "invalid_request", "url"),
    ],
)
async def test_what_cannot_be_a_webhook_is_refused(
    client: httpx2.AsyncClient, asked: dict[str, Any], code: str, param: str
) -> None:
    answer = await client.post("/v1/webhooks", json=asked)
    assert answer.status_code == (403 if code == "egress_refused" else 400)
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    made = await make(client)
    if "url" in asked:
        answer = await client.patch(f"/v1/webhooks/{made['id']}", json=asked)
        assert answer.json()["error"]["code"] == code


async def test_there_can_be_so_many_and_no_more(client: httpx2.AsyncClient) -> None:
    ids = [(await make(client))["id"] for _ in range(MOST)]
    answer = await client.post("/v1/webhooks", json={"url": "https://example.com/"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "too_many_webhooks")
    first = (await client.get("/v1/webhooks?limit=12")).json()
    rest = (await client.get(f"/v1/webhooks?limit=12&after={first['last_id']}")).json()
    assert [each["id"] for each in first["data"] + rest["data"]] == ids[::-1]
    assert (first["has_more"], rest["has_more"]) == (True, False)


async def test_somebody_else_s_is_not_there(client: httpx2.AsyncClient, database: Database) -> None:
    makers.webhook(database, caller="bob")
    for method, path in (
        ("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/rotate"), ("POST", "/test"),
        ("GET", "/deliveries"), ("POST", "/deliveries/replay"), ("POST", "/deliveries/e/replay"),
    ):  # fmt: skip
        options = {"json": {}} if method == "PATCH" else {}
        answer = await client.request(method, f"/v1/webhooks/wh_1{path}", **options)
        assert answer.status_code == 404, (method, path)
    assert len(makers.rows(database, "webhooks")) == 1


async def test_a_test_event_is_signed_and_its_answer_told(
    client: httpx2.AsyncClient, listening: Receiver
) -> None:
    made = await make(client, url=listening.url)
    path = f"/v1/webhooks/{made['id']}/test"
    listening.status = 418
    result = (await client.post(path, json={"event_type": "response.completed"})).json()
    assert result == {
        "object": "webhook_endpoint.test", "webhook_endpoint_id": made["id"],
        "event_type": "response.completed", "success": True, "status_code": 418,
        "error": "It answered 418.",
    }  # fmt: skip
    (message,) = listening.messages
    event = message.verified(made["signing_secret"])
    assert (event["id"], event["type"]) == (message.id, "response.completed")
    assert event["data"] == {"id": "resp_test"}
    assert message.headers["user-agent"].startswith("Backchannel/")
    assert (await client.post(path)).json()["event_type"] == made["event_types"][0]
    refused = await client.post(path, json={"event_type": "job.done"})
    assert refused.json()["error"]["param"] == "event_type"


async def test_a_test_that_meets_nobody_or_a_redirect_says_so(
    client: httpx2.AsyncClient, listening: Receiver
) -> None:
    made = await make(client, url=listening.url)
    path = f"/v1/webhooks/{made['id']}/test"
    listening.status, listening.headers = 302, {"location": "http://169.254.169.254/"}
    result = (await client.post(path)).json()
    assert (result["status_code"], result["success"]) == (302, True)
    assert "redirects are not followed" in result["error"]
    assert len(listening.messages) == 1
    listening.close()
    result = (await client.post(path)).json()
    assert (result["status_code"], result["success"]) == (None, False)
    assert "Cannot connect" in result["error"]


async def test_a_secret_is_rotated_with_or_without_a_day_for_both(
    client: httpx2.AsyncClient, listening: Receiver
) -> None:
    made = await make(client, url=listening.url)
    path, old = f"/v1/webhooks/{made['id']}", made["signing_secret"]
    new = (await client.post(f"{path}/rotate")).json()["signing_secret"]
    assert new != old
    await client.post(f"{path}/test")
    for secret in (old, new):
        assert listening.messages[-1].verified(secret)
    newest = (
        await client.post(f"{path}/rotate", json={"keep_old_secret_active_for_24_hours": False})
    ).json()["signing_secret"]
    await client.post(f"{path}/test")
    assert listening.messages[-1].verified(newest)
    for secret in (old, new):
        with pytest.raises(Exception, match="No matching signature"):
            listening.messages[-1].verified(secret)


async def test_deliveries_are_listed_and_replayed(
    client: httpx2.AsyncClient, database: Database
) -> None:
    makers.webhook(database, caller="local")
    ids = [makers.finished(database, caller="local") for _ in range(3)]
    events = [each.replace("job_", "evt_") for each in reversed(ids)]
    (taken,) = database.write_now(lambda c: store.take(c, "wh_1", 1))
    database.write_now(lambda c: store.settle(c, taken, Answer(410, "It answered 410.")))
    (fresh,) = [makers.finished(database, caller="local")]
    path = "/v1/webhooks/wh_1/deliveries"
    listed = (await client.get(path)).json()
    assert [each["id"] for each in listed["data"]] == events, "a webhook that is off hears nothing"
    first = (await client.get(f"{path}?limit=2")).json()
    rest = (await client.get(f"{path}?limit=2&after={first['next']}")).json()
    assert [each["id"] for each in first["data"] + rest["data"]] == events
    dead = (await client.get(f"{path}?state=dead")).json()["data"]
    assert len(dead) == 3
    gone = next(each for each in dead if each["id"] == taken.event_id)
    assert (gone["status_code"], gone["error"], gone["tries"]) == (410, "It answered 410.", 1)
    assert (await client.get(f"{path}?state=lost")).status_code == 400

    one = (await client.post(f"{path}/{taken.event_id}/replay")).json()
    assert (one["state"], one["tries"]) == ("pending", 0)
    again = await client.post(f"{path}/{taken.event_id}/replay")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "not_finished")
    assert (await client.post(f"{path}/evt_none/replay")).status_code == 404
    assert (await client.post(f"{path}/replay")).json() == {"replayed": 2}
    assert fresh not in str(listed)


async def test_openai_s_sdk_manages_them_too(
    served: httpx2.AsyncClient, listening: Receiver
) -> None:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(
        base_url=f"{served.base_url}/v1", api_key="none", max_retries=0
    ) as client:
        made = await client.webhooks.create(
            event_types=["batch.completed"], name="mine", url=listening.url
        )
        assert made.signing_secret.startswith("whsec_")
        changed = await client.webhooks.update(made.id, event_types=["response.completed"])
        assert (changed.name, changed.event_types) == ("mine", ["response.completed"])
        result = await client.webhooks.test(made.id, event_type="response.completed")
        assert (result.status_code, result.success) == (204, True)
        (message,) = listening.messages
        event = client.webhooks.unwrap(message.body, message.headers, secret=made.signing_secret)
        assert (event.type, event.data.id) == ("response.completed", "resp_test")
        rotated = await client.webhooks.rotate_secret(made.id)
        assert rotated.signing_secret != made.signing_secret
        assert [each.id async for each in client.webhooks.list()] == [made.id]
        assert (await client.webhooks.retrieve(made.id)).url == listening.url
        assert (await client.webhooks.delete(made.id)).deleted
