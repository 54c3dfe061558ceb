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
from tests.api.test_auth import new_key


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
        "model_rule": None,
        "model_version": 1,
        "double_texting": "enqueue",
        "history": None,
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


async def test_an_answer_without_a_word_is_a_turn_too(
    client: httpx2.AsyncClient, database: Database
) -> None:
    session = (await begin(client))["id"]
    job_id = (await turn(client, session))["id"]
    claim = makers.calling(database, job_id)
    database.write_now(lambda c: lifecycle.finish(c, claim, makers.outcome(message=None)))
    whole = (await client.get(f"/v1/sessions/{session}")).json()
    assert [each["content"] for each in whole["messages"]] == ["Hello?", ""]
    following = makers.claimed(database, (await turn(client, session))["id"])
    assert [each["role"] for each in following.messages] == ["user", "assistant", "user"]


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


# ---------------------------------------------------------------- how much is told


async def test_the_oldest_turns_are_left_out_when_the_budget_of_the_model_is_spent(
    client: httpx2.AsyncClient, play: Play
) -> None:
    budget = {"max_tokens": 10_000, "models": {"echo:small": 60}}
    session = await begin(client, system="Be brief.", history=budget)
    assert session["history"] == budget
    for number in range(4):
        job = await turn(client, session["id"], prompt=f"number {number} " + "x" * 40)
        await play.run(job["id"])
    whole = await turn(client, session["id"], prompt="And?")
    attempt = await play.start(whole["id"])
    assert len(attempt.claim.messages) == 1 + 4 * 2 + 1
    await attempt.finish()
    assert (await client.get(f"/v1/jobs/{whole['id']}")).json()["turns_dropped"] == 0

    small = await turn(client, session["id"], model="echo:small", prompt="And now?")
    attempt = await play.start(small["id"])
    said = [message["content"] for message in attempt.claim.messages]
    assert said[0] == "Be brief."
    assert said[1].startswith("number 3 ")
    assert said[2:] == ["Hello.", "And?", "Hello.", "And now?"]
    await attempt.finish()
    assert (await client.get(f"/v1/jobs/{small['id']}")).json()["turns_dropped"] == 3

    changed = await client.patch(f"/v1/sessions/{session['id']}", json={"history": None})
    assert changed.json()["history"] is None
    free = await turn(client, session["id"])
    assert len((await play.start(free["id"])).claim.messages) == 1 + 6 * 2 + 1
    assert (await client.get(f"/v1/jobs/{free['id']}")).json()["turns_dropped"] is None
    kept = (await client.get(f"/v1/sessions/{session['id']}")).json()["messages"]
    assert len(kept) == 6 * 2 + 1, "what is not told is not forgotten"


@pytest.mark.parametrize(
    ("history", "param"),
    [
        ({"max_tokens": 0}, "history.max_tokens"),
        ({"max_tokens": "9"}, "history.max_tokens"),
        ({"models": {"echo:echo-1": -1}}, "history.models.echo:echo-1"),
        ({"turns": 3}, "history.turns"),
    ],
)
async def test_a_budget_that_is_none_is_refused(
    client: httpx2.AsyncClient, history: dict[str, Any], param: str
) -> None:
    answer = await client.post("/v1/sessions", json={"history": history})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


# ---------------------------------------------------------------- a rule in place of a model


@pytest.mark.usefixtures("tiers")
async def test_a_session_of_auto_chooses_for_every_turn(client: httpx2.AsyncClient) -> None:
    session = await begin(client, model="auto")
    assert (session["model"], session["model_rule"]) == ("echo:usual", "auto")
    short = await turn(client, session["id"])
    assert (short["model"], short["requested_model"]) == ("echo:quick", None)
    assert short["model_reason"] == (
        "the session's auto: fast, because it is short and plain; first available is echo"
    )
    assert short["fallbacks"] == ["echo:second"]
    long = await turn(client, session["id"], prompt="x" * 80_000)
    assert (long["model"], long["fallbacks"]) == ("echo:strong", [])
    # the history counts too
    again = await turn(client, session["id"])
    assert (again["model"], again["model_reason"][:38]) == (
        "echo:strong",
        "the session's auto: powerful, because ",
    )
    address = f"/v1/sessions/{session['id']}"
    now = (await client.get(address)).json()
    assert (now["model"], now["model_rule"], now["model_version"]) == ("echo:strong", "auto", 3)

    fixed = (await client.patch(address, json={"model": "echo:fixed"})).json()
    assert (fixed["model"], fixed["model_rule"]) == ("echo:fixed", None)
    job = await turn(client, session["id"])
    assert (job["model"], job["model_reason"]) == ("echo:fixed", "the session's model")
    job = await turn(client, session["id"], model="tier:fast")
    assert (job["model"], job["fallbacks"]) == ("echo:quick", ["echo:second"])
    job = await turn(client, session["id"], fallbacks=["echo:third"])
    assert (job["model"], job["fallbacks"]) == ("echo:quick", ["echo:third"])
    assert job["model_reason"] == "the session's 'tier:fast'; first available is echo"
    assert (await client.get(address)).json()["model_rule"] == "tier:fast"


@pytest.fixture
def tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiers that need no key."""
    for tier, models in {
        "FAST": '["echo:quick", "echo:second"]',
        "BALANCED": '["echo:usual"]',
        "POWERFUL": '["groq:none", "echo:strong"]',
    }.items():
        monkeypatch.setenv(f"BACKCHANNEL_TIERS__{tier}", models)


async def test_a_retry_takes_no_model_that_its_key_is_not_for(
    client: httpx2.AsyncClient, database: Database
) -> None:
    own, whole = new_key(database, "alice", models=["echo:echo-1"]), new_key(database, "alice")
    session = (await client.post("/v1/sessions", json={"model": "echo"}, headers=own)).json()["id"]
    turn = {"session": session, "prompt": "Hello?"}
    job = (await client.post("/v1/jobs", json=turn, headers=own)).json()["id"]
    await client.post(f"/v1/jobs/{job}/cancel", headers=own)
    path = f"/v1/sessions/{session}"
    await client.patch(path, json={"model": "echo:other"}, headers=whole)
    refused = await client.post(f"/v1/jobs/{job}/retry", headers=own)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
    again = await client.post(f"/v1/jobs/{job}/retry", headers=whole)
    assert (again.status_code, again.json()["model"]) == (202, "echo:other")
