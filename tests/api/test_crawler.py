"""Two callers: nothing of the one's is seen, changed or confirmed to the other, at any address.

Alice has one of everything, each with a secret in it. Bob then calls every operation of the OpenAPI
document with every id of hers in every place an id could stand.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import pytest
from sqlalchemy import select

from backchannel.background import end
from backchannel.db import Database
from backchannel.tables import QUEUED, jobs
from tests import makers
from tests.api.play import Play
from tests.api.test_auth import new_key
from tests.api.test_batches import create, uploaded, work
from tests.backchannel.batching import line

SECRET = "the cat's secret"  # in all that is Alice's
UNKNOWN = {"job_": "job_0", "chatcmpl-": "chatcmpl-0", "resp_": "resp_0", "session_": "session_0"}
UNKNOWN |= {"file-": "file-0", "batch_": "batch_0", "wh_": "wh_0", "evt_": "evt_0"}

# Parameters of paths that are no secret: everybody sees the same providers and models.
PUBLIC = {"model", "provider_id"}

SAID = [{"role": "user", "content": "Hello?"}]
BODIES: dict[tuple[str, str], Any] = {
    ("post", "/v1/jobs"): {"model": "echo", "prompt": "Hello?"},
    ("post", "/v1/sessions"): {"model": "echo"},
    ("patch", "/v1/sessions/{session_id}"): {"title": "Bob's"},
    ("post", "/v1/chat/completions"): {"model": "echo", "messages": SAID},
    ("post", "/v1/chat/completions/{completion_id}"): {"metadata": {"whose": "bob"}},
    ("post", "/v1/responses"): {"model": "echo", "input": "Hello?"},
    ("post", "/v1/messages"): {"model": "echo", "max_tokens": 9, "messages": SAID},
    ("post", "/v1/messages/count_tokens"): {"model": "echo", "messages": SAID},
    ("post", "/v1/webhooks"): {"url": "https://hooks.example.com/bob"},
    ("patch", "/v1/webhooks/{webhook_id}"): {"name": "Bob's"},
    ("post", "/v1/webhooks/{webhook_id}/rotate"): {},
    ("post", "/v1/webhooks/{webhook_id}/test"): {},
    ("post", "/v1/providers"): {
        "name": "b",
        "base_url": "https://b.example.com",
        "default_model": "m",
    },
    ("patch", "/v1/providers/{provider_id}"): {"default_model": "m"},
    ("post", "/v1/providers/{provider_id}/test"): {},
    ("post", "/v1/batches"): {"input_file_id": "file-0", "endpoint": "/v1/chat/completions"},
}


class Alice:
    """Her calls, and the ids of all that is hers by the name of a path's parameter."""

    def __init__(self, client: httpx2.AsyncClient, play: Play, database: Database) -> None:
        self.client = client
        self.headers = new_key(database, "alice")
        self._play = play
        self._database = database
        self.ids: dict[str, list[str]] = {}

    async def post(self, path: str, body: Any, **headers: str) -> dict[str, Any]:
        answer = await self.client.post(path, json=body, headers={**self.headers, **headers})
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def has_everything(self) -> None:
        """Make it all."""
        meta = {"secret": SECRET}
        asked: dict[str, Any] = {"model": "echo", "metadata": meta}
        url = "https://hooks.example.com/alice"
        webhook = await self.post("/v1/webhooks", {"url": url, "name": SECRET})
        session = await self.post("/v1/sessions", {**asked, "title": SECRET, "system": SECRET})
        turn = await self.post("/v1/jobs", {**asked, "prompt": SECRET, "session": session["id"]})
        await self._answer(turn["id"])
        key = {"Idempotency-Key": "the-same-key"}
        waiting = await self.post("/v1/jobs", {**asked, "prompt": SECRET, "lane": "batch"}, **key)
        response = await self.post("/v1/responses", {**asked, "input": SECRET, "background": True})
        await self._answer(response["id"].replace("resp_", "job_"))
        said = [{"role": "user", "content": SECRET}]
        asking = asyncio.create_task(
            self.post("/v1/chat/completions", {**asked, "messages": said}), name="alice-asks"
        )
        await self._answer(await self._newest("chat.completion"))
        completion = await asking
        headers = dict(self.client.headers)
        self.client.headers.update(self.headers)
        lines = [
            line(f"{SECRET} {n}", body={"model": "echo", "messages": said, "metadata": meta})
            for n in (1, 2)
        ]
        file_id = await uploaded(self.client, *lines)
        batch = (await create(self.client, file_id, metadata=meta, key="the-same-key")).json()
        work(self._database, batch["id"], "succeeded", "failed")
        batch = (await self.client.get(f"/v1/batches/{batch['id']}")).json()
        listed = await self.client.get(f"/v1/webhooks/{webhook['id']}/deliveries")
        self.client.headers = httpx2.Headers(headers)
        files = [file_id, batch["output_file_id"], batch["error_file_id"]]
        self.ids = {
            "job_id": [waiting["id"], turn["id"]],
            "completion_id": [completion["id"]],
            "response_id": [response["id"]],
            "session_id": [session["id"]],
            "file_id": files,
            "batch_id": [batch["id"]],
            "webhook_id": [webhook["id"]],
            "delivery_id": [each["id"] for each in listed.json()["data"]][:2],
        }

    async def _newest(self, kind: str) -> str:
        newest = select(jobs.c.id).where(jobs.c.kind == kind).order_by(jobs.c.id.desc())
        for _ in range(500):
            found: str | None = await self._database.read(lambda c: c.execute(newest).scalar())
            if found is not None:
                return found
            await asyncio.sleep(0.02)
        raise AssertionError(f"no {kind} was accepted")

    async def _answer(self, job_id: str) -> None:
        attempt = await self._play.start(job_id)
        await attempt.say(SECRET)
        await attempt.finish()


@pytest.fixture
async def alice(client: httpx2.AsyncClient, play: Play, database: Database) -> AsyncIterator[Alice]:
    """Alice, with all that is hers; and a worker that answers Bob."""
    made = Alice(client, play, database)
    await made.has_everything()

    async def answer_bob() -> None:
        waiting = select(jobs.c.id).where(jobs.c.caller == "bob", jobs.c.state == QUEUED)
        while True:
            for job_id in await database.read(lambda c: list(c.execute(waiting).scalars())):
                await play.run(job_id)
            await asyncio.sleep(0.01)

    answering = asyncio.create_task(answer_bob(), name="answer-bob")
    yield made
    await end(answering)


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every operation that callers use."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if path.startswith("/v1/"):
                yield method, path, operation


def names(operation: dict[str, Any], place: str) -> list[str]:
    return [each["name"] for each in operation.get("parameters", ()) if each["in"] == place]


def text_places(document: dict[str, Any], schema: Any) -> Iterator[tuple[str, ...]]:
    """Where in a body a text may stand, by the names of fields."""
    ahead: list[tuple[Any, tuple[str, ...]]] = [(schema, ())]
    while ahead:
        here, place = ahead.pop()
        if "$ref" in here:
            here = document["components"]["schemas"][here["$ref"].rpartition("/")[2]]
        if here.get("type") == "string" and place:
            yield place
        ahead += [(each, place) for each in here.get("anyOf", ())]
        if len(place) < 2:
            ahead += [(each, (*place, name)) for name, each in here.get("properties", {}).items()]


def requests_of_bob(
    document: dict[str, Any], ids: dict[str, list[str]]
) -> Iterator[tuple[bool, str, str, dict[str, Any], str]]:
    """Whether her id stands in the path, and method, path, the rest, and her id."""
    every = [each for hers in ids.values() for each in hers]
    for method, path, operation in operations(document):
        body = BODIES.get((method, path))
        send: dict[str, Any] = {} if body is None else {"json": body}
        secret = [name for name in names(operation, "path") if name not in PUBLIC]
        for name in secret:
            for theirs in every:
                whole = path.replace(f"{{{name}}}", theirs)
                for other in secret:
                    whole = whole.replace(f"{{{other}}}", ids[other][0])
                yield True, method, whole, send, theirs
        mine = path
        for name in names(operation, "path"):
            mine = mine.replace(f"{{{name}}}", "echo")
        for name in names(operation, "query"):
            for theirs in every:
                yield False, method, mine, {**send, "params": {name: theirs}}, theirs
        content = operation.get("requestBody", {}).get("content", {}).get("application/json")
        places = set(text_places(document, content["schema"])) if content else ()
        for place in sorted(places):
            for theirs in every:
                yield False, method, mine, {"json": _put(body, place, theirs)}, theirs


def _put(body: Any, place: tuple[str, ...], value: str) -> Any:
    changed = copy.deepcopy(body)
    here = changed
    for name in place[:-1]:
        if not isinstance(here.get(name), dict):
            here[name] = {}
        here = here[name]
    here[place[-1]] = value
    return changed


def unknown(theirs: str) -> str:
    """An id of the same kind that nobody has."""
    return next(other for prefix, other in UNKNOWN.items() if theirs.startswith(prefix))


def test_the_crawler_knows_every_place(document: dict[str, Any]) -> None:
    known = {"job_id", "completion_id", "response_id", "session_id", "file_id", "batch_id"}
    known |= {"webhook_id", "delivery_id"}
    for method, path, operation in operations(document):
        assert set(names(operation, "path")) <= known | PUBLIC, f"no id for {path}"
        takes = "application/json" in operation.get("requestBody", {}).get("content", {})
        assert ((method, path) in BODIES) == takes, f"no body for {method} {path}"


@pytest.fixture
def document(client: httpx2.AsyncClient) -> dict[str, Any]:
    """The OpenAPI document of the running application."""
    found: dict[str, Any] = client._transport.app.openapi()  # type: ignore[attr-defined]
    return found


async def test_bob_finds_nothing_of_alice_s(
    alice: Alice, database: Database, document: dict[str, Any]
) -> None:
    bob = new_key(database, "bob")
    before = makers.everything(database)
    asked = 0
    for in_path, method, path, send, theirs in requests_of_bob(document, alice.ids):
        answer = await alice.client.request(method, path, headers=bob, **send)
        asked += 1
        where = f"{method} {path} {send}: {answer.status_code} {answer.text[:300]}"
        assert answer.status_code < 500, where
        assert SECRET not in answer.text, where
        if in_path:
            assert answer.status_code in (404, 400), where
        if answer.status_code >= 400:  # an id of nobody's gives the same answer
            other = unknown(theirs)
            again = json.loads(json.dumps(send).replace(theirs, other))
            same = await alice.client.request(
                method, path.replace(theirs, other), headers=bob, **again
            )
            assert same.status_code == answer.status_code, where
            assert same.text.replace(other, "…") == answer.text.replace(theirs, "…"), where
    assert asked > 500
    for path in ("jobs", "sessions", "files", "batches", "chat/completions", "usage"):
        answer = await alice.client.get(f"/v1/{path}", headers=bob)
        assert answer.status_code == 200
        assert SECRET not in answer.text
    key = {"Idempotency-Key": "the-same-key", **bob}
    answer = await alice.client.post("/v1/jobs", json=BODIES["post", "/v1/jobs"], headers=key)
    assert answer.status_code == 202
    assert "idempotent-replay" not in answer.headers
    _unchanged(before, makers.everything(database))


def _unchanged(before: dict[str, list[dict[str, Any]]], after: dict[str, Any]) -> None:
    """Whatever was on record still is, as it was."""
    for table in before.keys() - {"caller_keys"}:
        assert [row for row in before[table] if row not in after[table]] == [], table


READ = {
    "job_id": ["/v1/jobs/{}"],
    "completion_id": ["/v1/chat/completions/{}", "/v1/chat/completions/{}/messages"],
    "response_id": ["/v1/responses/{}", "/v1/responses/{}/input_items"],
    "session_id": ["/v1/sessions/{}"],
    "file_id": ["/v1/files/{}/content"],
    "batch_id": ["/v1/batches/{}"],
    "webhook_id": ["/v1/webhooks/{}"],
    "delivery_id": [],  # listed with their webhook, and without a word of what was said
}


async def test_alice_finds_it_all(alice: Alice) -> None:
    """So the secrets are where Bob has looked for them."""
    for name, ids in alice.ids.items():
        for path in READ[name]:
            for each in ids:
                answer = await alice.client.get(path.format(each), headers=alice.headers)
                assert answer.status_code == 200, answer.text
                assert SECRET in answer.text, path
    events = f"/v1/jobs/{alice.ids['job_id'][1]}/events"
    assert SECRET in (await alice.client.get(events, headers=alice.headers)).text
