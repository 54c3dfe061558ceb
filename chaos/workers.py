"""Workers that die, freeze, are drained, or meet a job that kills them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from contextlib import suppress
from typing import Any

from backchannel.faults import POINTS
from chaos.cases import case, now, recovery, recovery_of_kills
from chaos.invariants import extra_calls
from chaos.world import TERMINAL, World

BOTH = ("sqlite", "postgresql")


@case("workers.kill9", databases=BOTH)
async def kill_a_worker_every_two_seconds(world: World, full: bool) -> dict[str, Any]:
    """Several caretakers at once; every 2 s the oldest of them is shot, if another one is ready."""
    for _ in range(4):
        world.worker(10)

    def shoot() -> None:
        ready = [worker for worker in world.workers if world.stack.is_ready(worker)]
        if len(ready) > 1:
            world.kill(ready[0])
            world.worker(10, wait=False)

    began = now()
    with world.every(2.0, shoot):
        await world.accept(2000 if full else 250, "openai:ok-t10-d20", lane="batch")
        await asyncio.to_thread(world.settle, 600 if full else 120)
    took = now() - began
    poisoned = world.rows("SELECT id FROM jobs WHERE state = 'failed'")
    assert not poisoned, f"{len(poisoned)} innocent jobs were failed as poison"
    return {
        "kill_every_s": round(took / max(world.kills, 1), 1),
        "kills": world.kills,
        "extra_calls_per_kill": round(extra_calls(world) / max(world.kills, 1), 1),
        **recovery_of_kills(world),
    }


@case("workers.zombie", databases=BOTH)
async def freeze_a_worker_beyond_its_lease(world: World, full: bool) -> dict[str, Any]:
    """SIGSTOP, another worker takes over, SIGCONT: the first one must write nothing."""
    zombie = world.worker()
    await world.accept(200 if full else 30, "openai:ok-t60-d50")
    await asyncio.sleep(1.5)
    world.stack.freeze(zombie)
    frozen = now()
    world.worker()
    await asyncio.sleep(6.0)  # the lease is 4
    os.kill(zombie.pid, signal.SIGCONT)
    await asyncio.to_thread(world.settle, 120)
    return recovery(world, frozen)


@case("workers.fault_points", databases=BOTH)
async def kill_at_each_fault_point(world: World, full: bool) -> dict[str, Any]:
    """A worker kills itself at every named place, one after the other."""
    died: list[str] = []
    for point in POINTS:
        doomed = world.worker(fault=f"{point}@1")
        await world.accept(3, "openai:ok-t10-d10")
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(doomed.wait, 30)
        if doomed.poll() is None:
            world.kill(doomed)
        else:
            died.append(point)
            world.kills += 1
            world.workers.remove(doomed)
    world.worker()
    await asyncio.to_thread(world.settle, 120)
    assert died == list(POINTS), f"not reached: {set(POINTS) - set(died)}"
    return {"points": len(died), "extra_calls": extra_calls(world)}


@case("workers.poison")
async def a_job_that_kills_workers(world: World, full: bool) -> dict[str, Any]:
    """It fails after three crashes, and its neighbours all succeed."""
    poison = "openai:ok-t7"
    fault = f"call.marked@{poison}"
    world.worker(fault=fault)
    neighbours = await world.accept(20, "openai:ok-t40-d50")
    (bad,) = await world.accept(1, poison)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if world.workers[0].poll() is not None:
            world.kills += 1
            world.workers.clear()
            world.worker(fault=fault)
        states = {row.id: row.state for row in world.rows("SELECT id, state FROM jobs")}
        if states[bad] == "failed" and {states[n] for n in neighbours} == {"succeeded"}:
            break
        await asyncio.sleep(0.25)
    (job,) = world.rows(f"SELECT * FROM jobs WHERE id = '{bad}'")
    assert (job.state, job.error_code, job.crashes) == ("failed", "poison", 3), job
    bad_neighbours = [n for n in neighbours if states[n] != "succeeded"]
    assert not bad_neighbours, f"{len(bad_neighbours)} neighbours were hurt"
    return {"kills": world.kills}


@case("workers.wrong_clock", quick=False, databases=("postgresql",))
async def hosts_that_disagree_about_the_time(world: World, full: bool) -> dict[str, Any]:
    """One worker's host is an hour ahead, another's an hour behind: the database's clock counts.

    What Python calls the time is shifted, `time.time` and `time.time_ns`; what counts seconds,
    `time.monotonic`, stays right, as it does on such a host.
    """
    for name, seconds in (("ahead", 3600), ("behind", -3600)):
        folder = world.stack.home / name
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(_SHIFTED.format(seconds=seconds))
        world.worker(env={"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"})
        (log,) = world.stack.home.glob(f"worker-{len(world.stack.processes) - 1}.log")
        assert _SAYS.format(seconds=seconds) in log.read_text(), "its clock is right"
    began = now()
    long = await world.accept(40 if full else 10, "openai:ok-t120-d50")  # 6 s, the lease is 4
    late = await world.accept(5, "openai:ok-t500-d50", deadline_s=5)
    await world.accept(200 if full else 50, "openai:ok-t10-d20")
    await asyncio.to_thread(world.settle, 120)
    jobs = {row.id: row for row in world.rows("SELECT * FROM jobs")}
    assert {jobs[job_id].state for job_id in long} == {"succeeded"}
    assert {jobs[job_id].state for job_id in late} == {"expired"}
    lateness = max(jobs[job_id].finished_ms / 1000 for job_id in late) - began - 5
    assert -1 < lateness < 6, f"deadlines held by {lateness:.1f} s"
    assert {job.attempt for job in jobs.values()} == {1}, "a live job was taken away"
    owners = {row.owner for row in world.rows("SELECT DISTINCT owner FROM attempts")}
    assert len(owners) == 2, "one worker did it all"
    return {"deadline_late_s": round(lateness, 1)}


_SAYS = "This clock is {seconds} s off."
_SHIFTED = f"""import sys, time

true, true_ns = time.time, time.time_ns
time.time = lambda: true() + {{seconds}}
time.time_ns = lambda: true_ns() + {{seconds}} * 1_000_000_000
print("{_SAYS}", file=sys.stderr)
"""


@case("workers.memory")
async def a_job_that_takes_all_memory(world: World, full: bool) -> dict[str, Any]:
    """Under a limit of memory it fails at once or as poison, and its neighbours all succeed."""
    greedy = "openai:ok-t7"
    fault = f"call.marked+eat@{greedy}"
    world.worker(fault=fault)
    await world.accept(5, "openai:ok-t5")  # what a worker needs anyway is there before the limit
    await asyncio.to_thread(world.settle, 60)
    limit = world.memory_mb(world.workers[0].pid, "VmSize") + 256
    world.limit_memory(world.workers[0], limit)
    neighbours = await world.accept(20, "openai:ok-t60-d50")
    await asyncio.sleep(1.0)
    (bad,) = await world.accept(1, greedy)
    deadline = time.monotonic() + 60
    while any(state not in TERMINAL for state in world.states()):
        assert time.monotonic() < deadline, world.states()
        if world.workers[0].poll() is not None:
            world.kills += 1
            world.workers.clear()
            world.limit_memory(world.worker(fault=fault), limit)
        await asyncio.sleep(0.25)
    (job,) = world.rows(f"SELECT * FROM jobs WHERE id = '{bad}'")
    assert (job.state, job.error_code) in (("failed", "internal_error"), ("failed", "poison")), job
    hurt = world.rows(f"SELECT * FROM jobs WHERE id != '{bad}' AND state != 'succeeded'")
    assert not hurt, f"{len(hurt)} of {len(neighbours)} neighbours were hurt"
    return {"ended_as": job.error_code, "kills": world.kills, "limit_mb": round(limit)}


@case("workers.drain")
async def drain_with_running_jobs(world: World, full: bool) -> dict[str, Any]:
    """What fits in the grace time finishes, the rest is handed back, the exit is in time."""
    leaving = world.worker()
    await world.accept(10, "openai:ok-t20-d50")  # 1 s
    await world.accept(10, "openai:ok-t200-d50")  # 10 s, the grace time is 5
    await asyncio.sleep(2.0)
    started = time.monotonic()
    os.kill(leaving.pid, signal.SIGTERM)
    await asyncio.to_thread(leaving.wait, 60)
    exit_s = time.monotonic() - started
    world.workers.remove(leaving)
    left = world.states()
    assert "running" not in left, left
    assert exit_s < 5 + 2, f"{exit_s:.1f} s"
    world.worker()
    await asyncio.to_thread(world.settle, 60)
    (crashed,) = world.rows("SELECT count(*) AS n FROM jobs WHERE crashes > 0")
    assert crashed.n == 0
    return {"exit_s": round(exit_s, 1), "handed_back": left.get("queued", 0)}
