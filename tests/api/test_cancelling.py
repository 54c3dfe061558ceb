"""Cancels over HTTP: what waits ends at once, what runs is asked to stop, what ended stays."""

from __future__ import annotations

import asyncio

import httpx2

from backchannel import lifecycle
from backchannel.db import Database
from backchannel.pubsub import connect
from backchannel.settings import Settings
from backchannel.tables import CANCELLED, INTERACTIVE, RUNNING
from tests import makers
from tests.api.play import Play, post


async def test_a_queued_job_is_cancelled_at_once_and_its_stream_agrees(
    client: httpx2.AsyncClient, database: Database
) -> None:
    makers.webhook(database, caller="local")
    job_id = (await post(client))["id"]
    answer = await client.post(f"/v1/jobs/{job_id}/cancel")
    assert answer.status_code == 200
    job = answer.json()
    assert job["state"] == CANCELLED
    assert job["cancel_requested_at"] <= job["finished_at"]
    assert (job["usage"], job["error"], job["finish_reason"]) == (None, None, None)
    assert (await client.get(f"/v1/jobs/{job_id}/events")).text == (
        'id: 0\nevent: end\ndata: {"seq":0,"type":"end","state":"cancelled",'
        '"finish_reason":null,"usage":null,"error":null}\n\n'
    )
    assert [each["type"] for each in makers.rows(database, "deliveries")] == ["job.cancelled"]
    assert (await client.post(f"/v1/jobs/{job_id}/cancel")).json() == job
    assert database.write_now(lambda c: lifecycle.claim(c, job_id, "w", 20)) is None


async def test_a_job_that_waits_for_its_retry_keeps_what_it_streamed(
    client: httpx2.AsyncClient, play: Play, database: Database
) -> None:
    job_id = (await post(client))["id"]
    attempt = await play.start(job_id)
    await attempt.say("Hel")
    database.write_now(
        lambda c: lifecycle.retry_later(
            c, attempt.claim, delay_s=60, burns_attempt=True, error_code="stalled",
            error_message="…", spent=None,
        )
    )  # fmt: skip
    assert (await client.post(f"/v1/jobs/{job_id}/cancel")).json()["state"] == CANCELLED
    stream = (await client.get(f"/v1/jobs/{job_id}/events")).text
    assert [line for line in stream.split("\n") if line.startswith("event")] == [
        "event: started", "event: delta", "event: end",
    ]  # fmt: skip


async def test_a_running_job_is_asked_to_stop(
    client: httpx2.AsyncClient, play: Play, settings: Settings
) -> None:
    redis = connect(settings.redis)
    async with redis.pubsub() as hints:
        await hints.subscribe(f"{settings.redis_prefix}cancel")
        job_id = (await post(client))["id"]
        attempt = await play.start(job_id)
        job = (await client.post(f"/v1/jobs/{job_id}/cancel")).json()
        assert job["state"] == RUNNING
        assert job["cancel_requested_at"]
        hint = None
        while hint is None or hint["type"] != "message":
            hint = await hints.get_message(timeout=5)
        assert hint["data"] == job_id.encode()
    await attempt.finish(CANCELLED)
    job = (await client.post(f"/v1/jobs/{job_id}/cancel")).json()
    assert job["state"] == CANCELLED
    await redis.aclose()


async def test_a_finished_job_stays_as_it_is(client: httpx2.AsyncClient, play: Play) -> None:
    job_id = (await post(client))["id"]
    await play.run(job_id)
    job = (await client.get(f"/v1/jobs/{job_id}")).json()
    answer = await client.post(f"/v1/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()) == (200, job)


async def test_cancelling_a_turn_rings_for_the_next_one(
    client: httpx2.AsyncClient, database: Database, settings: Settings
) -> None:
    makers.session(database, "session_1", caller="local")
    first = (await post(client, session="session_1"))["id"]
    second = (await post(client, session="session_1"))["id"]
    await client.post(f"/v1/jobs/{first}/cancel")
    redis = connect(settings.redis)
    for _ in range(100):
        bells = await redis.lrange(f"{settings.redis_prefix}{INTERACTIVE}", 0, -1)
        if len(bells) == 2:
            break
        await asyncio.sleep(0.02)
    assert [[job in bell.decode() for job in (second, first)] for bell in bells] == [
        [True, False],
        [False, True],
    ]
    await redis.aclose()
