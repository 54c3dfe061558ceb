"""Lets jobs through to their providers, or sends them back to the database until they may go."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING, Any

import structlog

from backchannel import waiting
from backchannel.errors import Unavailable
from backchannel.limits import LONGEST_HOLD_S, Hold, Limiter, Place, account_of, heard
from backchannel.pubsub import OUTAGE
from backchannel.registry import Provider, Registry
from workers.heart import survive

if TYPE_CHECKING:
    from workers.process import Process

log = structlog.get_logger()

UNKNOWN_S = (1.0, 3.0)  # while Redis cannot say whether there is room


def habits(process: Process) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
    """The gate's tasks, with their names."""
    yield "holds-follower", _hear_holds_forever(process)
    yield "places-renewer", _renew_forever(process)


class Gate:
    """What one process knows of its providers' limits; belongs to the loop's thread.

    Attributes:
        open: The ids of providers that have no limits and are not held: nothing is asked of them.
    """

    def __init__(self, process: Process) -> None:
        settings = process.settings
        self.limiter = Limiter(process.redis, settings.redis_prefix, settings.lease_s)
        self.open: set[str] = set()
        self._process = process
        self._accounts: dict[str, str] = {}
        self._limited: set[str] = set()
        self._held: dict[str, float] = {}  # until when, monotonic, by account
        self._inside: dict[str, Place] = {}  # by ticket, where places are counted

    # ------------------------------------------------------------ going through

    async def enter(self, job_id: str, provider_id: str | None, lane: str) -> Place | None:
        """Take what a job's next call needs; None: it must wait, and does so in the database."""
        if provider_id is None:  # a doorbell of an older version
            return await self._enter_unnamed(job_id)
        if provider_id not in self._accounts and not await self._look_again(provider_id):
            return Place()  # the claim has it fail with the reason
        account = self._accounts[provider_id]
        held_s = self._held_s(account)
        if held_s > 0:
            spread_s = random.uniform(0, 1 + held_s / 4)
            if await self._defer(job_id, provider_id, held_s + spread_s, unless_fallbacks=True):
                return None
            return Place(held_s=held_s)  # it falls back, or is not to be run at all
        provider = self._process.registry.get(provider_id)
        if not provider.limits:
            return Place()
        # or what was let in one by one would be called at once, after a process's first import
        await self._process.clients.prepare(provider)
        try:
            place = await self.limiter.enter(account, provider.limits, lane)
        except OUTAGE as error:
            log.warning("Redis cannot say whether a job may run; it waits.", error=str(error))
            place = random.uniform(*UNKNOWN_S)
        if not isinstance(place, Place):
            await self._defer(job_id, provider_id, place)
            return None
        if provider.limits.concurrency is not None:
            self._inside[place.ticket] = place
        return place

    async def leave(self, place: Place) -> None:
        """The attempt is over, or there was none."""
        if not place.ticket:
            return
        self._inside.pop(place.ticket, None)
        try:
            await self.limiter.leave(place)
        except OUTAGE as error:
            log.debug("A place could not be given back; it lapses.", error=str(error))

    async def _enter_unnamed(self, job_id: str) -> Place | None:
        try:
            found = await self._process.db.read(lambda c: waiting.way_of(c, job_id))
        except Unavailable:
            return Place()  # nor can it be claimed
        if found is None or found.provider in self.open:
            return Place()
        return await self.enter(job_id, found.provider, found.lane)

    async def _look_again(self, provider_id: str) -> bool:
        """Whether a provider that was not known is known by now."""
        try:
            await self._process.roster.refresh()
        except Unavailable:
            return False
        return provider_id in self._accounts

    async def _defer(
        self, job_id: str, provider_id: str, delay_s: float, *, unless_fallbacks: bool = False
    ) -> bool:
        try:
            return await self._process.db.write(
                lambda c: waiting.defer(
                    c, job_id, provider_id, delay_s, unless_fallbacks=unless_fallbacks
                )
            )
        except Unavailable as error:
            log.warning("A job could not be put off; it is rung again.", error=error.message)
            return True

    # ------------------------------------------------------------ what providers ask for

    def held_s(self, provider: Provider) -> float:
        """Seconds for which a provider is to be left alone."""
        account = self._accounts.get(provider.id)
        return self._held_s(account) if account is not None else 0.0

    async def hold(self, provider: Provider, wait_s: float) -> None:
        """A provider has asked to be left alone: no process calls it before that is over."""
        account = self._accounts.get(provider.id)
        wait_s = min(wait_s, LONGEST_HOLD_S)
        if account is None or not self._hold(account, wait_s):
            return
        log.info(
            "A provider asks to be left alone; its jobs wait.",
            provider=provider.id,
            seconds=round(wait_s, 1),
        )
        try:
            await self.limiter.hold(Hold(account, int(wait_s * 1000) + 1))
        except OUTAGE as error:
            log.warning("The other workers could not be told of it.", error=str(error))

    def take(self, registry: Registry) -> None:
        """Go by these providers from now on."""
        self._accounts = {
            each.id: account_of(each, registry.stored) for each in registry.providers.values()
        }
        now = time.monotonic()
        self._held = {account: until for account, until in self._held.items() if until > now}
        self._limited = {each.id for each in registry.providers.values() if each.limits}
        self._open_up()

    async def catch_up(self) -> None:
        """Hear of the holds that were told before anybody listened here."""
        for hold in await self.limiter.holds(self._accounts.values()):
            self._hold(hold.account, hold.ms / 1000)

    def hear(self, message: bytes) -> None:
        """Another process's provider has asked to be left alone, or our own."""
        hold = heard(message)
        self._hold(hold.account, hold.ms / 1000)

    async def renew(self) -> None:
        """Keep the places of what runs here."""
        if self._inside:
            await self.limiter.renew(self._inside.values())

    def _hold(self, account: str, wait_s: float) -> bool:
        until = time.monotonic() + wait_s
        # not for every answer of the many that come at the same time
        if until < self._held.get(account, 0.0) + 0.1:
            return False
        self._held[account] = until
        self._open_up()
        return True

    def _held_s(self, account: str) -> float:
        until = self._held.get(account)
        if until is None:
            return 0.0
        left_s = until - time.monotonic()
        if left_s <= 0:
            del self._held[account]
            self._open_up()
        return left_s

    def _open_up(self) -> None:
        self.open = {
            provider_id
            for provider_id, account in self._accounts.items()
            if provider_id not in self._limited and account not in self._held
        }


async def _hear_holds_forever(process: Process) -> None:
    gate = process.gate
    async with process.listener.subscribed(gate.limiter.channel) as messages:
        missed = True
        while True:
            try:
                if missed:
                    await gate.catch_up()
                message = await messages.get()
                missed = message is None
                if message is not None:
                    gate.hear(message)
            except OUTAGE:
                await asyncio.sleep(1.0)  # the listener says None when it is back
                missed = True
            except Exception:
                log.exception("What providers ask for could not be heard.")
                await asyncio.sleep(1.0)


async def _renew_forever(process: Process) -> None:
    while True:
        await asyncio.sleep(process.settings.heartbeat_s)
        await survive("The places of running calls could not be renewed.", process.gate.renew)
