"""Sessions over HTTP: turns in order, the model they are asked of, and who may see them."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from backchannel import lifecycle
from backchannel.db import Database
from backchannel.settings import Settings
from backchannel.tables import FAILED
from tests import makers
from tests.api.play import Play


async def begin(client: httpx2.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/sessions", json=fields)
    assert answer.status_code == 201, answer.text
    session: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/sessions/{session['id']}"
    return session


async def turn(client: httpx2.AsyncClient, session: str, **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/jobs", json={"prompt": "Hello?", "session": session} | fields)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


async def test_a_session_begins_with_its_model_or_the_default_one(
    client: httpx2.AsyncClient,
) -> None:
    plain = await begin(client)
    assert plain == {
        "id": plain["id"],
        "object": "session",
        "model": "echo:echo-1",
        "model_version": 1,
        "title": None,
        "system": None,
        "metadata": {},
        "created_at": plain["created_at"],
        "updated_at": plain["created_at"],
    }
    named = await begin(client, model="ollama:llama3.2:3b", title="T", metadata={"a": "b"})
    assert (named["model"], named["title"]) == ("ollama:llama3.2:3b", "T")
    assert named["metadata"] == {"a": "b"}
    whole = (await client.get(f"/v1/sessions/{named['id']}")).json()
    assert whole == named | {"messages": []}
    listed = (await client.get("/v1/sessions")).json()
    assert listed == {
        "object": "list",
        "data": [named, plain],
        "has_more": False,
        "next": None,
    }
    first = (await client.get("/v1/sessions", params={"limit": 1, "order": "asc"})).json()
    assert (first["data"], first["has_more"], first["next"]) == ([plain], True, plain["id"])
    rest = (
        await client.get("/v1/sessions", params={"order": "asc", "after": first["next"]})
    ).json()
    assert rest["data"] == [named]


async def test_turns_stand_in_order_with_their_jobs_states(
    client: httpx2.AsyncClient, play: Play, database: Database
) -> None:
    session = (await begin(client))["id"]
    first = await turn(client, session)
    second = await turn(client, session, prompt="And then?")
    assert first["session"] == second["session"] == session
    # strict order: the second waits for the first
    assert database.write_now(lambda c: lifecycle.claim(c, second["id"], "w", 20)) is None
    await play.run(first["id"])
    attempt = await play.start(second["id"])
    said = [message["content"] for message in attempt.claim.messages]
    assert said == ["Hello?", "Hello.", "And then?"]
    await attempt.finish(FAILED)
    messages = (await client.get(f"/v1/sessions/{session}")).json()["messages"]
    named = ("role", "content", "job_id", "state", "model")
    assert [tuple(message[name] for name in named) for message in messages] == [
        ("user", "Hello?", first["id"], "succeeded", None),
        ("assistant", "Hello.", first["id"], "succeeded", "echo:echo-1"),
        ("user", "And then?", second["id"], "failed", None),
    ]
    numbers = [message["seq"] for message in messages]
    assert numbers == sorted(set(numbers))


async def test_the_system_prompt_is_said_before_the_history_and_a_job_may_replace_it(
    client: httpx2.AsyncClient, play: Play
) -> None:
    session = (await begin(client, system="Be brief."))["id"]
    heard = []
    for own in ({}, {"system": "Be long."}, {}):
        job = await turn(client, session, **own)
        attempt = await play.start(job["id"])
        heard.append(attempt.claim.messages[0]["content"])
        await attempt.finish()
    assert heard == ["Be brief.", "Be long.", "Be brief."]
    whole = (await client.get(f"/v1/sessions/{session}")).json()
    assert whole["system"] == "Be brief."
    assert {message["role"] for message in whole["messages"]} == {"user", "assistant"}
    changed = await client.patch(f"/v1/sessions/{session}", json={"system": None})
    assert changed.json()["system"] is None


async def test_a_job_takes_its_session_s_model_and_one_that_names_another_switches_it(
    client: httpx2.AsyncClient,
) -> None:
    session = (await begin(client, model="echo:first"))["id"]

    async def model_now() -> tuple[str, int]:
        now = (await client.get(f"/v1/sessions/{session}")).json()
        return now["model"], now["model_version"]

    job = await turn(client, session)
    assert (job["model"], job["requested_model"]) == ("echo:first", None)
    assert job["model_reason"] == "the session's model"
    assert await model_now() == ("echo:first", 1)
    assert (await turn(client, session, model="echo:second"))["model"] == "echo:second"
    assert await model_now() == ("echo:second", 2)
    assert (await turn(client, session, model="echo:second"))["model"] == "echo:second"
    assert await model_now() == ("echo:second", 2)
    assert (await turn(client, session))["model"] == "echo:second"


async def test_a_change_touches_what_it_names_and_a_new_model_counts_up(
    client: httpx2.AsyncClient,
) -> None:
    session = await begin(client, title="T", metadata={"a": "b"}, model="echo:first")
    address = f"/v1/sessions/{session['id']}"

    async def change(**fields: Any) -> dict[str, Any]:
        answer = await client.patch(address, json=fields)
        assert answer.status_code == 200, answer.text
        changed: dict[str, Any] = answer.json()
        return changed | {"updated_at": session["updated_at"]}

    assert await change() == session
    assert await change(title="U") == session | {"title": "U"}
    assert await change(title=None, metadata={}) == session | {"title": None, "metadata": {}}
    assert (await change(model="echo:first"))["model_version"] == 1
    switched = await change(model="echo:second")
    assert (switched["model"], switched["model_version"]) == ("echo:second", 2)
    assert (await turn(client, session["id"]))["model"] == "echo:second"


async def test_a_model_without_its_key_is_refused_and_nothing_changes(
    client: httpx2.AsyncClient, database: Database
) -> None:
    session = await begin(client)
    before = makers.everything(database)
    for method, path in (("POST", ""), ("PATCH", f"/{session['id']}")):
        answer = await client.request(method, f"/v1/sessions{path}", json={"model": "openai:x"})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "provider_key_missing"
    assert makers.everything(database) == before


@pytest.mark.parametrize("session_id", ["sess_1", "session_0", "x' OR '1'='1"])
async def test_somebody_else_s_session_is_not_there(
    client: httpx2.AsyncClient, database: Database, settings: Settings, session_id: str
) -> None:
    makers.session(database, "sess_1", caller="alice")
    before = makers.everything(database)
    answers = [
        await client.get(f"/v1/sessions/{session_id}"),
        await client.patch(f"/v1/sessions/{session_id}", json={"title": "mine"}),
        await client.post("/v1/jobs", json={"prompt": "x", "session": session_id}),
        await client.post(
            "/v1/jobs", json={"prompt": "x", "session": session_id, "model": "echo:second"}
        ),
    ]
    for answer in answers:
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"
    assert makers.everything(database) == before
    assert (await client.get("/v1/sessions")).json()["data"] == []
