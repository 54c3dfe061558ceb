"""The registry of one process, kept as new as the table of providers.

Every change counts a version up in its own transaction. A worker is told the version with each
claim, and an API process looks before it refuses a name; a message on Redis and a look every 2 s
make it sooner.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import structlog
from redis.asyncio import Redis

from backchannel import custom_providers
from backchannel.db import Database
from backchannel.errors import InvalidRequest, Unavailable
from backchannel.pubsub import OUTAGE, Listener
from backchannel.registry import Registry, Resolved, build_registry
from backchannel.settings import Settings

log = structlog.get_logger()
T = TypeVar("T")

LOOK_S = 2.0

# Told of a registry before it takes the place of another one.
Preparing = Callable[[Registry, Registry], Awaitable[None]]


async def _nothing(_old: Registry, _new: Registry) -> None:
    pass


class Roster:
    """The current registry; replaced whole. What runs with the old one goes on with it."""

    def __init__(self, settings: Settings, db: Database, prepare: Preparing = _nothing) -> None:
        self.registry: Registry = build_registry(settings)
        self._settings = settings
        self._db = db
        self._prepare = prepare
        self._taking_over = asyncio.Lock()

    async def refresh(self) -> bool:
        """Look at the table, and take over what has changed; tells whether anything had.

        Raises:
            Unavailable: The database does not answer; the registry stays as it is.
        """
        if await self._db.read(custom_providers.version) == self.registry.version:
            return False
        async with self._taking_over:
            found = await self._db.read(custom_providers.load)
            if found.version == self.registry.version:
                return False  # somebody else's look has brought it
            new = custom_providers.registry_of(found, self._settings)
            await self._prepare(self.registry, new)
            self.registry = new
        for provider_id, why in new.set_aside.items():
            log.warning("A provider is set aside; the others live.", provider=provider_id, why=why)
        log.info("The providers are up to date.", version=new.version)
        return True

    async def answer(self, names: Iterable[str | None], ask: Callable[[Registry], T]) -> T:
        """Ask the registry about some names, by the newest table where that matters.

        A name that says a known provider is not looked up again. Before a name is refused, or goes
        to the default provider, the table is: another process may just have added its provider.

        Raises:
            InvalidRequest: As `ask` does.
        """
        with contextlib.suppress(InvalidRequest):
            if all(map(self.registry.knows, names)):
                return ask(self.registry)
        with contextlib.suppress(Unavailable):  # what is known is good enough to answer with
            await self.refresh()
        return ask(self.registry)

    async def resolve(self, name: str | None) -> Resolved:
        """A name as a provider and its model.

        Raises:
            InvalidRequest: As `Registry.resolve`.
        """
        return await self.answer([name], lambda registry: registry.resolve(name))

    async def follow(self, listener: Listener, prefix: str) -> None:
        """Take over every change, as long as this runs."""
        async with listener.subscribed(_channel(prefix)) as hints:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await hints.get()
                try:
                    await self.refresh()
                except Unavailable as error:
                    log.debug("The providers could not be looked at.", error=error.message)
                except Exception:
                    log.exception("The providers could not be brought up to date.")


async def hint(redis: Redis, prefix: str) -> None:
    """Tell every process that the table has changed; the ones that miss it look by themselves."""
    with contextlib.suppress(*OUTAGE):
        await redis.publish(_channel(prefix), b"")


def _channel(prefix: str) -> str:
    return f"{prefix}providers"
