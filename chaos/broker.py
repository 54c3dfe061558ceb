"""A broker that dies, freezes, forgets, fills up, and doorbells that lie."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import redis

from backchannel.books import Doorbell
from backchannel.queue import render
from chaos.cases import accept_for, accept_p99_s, case, now, prompt, recovery
from chaos.world import World


@case("broker.kill9")
async def kill_valkey_every_six_seconds(world: World, full: bool) -> dict[str, Any]:
    """Without persistence: every doorbell and every live stream in it is gone each time."""
    world.worker()
    world.worker()

    def shoot() -> None:
        world.valkey.kill()
        world.valkey.start()
        world.kills += 1

    with world.every(6.0, shoot):
        for _ in range(10 if full else 3):
            await world.accept(200 if full else 60, "openai:ok-t20-d40")
            await asyncio.sleep(5.0)
        await asyncio.to_thread(world.settle, 300 if full else 90)
    return {"kills": world.kills, "accept_p99_s": accept_p99_s(world)}


@case("broker.down")
async def valkey_is_down(world: World, full: bool) -> dict[str, Any]:
    """Jobs are accepted within a second all the while, and run afterwards."""
    world.worker()
    world.valkey.kill()
    await accept_for(world, 60 if full else 8)
    world.valkey.start()
    back = now()
    took = await asyncio.to_thread(world.settle, 120)
    return {"accept_p99_s": prompt(world), "drained_s": round(took, 1), **recovery(world, back)}


@case("broker.frozen")
async def valkey_is_frozen(world: World, full: bool) -> dict[str, Any]:
    """Connections stay open and nothing answers."""
    world.worker()
    await world.accept(20, "openai:ok-t100-d40")
    world.valkey.freeze()
    await accept_for(world, 30 if full else 8)
    world.valkey.thaw()
    took = await asyncio.to_thread(world.settle, 120)
    return {"accept_p99_s": prompt(world), "drained_s": round(took, 1)}


@case("broker.half_open", through="broker")
async def packets_to_valkey_are_swallowed(world: World, full: bool) -> dict[str, Any]:
    """First nothing passes; then new connections do, and the old ones stay dead for ever.

    In the full profile also the other way to heal, where what was held arrives late.
    """
    assert world.proxy is not None
    world.worker()
    waits: dict[str, float] = {}
    for old in (True, False) if full else (False,):
        await world.accept(20, "openai:ok-t60-d40")
        await asyncio.sleep(1.0)
        world.proxy.swallow()
        await accept_for(world, 30 if full else 4)
        world.proxy.heal(old=old)
        waits["old_heal_s" if old else "consuming_again_s"] = await _until_consuming(world)
        await asyncio.to_thread(world.settle, 60)
    return {"accept_p99_s": prompt(world), **waits}


async def _until_consuming(world: World) -> float:
    """Seconds until a worker has taken a job that is accepted now."""
    healed = time.monotonic()
    (job_id,) = await world.accept(1, "openai:ok-t1")
    while (waited := time.monotonic() - healed) < 60:
        (job,) = world.rows(f"SELECT state FROM jobs WHERE id = '{job_id}'")
        if job.state != "queued":
            break
        await asyncio.sleep(0.1)
    assert waited < 20 + 3, f"nothing was consumed for {waited:.0f} s"  # 3 for this machine
    return round(waited, 1)


@case("broker.flushall")
async def flushall_in_the_middle(world: World, full: bool) -> dict[str, Any]:
    """Doorbells and streams vanish while jobs run."""
    world.worker()
    with world.every(1.5, lambda: world.valkey.say("FLUSHALL")):
        await world.accept(500 if full else 100, "openai:ok-t60-d40")
        took = await asyncio.to_thread(world.settle, 240)
    return {"seconds": round(took, 1)}


@case("broker.doorbells")
async def doorbells_that_lie(world: World, full: bool) -> dict[str, Any]:
    """Every doorbell five times; doorbells for unknown and finished jobs; bytes that are none."""
    world.worker()
    world.worker()
    first = await world.accept(20, "openai:ok-t5")
    await asyncio.to_thread(world.settle, 60)
    jobs = await world.accept(100, "openai:ok-t20-d20")
    prefix = "backchannel:"
    with redis.Redis.from_url(world.valkey.url) as client:
        for job_id in [*jobs, *first, "job_unknown", "'; DROP TABLE jobs"]:
            bell = Doorbell(job_id, "interactive", "openai:ok", 1)
            for _ in range(5):
                client.lpush(f"{prefix}interactive", render(bell))
    await asyncio.to_thread(world.settle, 90)
    (row,) = world.rows("SELECT max(attempt) AS most FROM jobs")
    assert row.most == 1, "a doubled doorbell ran a job twice"
    return {"rung": 5 * 122}


@case("broker.full")
async def valkey_out_of_memory(world: World, full: bool) -> dict[str, Any]:
    """noeviction: it refuses every write, and takes them again later."""
    world.worker()
    await world.accept(30, "openai:ok-t60-d40")
    world.valkey.say("CONFIG SET maxmemory 1")
    await world.accept(30, "openai:ok-t5")
    await asyncio.sleep(4.0)
    world.valkey.say("CONFIG SET maxmemory 0")
    took = await asyncio.to_thread(world.settle, 120)
    return {"accept_p99_s": prompt(world), "drained_s": round(took, 1)}
