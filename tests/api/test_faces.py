"""The other forms of a job: one id, whoever asks, waits, leaves, follows or deletes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import httpx2
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from api.faces import Found
from api.response_sessions import entering
from backchannel.db import Database
from backchannel.schemas import Job
from backchannel.settings import Settings
from backchannel.tables import CANCELLED, FAILED
from tests import makers
from tests.api.play import Play, serving

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "Hello?"}]}
RESPONSE = {"model": "echo", "input": "Hello?", "background": True}


async def respond(client: httpx2.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/responses", json=RESPONSE | fields)
    assert answer.status_code == 200, answer.text
    response: dict[str, Any] = answer.json()
    return response


def job_of(response: dict[str, Any]) -> str:
    return f"job_{response['id'].partition('_')[2]}"


async def the_job(client: httpx2.AsyncClient) -> str:
    """The only job there is, once it is there."""
    while True:
        found = (await client.get("/v1/jobs")).json()["data"]
        if found:
            job_id: str = found[0]["id"]
            return job_id
        await asyncio.sleep(0.01)


def test_the_api_process_loads_neither_sdk() -> None:
    code = "import sys, api.main; sys.exit({'openai', 'anthropic'} & {*sys.modules} and 1 or 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_each_face_shows_only_its_own(client: httpx2.AsyncClient, play: Play) -> None:
    response = await respond(client)
    job_id = job_of(response)
    await play.run(job_id)
    digits = job_id.removeprefix("job_")
    assert (await client.get(f"/v1/jobs/{job_id}")).status_code == 200
    assert (await client.get(f"/v1/responses/resp_{digits}")).status_code == 200
    for wrong in (f"chat/completions/chatcmpl-{digits}", f"responses/{job_id}", "responses/resp_0"):
        answer = await client.get(f"/v1/{wrong}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_an_answer_is_waited_for(client: httpx2.AsyncClient, play: Play) -> None:
    asking = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
    job_id = await the_job(client)
    await play.run(job_id)
    answer = await asking
    assert answer.headers["x-backchannel-job"] == job_id
    assert answer.json()["choices"][0]["message"]["content"] == "Hello."


@pytest.mark.parametrize("state", [FAILED, CANCELLED])
async def test_no_sdk_sends_a_failed_job_again(
    client: httpx2.AsyncClient, play: Play, state: str
) -> None:
    asking = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
    job_id = await the_job(client)
    await play.run(job_id, state)
    answer = await asking
    assert answer.status_code >= 400
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-backchannel-job"] == job_id


@pytest.mark.parametrize("streams", [False, True])
async def test_whoever_waits_is_told_when_the_api_stops(
    settings: Settings, client: httpx2.AsyncClient, streams: bool
) -> None:
    async with httpx2.AsyncClient(timeout=30) as calling:
        async with serving(settings) as url:
            asking = asyncio.create_task(
                calling.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": streams})
            )
            job_id = await the_job(client)
            await asyncio.sleep(0.1)
        answer = await asking
    assert answer.headers["x-backchannel-job"] == job_id
    assert '"code":"api_stopping"' in answer.text
    if not streams:
        assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "false")


async def test_deleting_forgets_the_words_and_keeps_the_books(
    client: httpx2.AsyncClient, play: Play, database: Database
) -> None:
    secret = await respond(client, input="A secret.", instructions="A rule.", metadata={"a": "b"})
    refused = await client.delete(f"/v1/responses/{secret['id']}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_finished")
    await play.run(job_of(secret))
    before = makers.rows(database, "usage")
    assert (await client.delete(f"/v1/responses/{secret['id']}")).json()["deleted"] is True
    assert (await client.get(f"/v1/responses/{secret['id']}")).status_code == 404
    kept = repr(makers.everything(database))
    assert not any(word in kept for word in ("A secret.", "A rule.", "Hello."))
    assert makers.rows(database, "usage") == before
    stream = (await client.get(f"/v1/jobs/{job_of(secret)}/events")).text
    assert "event: end" in stream
    assert "lo." not in stream
    again = await client.post(f"/v1/jobs/{job_of(secret)}/retry", json={})
    assert again.json()["error"]["code"] == "deleted"


async def test_a_turn_that_was_followed_stays_in_the_conversation(
    client: httpx2.AsyncClient, play: Play, database: Database
) -> None:
    first = await respond(client, input="one")
    await play.run(job_of(first))
    second = await respond(client, input="two", previous_response_id=first["id"])
    await client.delete(f"/v1/responses/{first['id']}")
    attempt = await play.start(job_of(second))
    assert [each["content"] for each in attempt.claim.messages] == ["one", "Hello.", "two"]


async def test_what_is_not_stored_hears_the_conversation_and_leaves_no_trace_in_it(
    client: httpx2.AsyncClient, play: Play
) -> None:
    first = await respond(client, input="one")
    await play.run(job_of(first))
    apart = await respond(client, input="two", previous_response_id=first["id"], store=False)
    attempt = await play.start(job_of(apart))
    assert [each["content"] for each in attempt.claim.messages] == ["one", "Hello.", "two"]
    await attempt.finish()
    asked = RESPONSE | {"previous_response_id": apart["id"]}
    refused = await client.post("/v1/responses", json=asked)
    assert refused.json()["error"]["code"] == "previous_response_not_found"
    after = await respond(client, input="three", previous_response_id=first["id"])
    attempt = await play.start(job_of(after))
    assert [each["content"] for each in attempt.claim.messages] == ["one", "Hello.", "three"]


async def test_a_branch_needs_an_answer_to_begin_behind(
    client: httpx2.AsyncClient, play: Play
) -> None:
    first = await respond(client, input="one")
    await respond(client, input="two", previous_response_id=first["id"])
    asked = RESPONSE | {"previous_response_id": first["id"]}
    refused = await client.post("/v1/responses", json=asked)
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "previous_response_running"
    await play.run(job_of(first))
    branch = (await client.post("/v1/responses", json=asked)).json()
    attempt = await play.start(job_of(branch))
    assert [each["content"] for each in attempt.claim.messages] == ["one", "Hello.", "Hello?"]


async def test_two_api_processes_never_put_two_followers_into_one_session(
    client: httpx2.AsyncClient, play: Play, database: Database, settings: Settings
) -> None:
    first = await respond(client, input="one")
    await play.run(job_of(first))
    row = makers.row(database, job_of(first))
    job = Job.model_construct(id=row.id, session=row.session_id)
    enter = entering(Found(job, 0, [{"role": "user", "content": "one"}], {}))
    other = Database(settings.database, name="another-api")
    for _ in range(10):
        both = [
            each.submit(lambda c: enter(c, makers.new_job(caller="local")))
            for each in (database, other)
        ]
        made = [makers.row(database, future.result(30).job_id) for future in both]
        assert len({job.session_id for job in made}) == 2
        await play.run(made[0].id)
        await play.run(made[1].id)
        latest = next((job for job in made if job.session_id == row.session_id), None)
        if latest is not None:
            makers.change(database, latest.id, session_id=None, session_seq=None)
    other.close()


async def test_a_repeated_key_makes_no_second_session(
    client: httpx2.AsyncClient, play: Play, database: Database
) -> None:
    first = await respond(client)
    await play.run(job_of(first))
    await respond(client, previous_response_id=first["id"])
    for asked in (RESPONSE, RESPONSE | {"previous_response_id": first["id"]}):
        made = [
            await client.post("/v1/responses", json=asked, headers={"Idempotency-Key": str(asked)})
            for _ in range(3)
        ]
        assert len({each.json()["id"] for each in made}) == 1
        assert [each.headers.get("Idempotent-Replay") for each in made] == [None, "true", "true"]
    # of the first and its follower, of the keyed one, of the keyed branch
    assert len(makers.rows(database, "sessions")) == 3


async def test_the_same_key_is_not_the_same_request_through_another_face(
    client: httpx2.AsyncClient,
) -> None:
    key = {"Idempotency-Key": "k"}
    await client.post("/v1/responses", json=RESPONSE, headers=key)
    other = await client.post("/v1/jobs", json={"model": "echo", "prompt": "Hello?"}, headers=key)
    assert other.status_code == 409


async def test_heartbeats_do_not_disturb_the_sdks(
    served: httpx2.AsyncClient, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.faces.PING_S", 0.05)
    url = str(served.base_url)
    async with (
        AsyncOpenAI(base_url=f"{url}/v1", api_key="unused") as openai,
        AsyncAnthropic(base_url=url, api_key="unused") as anthropic,
    ):
        chat: Any = {"model": "echo", "messages": CHAT["messages"], "stream": True}
        streams: list[Any] = [
            await openai.chat.completions.create(**chat),
            await openai.responses.create(model="echo", input="Hello?", stream=True),
            await anthropic.messages.create(**chat, max_tokens=5),
        ]
        attempts = [
            await play.start(job["id"]) for job in (await served.get("/v1/jobs")).json()["data"]
        ]
        for attempt in attempts:
            await attempt.say("Hel")
            await asyncio.sleep(0.2)
            await attempt.say("lo.")
            await attempt.finish()
        ends = [[each async for each in stream][-1] for stream in streams]
    assert ends[0].choices[0].finish_reason == "stop"
    assert ends[1].response.output_text == "Hello."
    assert ends[2].type == "message_stop"


async def test_errors_are_in_the_form_of_whoever_asks(client: httpx2.AsyncClient) -> None:
    json_ = {"Content-Type": "application/json"}
    for body, status in ((b"{", 400), (b'{"a": 1, "a": 2}', 400), (b"{}", 400)):
        answer = await client.post("/v1/messages", content=body, headers=json_)
        assert answer.status_code == status
        assert answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert (await client.get("/v1/messages")).json()["type"] == "error"
    assert "type" not in (await client.get("/v1/jobs/job_0")).json()


async def test_a_page_of_chats_is_followed_to_its_end(
    client: httpx2.AsyncClient, play: Play, database: Database
) -> None:
    ids = []
    for number in range(3):
        job_id = makers.queued(
            database, caller="local", kind="chat.completion", meta={"n": str(number)}
        )
        await play.run(job_id)
        ids.append(f"chatcmpl-{job_id.removeprefix('job_')}")
    makers.queued(database, caller="bob", kind="chat.completion")
    first = (await client.get("/v1/chat/completions?limit=2")).json()
    assert ([each["id"] for each in first["data"]], first["has_more"]) == (ids[:2], True)
    rest = (await client.get(f"/v1/chat/completions?after={first['last_id']}")).json()
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == (ids[2:], False)
    newest = (await client.get("/v1/chat/completions?order=desc&limit=1")).json()
    assert [each["id"] for each in newest["data"]] == ids[2:]
    one = (await client.get("/v1/chat/completions?metadata[n]=1")).json()
    assert [each["id"] for each in one["data"]] == [ids[1]]
