"""A database that dies, is locked, full, restarted, or out of reach."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections import Counter
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import insert

from backchannel import cancelling, closing, lifecycle, reaping
from backchannel.books import Finished, Outcome, Spent
from backchannel.db import Database
from backchannel.events import END, STARTED, encode, end_fields, pack_log
from backchannel.lifecycle import Claim
from backchannel.tables import TERMINAL, webhooks
from chaos.cases import accept_p99_s, case, now, recovery
from chaos.invariants import extra_calls
from chaos.world import World
from tests.makers import calling, lapse, queued


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


# Of the jobs' caller, without an API to ask for it: each finish writes its notice.
WEBHOOK = {
    "id": "wh_races",
    "caller": "alice",
    "name": "",
    "url": "http://127.0.0.1:1/",
    "event_types": [f"job.{state}" for state in TERMINAL],
    "secret": b"",
    "secret_hint": "",
    "created_ms": 0,
    "updated_ms": 0,
}


@case("database.finish_races", databases=("sqlite", "postgresql"))
async def finish_against_reap_against_cancel(world: World, full: bool) -> dict[str, Any]:
    """One job, three processes' writes at the same moment: one wins, once, and the books agree."""
    url = world.stack.env["BACKCHANNEL_DATABASE_URL"]
    dice = random.Random(11)
    world.database.write_now(lambda c: c.execute(insert(webhooks), WEBHOOK))
    won: Counter[str] = Counter()
    with ExitStack() as stack:
        sides = [Database(url, name=name) for name in ("finisher", "reaper", "canceller")]
        for side in sides:
            stack.callback(side.close)
        for _ in range(20 if full else 4):
            claims = [await asyncio.to_thread(_lapsed_claim, world, number) for number in range(50)]
            for claim, finished, reaped in await asyncio.to_thread(_race, sides, claims, dice):
                assert bool(finished) != bool(reaped), f"{claim.job_id}: {finished}, {reaped}"
                won["finished" if finished else "reaped"] += 1
            for job in world.database.write_now(closing.overdue):
                ended = _outcome(job.state, job.attempt)
                close = partial(closing.close_queued, job_id=job.job_id, attempt=job.attempt)
                assert world.database.write_now(partial(close, outcome=ended))
    states = world.states()
    assert sum(states.values()) == won.total()
    assert set(states) == {"succeeded", "cancelled"}, states
    return {"races": won.total(), **won, **states}


def _lapsed_claim(world: World, number: int) -> Claim:
    """A job whose call is made and whose lease is over, though its worker still lives."""
    prompt = f"race {number} {time.monotonic_ns()}"
    job_id = queued(world.database, messages=[{"role": "user", "content": prompt}])
    world.accepted[job_id] = prompt
    claim = calling(world.database, job_id)
    lapse(world.database, job_id)
    return claim


def _race(
    sides: list[Database], claims: list[Claim], dice: random.Random
) -> list[tuple[Claim, Finished | None, bool]]:
    """All three writers at all jobs, each in an order of its own."""
    told: dict[tuple[int, str], Any] = {}
    works: list[list[tuple[Claim, Any]]] = [
        [
            (c, partial(lifecycle.finish, claim=c, outcome=_outcome("succeeded", c.attempt)))
            for c in claims
        ],
        [(c, partial(reaping.reap, job_id=c.job_id, attempt=c.attempt)) for c in claims],
        [(c, partial(cancelling.request_cancel, job_id=c.job_id, caller=c.caller)) for c in claims],
    ]
    for work in works:
        dice.shuffle(work)
    for each in zip(*works, strict=True):
        for number in dice.sample(range(3), 3):
            claim, statement = each[number]
            told[number, claim.job_id] = sides[number].submit(statement)
        time.sleep(dice.uniform(0, 0.004))  # or one side's whole round would be one commit
    return [
        (claim, told[0, claim.job_id].result(60), told[1, claim.job_id].result(60))
        for claim in claims
        if told[2, claim.job_id].result(60) or True
    ]


def _outcome(state: str, attempt: int) -> Outcome:
    won = state == "succeeded"
    end = end_fields(state, "stop" if won else None)
    log = [encode(0, STARTED, {"attempt": attempt}), encode(1, END, end)]
    return Outcome(
        state=state,
        log=pack_log(log),
        finish_reason=end["finish_reason"],
        message={"role": "assistant", "content": None} if won else None,
        spent=Spent("unknown", None),
    )


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


@case("database.half_open", databases=("postgresql",), through="database")
async def packets_to_postgres_are_swallowed(world: World, full: bool) -> dict[str, Any]:
    """First nothing passes; then new connections do, and the old ones stay dead for ever.

    Every POST meanwhile is answered, and those dead sessions may hold locks on the server. In the
    full profile also the other way to heal, where what was held arrives late.
    """
    proxy = world.proxy
    assert proxy is not None
    world.worker()
    drained: list[float] = []
    for old in (True, False) if full else (False,):
        await world.accept(60, "openai:ok-t60-d40")
        await asyncio.sleep(1.0)
        proxy.swallow()
        waiting = asyncio.create_task(world.accept(10, "openai:ok-t5"))
        await asyncio.sleep(10 if full else 4)
        proxy.heal(old=old)
        await waiting
        drained.append(await asyncio.to_thread(world.settle, 120))
    assert set(world.answers) <= {202, 503}, world.answers
    slowest = max(world.accept_s)
    assert slowest < 25, f"a POST hung for {slowest:.0f} s"
    _nobody_died(world)
    return {
        "answered_within_s": round(slowest, 1),
        "refused": world.answers[503],
        "drained_s": round(drained[-1], 1),
    }


def _nobody_died(world: World) -> None:
    (row,) = world.rows("SELECT count(*) AS n FROM jobs WHERE crashes > 0")
    assert row.n == 0, f"{row.n} jobs were charged with a crash, and no worker has died"


@case("database.reply_lost", databases=("postgresql",), through="database")
async def committed_but_nobody_was_told(world: World, full: bool) -> dict[str, Any]:
    """Every few COMMITs are done, and the connection drops before the reply; clients insist."""
    assert world.proxy is not None
    world.worker()
    asked = 300 if full else 60
    world.proxy.cut_every = 4

    async def some(number: int) -> None:
        await asyncio.sleep(number * 0.2)  # one after the other, so that there are many COMMITs
        await world.accept(asked // 20, "openai:ok-t20-d20", insist=True)

    await asyncio.gather(*[some(number) for number in range(20)])
    cuts = world.proxy.cuts
    await asyncio.to_thread(world.settle, 120)
    assert len(world.accepted) == asked, f"{len(world.accepted)} of {asked} accepted: {cuts} cuts"
    (row,) = world.rows("SELECT count(*) AS n FROM jobs")
    assert row.n == asked, f"{row.n} jobs for {asked} keys"
    assert world.answers[503], f"{cuts} replies were lost, none of an accept"
    _nobody_died(world)
    return {"replies_lost": world.proxy.cuts, "repeated": world.answers[503]}


@case("database.serialization", quick=False, databases=("postgresql",))
async def transactions_that_cannot_be_serialized(world: World, full: bool) -> dict[str, Any]:
    """One statement in twenty on jobs and attempts is refused with SQLSTATE 40001."""
    for statement in (
        """CREATE SEQUENCE refused""",
        """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
           BEGIN
             IF random() < 0.05 THEN
               PERFORM nextval('refused');
               RAISE EXCEPTION 'could not serialize access' USING ERRCODE = '40001';
             END IF;
             RETURN NULL;
           END $$""",
        "CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON jobs EXECUTE FUNCTION refuse()",
        "CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON attempts EXECUTE FUNCTION refuse()",
    ):
        world.database.write_now(lambda c, s=statement: c.exec_driver_sql(s))  # type: ignore[misc]
    world.worker()
    await world.accept(500 if full else 100, "openai:ok-t20-d40", insist=True)
    await asyncio.to_thread(world.settle, 180)
    assert set(world.answers) <= {202, 503}, world.answers
    (row,) = world.rows("SELECT last_value AS n FROM refused")
    assert row.n > 20, f"only {row.n} statements were refused"
    _nobody_died(world)
    return {"refused": row.n, "answered_503": world.answers[503]}


@case("database.pool_exhausted", databases=("postgresql",))
async def somebody_locks_the_jobs(world: World, full: bool) -> dict[str, Any]:
    """An ACCESS EXCLUSIVE lock: all readers of the API wait, hundreds of requests behind them."""
    world.worker()
    (job_id,) = await world.accept(1, "openai:ok-t1")
    await world.accept(20, "openai:ok-t60-d40")
    await asyncio.sleep(1.0)
    api = world.stack.processes[1]
    memory_mb = world.memory_mb(api.pid)
    with world.database.engine.connect() as other:
        other.exec_driver_sql("SET idle_in_transaction_session_timeout = 0")
        other.exec_driver_sql("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        async with httpx2.AsyncClient(
            base_url=world.stack.url, timeout=60, limits=httpx2.Limits(max_connections=200)
        ) as client:
            began = time.monotonic()
            asking = [
                asyncio.create_task(client.get(f"/v1/jobs/{job_id}"), name=f"get-{number}")
                for number in range(150)
            ]
            posting = asyncio.create_task(world.accept(150, "openai:ok-t5", at_once=150))
            await asyncio.sleep(1.0)
            asked = time.monotonic()
            alive = (await client.get("/healthz")).status_code
            alive_s = time.monotonic() - asked
            answers = await asyncio.gather(*asking)
            await posting
            took = time.monotonic() - began
        grown_mb = world.memory_mb(api.pid) - memory_mb
        other.rollback()
    assert alive == 200
    assert alive_s < 1.0, f"/healthz took {alive_s:.1f} s"
    assert {answer.status_code for answer in answers} == {503}
    assert all("Retry-After" in answer.headers for answer in answers)
    assert world.answers[503] == 150, world.answers
    assert took < 25, f"300 requests were answered only after {took:.0f} s"
    await asyncio.to_thread(world.settle, 60)
    await world.accept(5, "openai:ok-t5")
    assert world.answers[202] == 21 + 5
    await asyncio.to_thread(world.settle, 60)
    _nobody_died(world)
    return {
        "answered_within_s": round(took, 1),
        "healthz_s": round(alive_s, 2),
        "api_grew_mb": round(grown_mb),
    }


@case("database.disk_full", small_disk=True)
async def the_disk_is_full(world: World, full: bool) -> dict[str, Any]:
    """SQLite on a disk of a few MB (tmpfs), filled up while jobs run, and freed again.

    Skipped where mounting is not permitted: see `chaos.stage`.
    """
    world.worker()
    await world.accept(30, "openai:ok-t100-d40")  # 4 s
    await asyncio.sleep(1.0)
    path = world.database.engine.url.database
    assert path is not None
    ballast = Path(path).with_name("ballast")
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    (before,) = world.rows("SELECT count(*) AS n FROM jobs")
    refused: dict[str, Any] = {}
    async with httpx2.AsyncClient(base_url=world.stack.url, timeout=60) as client:
        until = time.monotonic() + (20 if full else 5)  # the lease is 4
        while time.monotonic() < until:
            # larger than what is left in the pages SQLite already has
            asked = {"model": "openai:ok-t5", "prompt": "x" * 200_000}
            answer = await client.post("/v1/jobs", json=asked)
            assert answer.status_code == 503, answer.text
            assert "Retry-After" in answer.headers
            refused = answer.json()["error"]
            assert "disk is full" in refused["message"], refused
            await asyncio.sleep(0.5)
    (after,) = world.rows("SELECT count(*) AS n FROM jobs")
    assert after.n == before.n, f"{after.n - before.n} jobs of refused requests"
    (orphans,) = world.rows("SELECT count(*) AS n FROM job_requests")
    assert orphans.n == after.n, "half a row"
    ballast.unlink()
    took = await asyncio.to_thread(world.settle, 120)
    await world.accept(5, "openai:ok-t5")
    await asyncio.to_thread(world.settle, 60)
    (broken,) = world.rows("PRAGMA integrity_check")
    assert broken[0] == "ok", broken
    assert len(world.accepted) == 35
    _nobody_died(world)
    return {"drained_s": round(took, 1)}


@case("database.outages", quick=False, databases=("postgresql",))
async def outages_are_not_crashes(world: World, full: bool) -> dict[str, Any]:
    """Three outages longer than a lease, with a long job running: it is not taken for poison."""
    world.worker()
    world.worker()
    jobs = await world.accept(20, "openai:ok-t600-d50")  # 30 s
    server = world.postgres
    assert server is not None
    for _ in range(3):
        await asyncio.sleep(3.0)
        server.kill()
        await asyncio.sleep(7.0)  # the lease is 4
        server.start()
    await asyncio.to_thread(world.settle, 180)
    _nobody_died(world)
    states = world.states()
    assert states == {"succeeded": len(jobs)}, states
    return {"extra_calls": extra_calls(world)}
