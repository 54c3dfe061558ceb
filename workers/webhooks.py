"""Sends webhooks: a habit of every worker process, safe in any number of copies.

Each webhook with something due has a task of its own, so that one whose receiver hangs holds up
no other.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from backchannel import faults, webhooks
from backchannel.background import end
from backchannel.tables import DEAD
from backchannel.webhook_post import open_session, post
from backchannel.webhooks import GONE, Delivery
from workers.heart import survive

if TYPE_CHECKING:
    from aiohttp import ClientSession

    from workers.process import Process

log = structlog.get_logger()

LOOK_S = 1.0
AT_ONCE = 8  # tries at one webhook that one process makes together
MOST_WEBHOOKS = 64  # served together by one process
FORGET_S = 600.0


def habits(process: Process) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
    """The tasks of webhooks, with their names."""
    yield "webhooks", _deliver_forever(process)
    yield "webhooks-forgetting", _forget_forever(process)


async def _forget_forever(process: Process) -> None:
    async def round_() -> None:
        while await process.db.write(webhooks.forget_old):
            pass

    while True:
        await asyncio.sleep(FORGET_S * random.uniform(0.75, 1.0))
        await survive("Old deliveries of webhooks could not be removed.", round_)


async def _deliver_forever(process: Process) -> None:
    async with AsyncExitStack() as stack:
        session: ClientSession | None = None
        serving: dict[str, asyncio.Task[Any]] = {}

        async def round_() -> None:
            nonlocal session
            found = await process.db.read(webhooks.waiting)
            new = [webhook_id for webhook_id in found if webhook_id not in serving]
            if not new or process.draining:
                return
            if session is None:  # most installations have no webhooks
                session = await stack.enter_async_context(await open_session(process.settings))
            random.shuffle(new)
            for webhook_id in new[: MOST_WEBHOOKS - len(serving)]:
                task = asyncio.create_task(
                    _serve(process, session, webhook_id), name=f"webhook-{webhook_id}"
                )
                serving[webhook_id] = task
                task.add_done_callback(partial(_served, serving, webhook_id))

        try:
            while True:
                await asyncio.sleep(LOOK_S * random.uniform(0.75, 1.0))
                await survive("Webhooks could not be looked for; they wait.", round_)
        finally:
            for task in list(serving.values()):
                await end(task)


def _served(serving: dict[str, Any], webhook_id: str, _task: asyncio.Task[Any]) -> None:
    del serving[webhook_id]


async def _serve(process: Process, session: ClientSession, webhook_id: str) -> None:
    async def all_that_is_due() -> None:
        take = partial(webhooks.take, webhook_id=webhook_id, room=AT_ONCE)
        while not process.draining and (taken := await process.db.write(take)):
            await asyncio.gather(*(_deliver(process, session, each) for each in taken))

    await survive("A webhook's deliveries wait for their next try.", all_that_is_due)


async def _deliver(process: Process, session: ClientSession, delivery: Delivery) -> None:
    answer = await post(session, delivery, process.settings)
    if faults.ARMED:
        faults.hit("webhook.sent")
    there = await process.persist(partial(webhooks.settle, delivery=delivery, answer=answer))
    about = {"webhook": delivery.webhook_id, "event": delivery.event_id, "error": answer.error}
    if answer.status == GONE:
        log.warning("A webhook is gone by its own word (410); it is switched off.", **about)
    elif there == DEAD:
        log.warning(
            "A webhook was given up after a day; it is kept as dead to be replayed.", **about
        )
