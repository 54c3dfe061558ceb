"""What one worker process owns: the loop and its thread, database, Redis, clients, running jobs.

Opened after fork at first use, closed at exit. Everything here but `submit` and `close` belongs to
the loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import stamina
import uvloop

from backchannel import custom_providers, lifecycle, stored_keys
from backchannel.background import end
from backchannel.books import Doorbell
from backchannel.bus import Publisher
from backchannel.db import Database
from backchannel.errors import Unavailable
from backchannel.pubsub import OUTAGE, Listener, connect
from backchannel.queue import ring
from backchannel.registry import Registry
from backchannel.roster import Roster
from backchannel.settings import Settings, get_settings
from backchannel.writer import Work
from workers import caretaker, errands, gate, heart, planner, webhooks
from workers.clients import ClientCache
from workers.watchdog import Watchdog

if TYPE_CHECKING:
    from workers.engine import Run
    from workers.stops import Stop

T = TypeVar("T")


class Process:
    """One worker process's long-lived things."""

    def __init__(self, settings: Settings, slots: int) -> None:
        self.settings = settings
        self.slots = slots
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{os.urandom(4).hex()}"
        self.draining = False
        self.runs: dict[tuple[str, int], Run] = {}
        # held by the one job on its last chance that may run here: if it kills this process too,
        # it takes no other such job with it
        self.last_chance = asyncio.Lock()
        self.hoping = 0  # who runs under it or waits for it
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._live, name="engine-loop", daemon=True)

    def open(self) -> Process:
        """Start the loop and open everything; returns when the process can run jobs."""
        self._thread.start()
        self._ready.result()
        return self

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop, from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def drain(self) -> None:
        """Take no more jobs."""
        self.draining = True

    def hand_back_all(self) -> None:
        """Stop every running job and put it back at the head of the line, now."""
        self.loop.call_soon_threadsafe(self._stop_all, "handed_back")

    def close(self) -> None:
        """Close everything and end the loop's thread; what still runs is left to the reaper."""
        self.loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(timeout=15)

    def _live(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        async with contextlib.AsyncExitStack() as stack:
            try:
                await self._open(stack)
            except BaseException as error:
                self._ready.set_exception(error)
                raise
            self._ready.set_result(None)
            await self._closing.wait()

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        settings = self.settings
        self.db = Database(settings.database, name="worker")
        stack.callback(self.db.close)
        self.redis = connect(settings.redis)
        stack.push_async_callback(self.redis.aclose)
        self.clients = ClientCache(settings)
        stack.push_async_callback(self.clients.aclose)
        self.roster = Roster(settings, self.db, self._change_providers)
        self.gate = gate.Gate(self)
        await self.roster.refresh()
        self.gate.take(self.roster.registry)
        self.publisher = Publisher(self.redis, settings.redis_prefix)
        stack.push_async_callback(self.publisher.close)
        self.listener = Listener(self.redis, f"{settings.redis_prefix}cancel")
        stack.push_async_callback(self.listener.close)
        self.watchdog = Watchdog(self.loop)
        stack.callback(self.watchdog.close)
        await self.db.write(
            lambda c: lifecycle.sign_on(
                c, self.owner, socket.gethostname(), os.getpid(), self.slots
            )
        )
        stack.push_async_callback(self._sign_off)
        self.pulse = heart.Pulse(settings)
        for name, habit in (
            *heart.habits(self),
            *gate.habits(self),
            *errands.habits(self),
            ("providers-follower", self.roster.follow(self.listener, settings.redis_prefix)),
            *caretaker.habits(self),
            *planner.habits(self),
            *webhooks.habits(self),
        ):
            self._keep(stack, name, habit)

    def _keep(
        self, stack: contextlib.AsyncExitStack, name: str, habit: Coroutine[Any, Any, None]
    ) -> None:
        stack.push_async_callback(end, asyncio.create_task(habit, name=name))

    async def _sign_off(self) -> None:
        with contextlib.suppress(Unavailable):
            await self.db.write(lambda c: lifecycle.sign_off(c, self.owner))

    # ------------------------------------------------------------ for the engine

    async def persist(self, work: Work[T]) -> T:
        """Write, and if the database is away try again for as long as our leases may live."""
        with contextlib.suppress(Unavailable):
            return await self.db.write(work)
        async for attempt in stamina.retry_context(
            on=Unavailable, attempts=None, timeout=self.settings.fence_s, wait_max=2.0
        ):
            with attempt:
                return await self.db.write(work)
        raise AssertionError("unreachable")

    @property
    def registry(self) -> Registry:
        """The providers as this process knows them now."""
        return self.roster.registry

    async def _change_providers(self, old: Registry, new: Registry) -> None:
        """Open the stored keys, and let go of clients whose provider is another one now."""
        if old.stored != new.stored:
            self.clients.keys.take(await self.db.read(stored_keys.sealed))
        for provider_id in custom_providers.changed(old, new):
            await self.clients.reset(provider_id)
        self.gate.take(new)

    async def ring(self, bell: Doorbell | None) -> None:
        """Ring for a job that may run now; the dispatcher does it if Redis will not."""
        if bell is not None:
            with contextlib.suppress(*OUTAGE):
                await ring(self.redis, self.settings.redis_prefix, [bell])

    def _stop_all(self, reason: Stop) -> None:
        for run in list(self.runs.values()):
            run.stop(reason)


_process: tuple[int, Process] | None = None
_opening = threading.Lock()  # under Celery's threads pool many tasks ask at once


def get_process(slots: int | None = None) -> Process:
    """This process's own, opened at first use and again after a fork."""
    global _process
    pid = os.getpid()
    with _opening:
        if _process is None or _process[0] != pid:
            settings = get_settings()
            _process = (pid, Process(settings, slots or settings.jobs_in_flight).open())
        return _process[1]
