"""The whole of Backchannel as child processes of one, on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import httpx2

from backchannel.cli import valkey
from backchannel.cli.client import key_of
from backchannel.cli.running import Running, choose_port, only_one, write_running
from backchannel.cli.screen import Failure
from backchannel.cli.supervise import Child, Log, Supervisor, itself
from backchannel.settings import Settings, get_settings

HOST = "127.0.0.1"
HOSTED = frozenset({"anthropic", "openai", "groq", "gemini"})
START_S = 90.0  # a cold disk imports slowly
GIVE_UP_AFTER = 3  # deaths of one child before the stack was ever ready


class Plan(NamedTuple):
    """What to start; a port of 0 is a free one, no Flower port is no Flower."""

    port: int
    processes: int | None
    jobs_in_flight: int | None
    flower_port: int | None
    log: str | None


def run_stack(plan: Plan) -> None:
    """Run the stack until a signal; returns when every child is gone.

    Raises:
        Failure: A port is taken, the home folder is in use, or a child will not start.
    """
    settings = get_settings()
    with only_one(settings), _log(plan.log) as stream:
        from backchannel.db import migrate
        from backchannel.logs import configure

        configure(settings, "backchannel", stream)
        if settings.redis_url:
            valkey.check_redis(settings)
        migrate(settings.database)
        asyncio.run(_run(settings, plan, Log(stream)))


@contextlib.contextmanager
def _log(path: str | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stderr
        return
    file = Path(path).absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        yield stream


async def _run(settings: Settings, plan: Plan, log: Log) -> None:
    port = choose_port(HOST, plan.port, "--port")
    flower_port = plan.flower_port
    if flower_port is not None:
        flower_port = choose_port(HOST, flower_port, "--flower-port")
    supervisor = Supervisor(log)
    supervisor.listen_to_signals()
    running = Running(
        pid=os.getpid(),
        api_url=f"http://{HOST}:{port}",
        flower_url=None if flower_port is None else f"http://{HOST}:{flower_port}",
    )
    workers = plan.processes or settings.processes
    try:
        await _start_redis(settings, supervisor)
        for child in _children(settings, plan, port, flower_port, workers):
            supervisor.start(child)
        await _until(supervisor, lambda: _is_ready(running, workers))
        if not supervisor.stopping.is_set():
            write_running(settings, running)
            await _welcome(settings, supervisor, running, workers)
        await supervisor.run_until_stopped()
    finally:
        await supervisor.stop()
    supervisor.say("Everything is stopped; jobs that were not finished wait in the database.")


async def _start_redis(settings: Settings, supervisor: Supervisor) -> None:
    child = valkey.child(settings, rank=3)
    if child is not None:
        supervisor.start(child)
        path = valkey.socket_of(settings)
        assert path is not None

        async def is_ready() -> bool:
            return await asyncio.to_thread(valkey.answers, path)

        await _until(supervisor, is_ready)


def _children(
    settings: Settings, plan: Plan, port: int, flower_port: int | None, workers: int
) -> Iterator[Child]:
    yield Child("api", itself("api", "--host", HOST, "--port", str(port)), rank=1)
    slots = plan.jobs_in_flight or settings.jobs_in_flight
    yield from worker_children(settings, workers, slots, rank=2)
    if flower_port is not None:
        yield Child("flower", itself("flower", "--host", HOST, "--port", str(flower_port)), rank=0)


def worker_children(
    settings: Settings, processes: int, slots: int, rank: int = 0
) -> Iterator[Child]:
    """One child per worker process."""
    for number in range(1, processes + 1):
        yield Child(
            "worker" if processes == 1 else f"worker-{number}",
            itself("worker", "--processes", "1", "--jobs-in-flight", str(slots)),
            rank=rank,
            # it hands back by itself what does not fit in the grace time
            grace_s=settings.grace_s + 15.0,
        )


async def _until(supervisor: Supervisor, is_ready: Callable[[], Awaitable[bool]]) -> None:
    """Wait for readiness; returns early when asked to stop.

    Raises:
        Failure: It takes too long, or a child dies again and again.
    """
    give_up = time.monotonic() + START_S
    while not supervisor.stopping.is_set():
        if await is_ready():
            return
        failing = [name for name, deaths in supervisor.deaths.items() if deaths >= GIVE_UP_AFTER]
        if failing:
            raise Failure(f"{failing[0]} does not start: its own lines above say why.")
        if time.monotonic() > give_up:
            raise Failure(f"Not ready after {START_S:g} s; type: backchannel doctor")
        await asyncio.sleep(0.05)


async def _is_ready(running: Running, workers: int) -> bool:
    async with httpx2.AsyncClient(timeout=5.0, trust_env=False) as client:
        try:
            state = (await client.get(f"{running.api_url}/readyz")).json()
            if state["database"] != "ok" or state["workers"] < workers:
                return False
            if running.flower_url:
                answer = await client.get(f"{running.flower_url}/healthcheck")
                return answer.status_code == 200
        except (httpx2.HTTPError, ValueError, KeyError):
            return False
        return True


async def _welcome(
    settings: Settings, supervisor: Supervisor, running: Running, workers: int
) -> None:
    async with httpx2.AsyncClient(timeout=5.0, trust_env=False) as client:
        try:
            url = f"{running.api_url}/v1/providers"
            answer = (await client.get(url, headers=key_of(settings))).json()
            available: list[str] | None = [
                each["id"] for each in answer["data"] if each["available"]
            ]
        except (httpx2.HTTPError, ValueError, KeyError):
            available = None
    supervisor.say(f"API      {running.api_url}  (its pages: {running.api_url}/docs)")
    if running.flower_url:
        supervisor.say(f"Flower   {running.flower_url}")
    supervisor.say(f"Workers  {workers} running")
    if available is None:
        supervisor.say("Callers need a key. For commands type: export BACKCHANNEL_API_KEY=bk_…")
        available = list(HOSTED)
    else:
        supervisor.say(f"Providers available: {', '.join(available) or 'none'}")
    if not HOSTED.intersection(available):
        supervisor.say("For a hosted one stop, and type: OPENAI_API_KEY=… backchannel up")
    supervisor.say("Ready. Try: backchannel run examples/prompts.jsonl   Ctrl-C stops in order.")
