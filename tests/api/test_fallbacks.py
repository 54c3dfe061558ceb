"""Tiers, auto and fallbacks through every form a job is asked in."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from backchannel import lifecycle
from backchannel.books import Spent
from backchannel.db import Database
from backchannel.lifecycle import Ask
from tests import makers
from tests.api.play import Play

OURS = {"x_backchannel": {"fallbacks": ["echo:second", "groq:no-key", "ollama:third"]}}
KEPT = ["echo:second", "ollama:third"]
MESSAGES = [{"role": "user", "content": "Hello?"}]


@pytest.fixture(autouse=True)
def _tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCHANNEL_TIERS__FAST", '["echo:quick", "ollama:tiny"]')
    monkeypatch.setenv("BACKCHANNEL_TIERS__BALANCED", '["echo:usual"]')


async def post(client: httpx2.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post("/v1/jobs", json={"prompt": "Hello?"} | body)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


async def test_a_job_says_its_fallbacks_from_the_first_and_keeps_them(
    client: httpx2.AsyncClient, database: Database
) -> None:
    plain = await post(client, model="echo")
    assert (plain["fallbacks"], plain["fallback_from"]) == ([], None)
    job = await post(client, model="echo", **OURS["x_backchannel"])
    assert (job["model"], job["fallbacks"]) == ("echo:echo-1", KEPT)
    assert (await client.get(f"/v1/jobs/{job['id']}")).json() == job
    assert makers.claimed(database, job["id"]).fallbacks == KEPT
    tier = await post(client, model="tier:fast")
    assert (tier["model"], tier["fallbacks"]) == ("echo:quick", ["ollama:tiny"])
    auto = await post(client, model="auto", prompt="```x```")
    assert auto["model_reason"] == ("auto: balanced, because it has code; first available is echo")


@pytest.mark.parametrize(
    ("fallbacks", "says"),
    [
        (["nobody:x"], "There is no provider 'nobody'"),
        (["tier:fast"], "only models"),
        ("echo", "list"),
        (["echo"] * 17, "16"),
        ([""], "character"),
    ],
)
async def test_what_cannot_be_a_fallback_is_refused_and_nothing_is_accepted(
    client: httpx2.AsyncClient, database: Database, fallbacks: Any, says: str
) -> None:
    before = makers.everything(database)
    body = {"prompt": "Hello?", "model": "echo", "fallbacks": fallbacks}
    answer = await client.post("/v1/jobs", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"][:9]) == (400, "fallbacks")
    assert says in error["message"]
    chat = {"model": "echo", "messages": MESSAGES, "x_backchannel": {"fallbacks": fallbacks}}
    answer = await client.post("/v1/chat/completions", json=chat)
    param = answer.json()["error"]["param"]
    assert (answer.status_code, param[:23]) == (400, "x_backchannel.fallbacks")
    assert makers.everything(database) == before


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/responses", {"input": "Hello?"}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 9}),
    ],
)
async def test_the_faces_choose_like_a_job(
    client: httpx2.AsyncClient, play: Play, path: str, body: dict[str, Any]
) -> None:
    async def answered(**more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        known = {job["id"] for job in (await client.get("/v1/jobs")).json()["data"]}
        asking = asyncio.create_task(client.post(path, json=body | more))
        async with asyncio.timeout(20):
            while True:
                found = (await client.get("/v1/jobs")).json()["data"]
                new = [job["id"] for job in found if job["id"] not in known]
                if new:
                    break
                await asyncio.sleep(0.02)
        await play.run(new[0])
        answer = await asking
        assert answer.status_code == 200, answer.text
        return answer.json(), (await client.get(f"/v1/jobs/{new[0]}")).json()

    said, job = await answered(model="auto")
    assert said["model"] == job["model"] == "echo:quick"
    assert job["model_reason"].startswith("auto: fast, because it is short and plain")
    assert job["fallbacks"] == ["ollama:tiny"]
    if path != "/v1/messages":  # Anthropic's form has no place of ours
        said, job = await answered(model="echo", **OURS)
        assert (said["model"], job["fallbacks"]) == ("echo:echo-1", KEPT)


async def test_a_job_that_fell_back_says_so_in_its_stream_its_row_and_its_usage(
    client: httpx2.AsyncClient, play: Play, database: Database
) -> None:
    body = {"model": "echo:first", "input": "Hello?", "background": True, **OURS}
    response = (await client.post("/v1/responses", json=body)).json()
    job_id = response["x_backchannel"]["job"]
    attempt = await play.start(job_id)
    why = "named by the request; fell back from echo:first (unreachable)"
    bell = await play.write(
        lambda c: lifecycle.fall_back(
            c, attempt.claim, Ask("echo", "second", why), error_code="unreachable",
            error_message="It is down.", spent=Spent("unknown", None),
        )
    )  # fmt: skip
    assert (bell.job_id, bell.model, bell.attempt, bell.front) == (job_id, "echo:second", 2, True)
    assert not await play.write(lambda c: lifecycle.mark_call(c, attempt.claim)), "fenced off"
    again = await play.start(job_id)
    await again.say("Hel", "lo.")
    await again.finish()
    job = (await client.get(f"/v1/jobs/{job_id}")).json()
    assert (job["model"], job["fallback_from"], job["fallbacks"]) == (
        "echo:second",
        "echo:first",
        KEPT,
    )
    assert (job["model_reason"], job["attempt"], job["retries"]) == (why, 2, 0)
    done = (await client.get(f"/v1/responses/{response['id']}")).json()
    assert (done["status"], done["model"]) == ("completed", "echo:second")
    told = await client.get(f"/v1/responses/{response['id']}", params={"stream": "true"})
    assert '"model":"echo:first"' in told.text.splitlines()[1], "it begins as it began"
    books = (await client.get("/v1/usage", params={"group_by": "model,model_reason"})).json()
    by = {(each["model"], each["model_reason"]): each for each in books["data"]}
    assert by["echo:second", why]["attempts"] == 1
    assert by["echo:first", "named by the request"]["unbilled"]["attempts"] == 1

    retried = (await client.post(f"/v1/jobs/{job_id}/retry")).json()
    assert (retried["model"], retried["fallbacks"]) == ("echo:first", KEPT)


async def test_models_has_the_tiers_that_can_be_asked(client: httpx2.AsyncClient) -> None:
    names = {each["id"] for each in (await client.get("/v1/models")).json()["data"]}
    assert {"tier:fast", "fast", "auto", "tier:balanced"} <= names
    assert "tier:powerful" not in names
    assert (await client.get("/v1/models/tier:fast")).json()["owned_by"] == "echo"
