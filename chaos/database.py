"""A database that dies, is locked, or is restarted in the middle of a batch."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from typing import Any

from chaos.cases import accept_p99_s, case, now, recovery
from chaos.world import World


@case("database.postgres_kill9", databases=("postgresql",))
async def kill_postgres_in_the_middle(world: World, full: bool) -> dict[str, Any]:
    """Kill -9 and restart; accepts in between answer 503, never hang, never half a row."""
    world.worker()
    world.worker()
    await world.accept(500 if full else 100, "openai:ok-t40-d50", lane="batch")
    await asyncio.sleep(1.0)
    server = world.postgres
    assert server is not None
    for _ in range(5 if full else 1):
        server.kill()
        down = time.monotonic()
        await world.accept(5, "openai:ok-t5")
        refused_s = time.monotonic() - down
        await asyncio.sleep(2.0)
        server.start()
        await asyncio.sleep(3.0)
    back = now()
    assert refused_s < 20, f"an accept hung for {refused_s:.0f} s"
    await asyncio.to_thread(world.settle, 180)
    return {"refused_within_s": round(refused_s, 1), **recovery(world, back)}


@case("database.sqlite_locked")
async def sqlite_is_locked(world: World, full: bool) -> dict[str, Any]:
    """Another process holds the write lock for longer than a heartbeat."""
    world.worker()
    await world.accept(30, "openai:ok-t40-d50")
    path = world.database.engine.url.database
    assert path is not None
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        waiting = asyncio.create_task(world.accept(5, "openai:ok-t5"))
        await asyncio.sleep(10 if full else 3)
        other.execute("COMMIT")
    other.close()
    await waiting
    await asyncio.to_thread(world.settle, 120)
    (broken,) = world.rows("PRAGMA integrity_check")
    assert broken[0] == "ok"
    return {"accept_p99_s": accept_p99_s(world)}
