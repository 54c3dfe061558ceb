"""Jobs over HTTP: accepted at once and once, listed, waited for, asked again."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from backchannel import lifecycle
from backchannel.db import Database
from backchannel.pubsub import connect
from backchannel.queue import Ringer, queue_length
from backchannel.settings import Settings
from backchannel.tables import BATCH, CANCELLED, FAILED, INTERACTIVE, SUCCEEDED
from tests import makers
from tests.api.play import ECHO, Play, post, serving
from tests.servers import valkey


async def test_a_post_becomes_a_row_a_doorbell_and_an_address(
    client: httpx2.AsyncClient, settings: Settings, database: Database
) -> None:
    answer = await client.post(
        "/v1/jobs",
        json={
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi", "x": {"y": 1}}]},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "42"},
            ],
            "system": "Be brief.",
            "model": "echo:echo-1",
            "parameters": {"max_tokens": 7, "temperature": None},
            "metadata": {"who": "me"},
            "stream": False,
            "deadline_s": 60,
        },
    )
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job | {"id": "", "created_at": "", "run_at": "", "deadline_at": ""} == {
        "id": "",
        "object": "job",
        "state": "queued",
        "lane": "interactive",
        "model": "echo:echo-1",
        "provider": "echo",
        "requested_model": "echo:echo-1",
        "model_reason": "named by the request",
        "fallbacks": [],
        "fallback_from": None,
        "session": None,
        "turns_dropped": None,
        "interrupted_by": None,
        "parent_id": None,
        "metadata": {"who": "me"},
        "stream": False,
        "created_at": "",
        "started_at": None,
        "finished_at": None,
        "run_at": "",
        "deadline_at": "",
        "cancel_requested_at": None,
        "attempt": 0,
        "retries": 0,
        "crashes": 0,
        "finish_reason": None,
        "message": None,
        "usage": None,
        "error": None,
    }
    assert (await client.get(answer.headers["location"])).json() == job
    claim = makers.claimed(database, job["id"])
    assert claim.parameters == {"max_tokens": 7}
    assert [message["role"] for message in claim.messages] == [
        "system", "user", "assistant", "tool",
    ]  # fmt: skip
    assert claim.messages[1]["content"] == [{"type": "text", "text": "Hi", "x": {"y": 1}}]
    assert "content" not in claim.messages[2]
    redis = connect(settings.redis)
    for _ in range(100):
        if await queue_length(redis, settings.redis_prefix, INTERACTIVE) == 1:
            break
        await asyncio.sleep(0.02)
    else:
        pytest.fail("the doorbell was not rung")
    await redis.aclose()


async def test_behind_a_long_queue_the_dispatcher_rings(
    client: httpx2.AsyncClient, database: Database, settings: Settings
) -> None:
    redis, lane = connect(settings.redis), f"{settings.redis_prefix}{INTERACTIVE}"
    await redis.lpush(lane, *[b"a doorbell"] * Ringer.ENOUGH)
    first = (await post(client))["id"]
    for _ in range(100):
        if await redis.llen(lane) > Ringer.ENOUGH:
            break
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.1)
    second = (await post(client))["id"]
    await asyncio.sleep(0.2)
    assert await redis.llen(lane) == Ringer.ENOUGH + 1
    # what the books call rung has its doorbell: no other is looked for, 5 s later, and rung twice
    assert makers.row(database, first).rung_ms is not None
    assert makers.row(database, second).rung_ms is None
    await redis.aclose()


async def test_a_finished_job_has_its_answer_and_its_usage(
    client: httpx2.AsyncClient, play: Play
) -> None:
    job_id = (await post(client))["id"]
    await play.run(job_id)
    job = (await client.get(f"/v1/jobs/{job_id}")).json()
    assert (job["state"], job["attempt"], job["finish_reason"]) == ("succeeded", 1, "stop")
    assert job["message"] == {"role": "assistant", "content": "Hello."}
    assert job["usage"] == makers.SPENT.as_json()
    assert job["error"] is None
    assert job["created_at"] <= job["started_at"] <= job["finished_at"] < job["deadline_at"]
    assert (await client.get("/v1/jobs")).json()["data"] == [job]


async def test_a_failed_job_says_why_and_unknown_usage_is_null_not_zero(
    client: httpx2.AsyncClient, play: Play
) -> None:
    job_id = (await post(client))["id"]
    attempt = await play.start(job_id)
    await attempt.finish(FAILED, spent=None)
    job = (await client.get(f"/v1/jobs/{job_id}")).json()
    assert job["error"] == {"code": "why_failed", "message": "It failed."}
    assert job["usage"]["source"] == "unknown"
    assert job["usage"]["input_tokens"] is None
    assert job["usage"]["cost_usd"] is None


async def test_a_job_is_accepted_within_a_moment_when_redis_is_frozen_or_gone(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    with valkey() as server:
        settings = Settings(home=tmp_path, database_url=database_url, redis_url=server.url)
        async with serving(settings) as url, httpx2.AsyncClient(base_url=url) as client:
            await post(client)
            for take_away in (server.freeze, server.kill):
                take_away()
                for _ in range(5):
                    started = time.monotonic()
                    job = await post(client)
                    assert time.monotonic() - started < 1.0
                    assert (await client.get(f"/v1/jobs/{job['id']}")).json() == job
            started = time.monotonic()
            assert (await client.post(f"/v1/jobs/{job['id']}/cancel")).json()["state"] == CANCELLED
            assert time.monotonic() - started < 1.0
    assert len(makers.rows(database, "jobs")) == 11


# ---------------------------------------------------------------- idempotency


async def test_fifty_equal_posts_at_once_are_one_job(
    client: httpx2.AsyncClient, database: Database
) -> None:
    answers = await asyncio.gather(
        *(client.post("/v1/jobs", json=ECHO, headers={"Idempotency-Key": "k"}) for _ in range(50))
    )
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    replays = [answer.headers.get("idempotent-replay") for answer in answers]
    assert (replays.count(None), replays.count("true")) == (1, 49)
    assert len(makers.rows(database, "jobs")) == len(makers.rows(database, "job_requests")) == 1


async def test_a_key_used_for_another_body_is_refused_and_nothing_is_written(
    client: httpx2.AsyncClient, database: Database
) -> None:
    key = {"Idempotency-Key": "k"}
    await client.post("/v1/jobs", json=ECHO, headers=key)
    before = makers.everything(database)
    answer = await client.post("/v1/jobs", json=ECHO | {"lane": "batch"}, headers=key)
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "idempotency_mismatch"
    assert makers.everything(database) == before


async def test_the_order_of_a_body_s_keys_does_not_make_it_another(
    client: httpx2.AsyncClient,
) -> None:
    key = {"Idempotency-Key": "k"}
    first = await client.post(
        "/v1/jobs", json=ECHO | {"parameters": {"seed": 1, "top_p": 1.0}}, headers=key
    )
    swapped = {"parameters": {"top_p": 1.0, "seed": 1}} | ECHO
    assert (await client.post("/v1/jobs", json=swapped, headers=key)).json() == first.json()


# ---------------------------------------------------------------- list


async def test_the_list_filters_and_pages_in_both_orders(
    client: httpx2.AsyncClient, database: Database, play: Play
) -> None:
    ids = [(await post(client))["id"] for _ in range(5)]
    await play.run(ids[1])
    batch = (await post(client, lane="batch", model="echo:other"))["id"]
    makers.session(database, "session_1", caller="local")
    turn = (await post(client, session="session_1"))["id"]
    middle = (await client.get(f"/v1/jobs/{ids[4]}")).json()["created_at"]
    makers.queued(database)  # somebody else's

    async def listed(**query: Any) -> list[str]:
        answer = await client.get("/v1/jobs", params=query)
        assert answer.status_code == 200, answer.text
        return [job["id"] for job in answer.json()["data"]]

    everything = [*ids, batch, turn]
    assert await listed() == everything[::-1]
    assert await listed(order="asc") == everything
    assert await listed(state="succeeded") == [ids[1]]
    assert await listed(state="failed") == []
    assert await listed(lane="batch") == [batch]
    assert await listed(model="echo:other") == await listed(model="other") == [batch]
    assert await listed(provider="echo", order="asc") == everything
    assert await listed(provider="openai") == []
    assert await listed(session="session_1") == [turn]
    assert set(await listed(created_after=middle)) <= {batch, turn}
    assert await listed(created_after="2000-01-01T00:00:00Z") == everything[::-1]

    for order, expected in (("asc", everything), ("desc", everything[::-1])):
        seen: list[str] = []
        after: dict[str, str] = {}
        while True:
            page = (
                await client.get("/v1/jobs", params={"limit": 3, "order": order} | after)
            ).json()
            seen += [job["id"] for job in page["data"]]
            assert page["has_more"] == (page["next"] is not None)
            if not page["has_more"]:
                break
            after = {"after": page["next"]}
        assert seen == expected


# ---------------------------------------------------------------- wait


async def test_wait_answers_as_soon_as_the_job_has_finished(
    served: httpx2.AsyncClient, play: Play
) -> None:
    job_id = (await post(served))["id"]
    waiting = asyncio.create_task(served.get(f"/v1/jobs/{job_id}", params={"wait": 20}))
    await asyncio.sleep(0.3)
    attempt = await play.start(job_id)
    await attempt.say("Hel")
    await asyncio.sleep(0.3)
    assert not waiting.done()
    started = time.monotonic()
    await attempt.finish()
    assert (await waiting).json()["state"] == SUCCEEDED
    assert time.monotonic() - started < 0.5


async def test_wait_gives_up_in_time(client: httpx2.AsyncClient) -> None:
    job_id = (await post(client))["id"]
    started = time.monotonic()
    job = (await client.get(f"/v1/jobs/{job_id}", params={"wait": 0.5})).json()
    assert job["state"] == "queued"
    assert 0.5 <= time.monotonic() - started < 1.5


@pytest.mark.parametrize("how", ["frozen", "gone"])
async def test_wait_works_without_redis(
    database: Database, database_url: str, tmp_path: Path, how: str
) -> None:
    with valkey() as server:
        settings = Settings(home=tmp_path, database_url=database_url, redis_url=server.url)
        async with serving(settings) as url, httpx2.AsyncClient(base_url=url) as client:
            job_id = (await post(client))["id"]
            if how == "frozen":
                server.freeze()
            else:
                server.kill()
            waiting = asyncio.create_task(
                client.get(f"/v1/jobs/{job_id}", params={"wait": 20}, timeout=30)
            )
            await asyncio.sleep(1)
            claim = makers.calling(database, job_id)
            await database.write(lambda c: lifecycle.finish(c, claim, makers.outcome()))
            started = time.monotonic()
            assert (await waiting).json()["state"] == SUCCEEDED
            assert time.monotonic() - started < 4


# ---------------------------------------------------------------- retry


async def test_a_retry_is_a_new_job_that_asks_the_same(
    client: httpx2.AsyncClient, database: Database, play: Play
) -> None:
    asked = {"lane": BATCH, "parameters": {"seed": 3}, "metadata": {"a": "b"}, "deadline_s": 50}
    first = await post(client, **asked, stream=False)
    answer = await client.post(f"/v1/jobs/{first['id']}/retry")
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "not_finished"
    await play.run(first["id"], FAILED)
    key = {"Idempotency-Key": "again"}
    answer = await client.post(f"/v1/jobs/{first['id']}/retry", headers=key)
    assert answer.status_code == 202
    again = answer.json()
    same = ("lane", "model", "requested_model", "metadata", "stream", "session")
    assert [again[name] for name in same] == [first[name] for name in same]
    assert (again["parent_id"], again["state"]) == (first["id"], "queued")
    assert (await client.post(f"/v1/jobs/{first['id']}/retry", headers=key)).json() == again
    requests = {each["job_id"]: each for each in makers.rows(database, "job_requests")}
    assert len(requests) == 2
    assert requests[again["id"]]["messages"] == requests[first["id"]]["messages"]
    assert requests[again["id"]]["parameters"] == requests[first["id"]]["parameters"]


async def test_a_turn_that_is_retried_enters_its_session_again(
    client: httpx2.AsyncClient, database: Database, play: Play
) -> None:
    makers.session(database, "session_1", caller="local")
    job_id = (await post(client, session="session_1"))["id"]
    await play.run(job_id, FAILED)
    again = (await client.post(f"/v1/jobs/{job_id}/retry")).json()
    assert again["session"] == "session_1"
    claim = makers.claimed(database, again["id"])
    assert claim.messages == [{"role": "user", "content": "Hello?"}]


# ---------------------------------------------------------------- other people's


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("GET", "?wait=1"), ("POST", "/cancel"), ("POST", "/retry"), ("GET", "/events")],
)
async def test_somebody_else_s_job_is_not_there(
    client: httpx2.AsyncClient, database: Database, method: str, path: str
) -> None:
    theirs = makers.finished(database, caller="alice")
    waiting = makers.queued(database, caller="alice")
    before = makers.everything(database)
    for job_id in (theirs, waiting, "job_0", "job'; --", "%F0%9F%92%A9"):
        answer = await client.request(method, f"/v1/jobs/{job_id}{path}")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"
    assert makers.everything(database) == before
    assert (await client.get("/v1/jobs")).json()["data"] == []


# ---------------------------------------------------------------- the house


def test_the_api_never_loads_a_provider_sdk_nor_celery() -> None:
    program = """if True:
        import sys, api.main
        from backchannel.settings import Settings
        api.main.create_app(Settings())
        print(*{"openai", "anthropic", "celery", "kombu", "alembic"} & set(sys.modules))
    """
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == ""
