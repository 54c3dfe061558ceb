"""Readers that come and go, many readers, and requests that race."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx2

from chaos.cases import case
from chaos.world import World
from tests.trip.stack import Event, events


@case("streams.resume")
async def random_disconnects(world: World, full: bool) -> dict[str, Any]:
    """Two API processes, random disconnects and resumes, also after the end and FLUSHALL."""
    urls = (world.stack.url, world.stack.api())
    world.worker()
    dice = random.Random(7)
    jobs = await world.accept(50 if full else 10, "openai:ok-t60-d40")
    cuts = 0

    async def read(job_id: str) -> list[Event]:
        nonlocal cuts
        got: list[Event] = []
        while not got or got[-1].event != "end":
            stop = dice.randint(1, 12)
            stream = events(dice.choice(urls), job_id, got[-1].id if got else None)
            async for event in stream:
                got.append(event)
                stop -= 1
                if stop == 0:
                    cuts += 1
                    break
            await stream.aclose()  # type: ignore[attr-defined]
        return got

    live = await asyncio.gather(*[read(job_id) for job_id in jobs])
    world.valkey.say("FLUSHALL")
    again = await asyncio.gather(*[read(job_id) for job_id in jobs])
    assert live == again, "a replay differs from what was seen live"
    for stream in live:
        assert [event.id for event in stream] == [str(seq) for seq in range(len(stream))]
    world.settle(10)
    return {"disconnects": cuts}


@case("streams.many_readers")
async def two_hundred_readers_on_one_job(world: World, full: bool) -> dict[str, Any]:
    """All of them see the same bytes."""
    world.worker()
    (job_id,) = await world.accept(1, "openai:ok-t100-d40")

    async def read() -> list[Event]:
        return [event async for event in events(world.stack.url, job_id)]

    seen = await asyncio.gather(*[read() for _ in range(200 if full else 50)])
    assert all(each == seen[0] for each in seen)
    world.settle(10)
    return {"readers": len(seen), "events": len(seen[0])}


@case("api.races", databases=("sqlite", "postgresql"))
async def equal_posts_and_late_cancels(world: World, full: bool) -> dict[str, Any]:
    """50 equal idempotent POSTs make one job; a cancel that races a finish ends in one state."""
    world.worker(100)
    await world.accept(1, "openai:ok-t1")  # the SDK is imported before the races
    await asyncio.to_thread(world.settle, 60)
    async with httpx2.AsyncClient(base_url=world.stack.url, timeout=60) as client:
        body = {"model": "openai:ok-t5", "prompt": "once"}
        same = await asyncio.gather(
            *[
                client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"})
                for _ in range(50)
            ],
        )
        assert {answer.status_code for answer in same} == {202}
        ids = {answer.json()["id"] for answer in same}
        assert len(ids) == 1, f"{len(ids)} jobs"
        world.accepted[ids.pop()] = "once"

        async def race(job_id: str) -> None:
            await asyncio.sleep(random.uniform(0, 0.6))
            await client.post(f"/v1/jobs/{job_id}/cancel")

        jobs = await world.accept(500 if full else 100, "openai:ok-t5-d40")
        await asyncio.gather(*[race(job_id) for job_id in jobs])
    await asyncio.to_thread(world.settle, 60)
    states = world.states()
    assert set(states) <= {"succeeded", "cancelled"}, states
    return states
