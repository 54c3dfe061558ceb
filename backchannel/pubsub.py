"""One process's connections to Redis: a client that fails fast, and one shared pub/sub listener."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

log = structlog.get_logger()

# A connection that answers no ping for this long is half open: keep-alive would take minutes.
SILENCE_S = 15.0

OUTAGE = (RedisError, OSError, asyncio.TimeoutError)


def connect(url: str, *, timeout_s: float = 2.0) -> Redis:
    """A client that fails fast and never repeats a write by itself.

    redis-py would retry ten times, writes too: with a reply lost on the wire one XADD made two
    entries.
    """
    client: Redis = Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
    )
    return client


class Listener:
    """One process's one pub/sub connection, shared by everything that listens there."""

    def __init__(self, redis: Redis, keepalive: str) -> None:
        self._pubsub = redis.pubsub()
        self._keepalive = keepalive  # a channel always subscribed, so that there is a connection
        self._queues: dict[str, set[asyncio.Queue[bytes | None]]] = defaultdict(set)
        self._confirmed: dict[str, asyncio.Event] = {}
        self._task = asyncio.create_task(self._listen_forever(), name="pubsub-listener")

    async def close(self) -> None:
        """Stop listening and let go of the connection."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        with contextlib.suppress(*OUTAGE):
            await self._pubsub.aclose()  # type: ignore[no-untyped-call]

    @contextlib.asynccontextmanager
    async def subscribed(self, channel: str) -> AsyncIterator[asyncio.Queue[bytes | None]]:
        """Messages of a channel from now on; None means some may have been missed.

        Waits up to 1 s for Redis to confirm, so that what is read afterwards has no gap before it.
        """
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1000)
        readers = self._queues[channel]
        readers.add(queue)
        try:
            if len(readers) == 1:
                self._confirmed[channel] = asyncio.Event()
                with contextlib.suppress(*OUTAGE):
                    await self._pubsub.subscribe(channel)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._confirmed[channel].wait(), timeout=1.0)
            yield queue
        finally:
            readers.discard(queue)
            if not readers:
                self._queues.pop(channel, None)
                self._confirmed.pop(channel, None)
                with contextlib.suppress(*OUTAGE):
                    await self._pubsub.unsubscribe(channel)

    async def _listen_forever(self) -> None:
        while True:
            try:
                await self._pubsub.subscribe(self._keepalive, *self._queues)
                self._all_missed()
                heard = time.monotonic()
                while time.monotonic() - heard < SILENCE_S:
                    message = await self._pubsub.get_message(timeout=SILENCE_S / 3)
                    if message is not None:
                        heard = time.monotonic()
                        self._deliver(message)
                    else:
                        await self._pubsub.ping()
                raise TimeoutError(f"no answer to a ping for {SILENCE_S} s")
            except OUTAGE as error:
                log.debug("The pub/sub connection broke; connecting again.", error=str(error))
                with contextlib.suppress(*OUTAGE):
                    await self._pubsub.reset()
                await asyncio.sleep(0.5)

    def _deliver(self, message: dict[str, Any]) -> None:
        channel = message["channel"]
        name = channel.decode() if isinstance(channel, bytes) else channel
        if message["type"] == "subscribe" and name in self._confirmed:
            self._confirmed[name].set()
        elif message["type"] == "message":
            for queue in self._queues.get(name, ()):
                _offer(queue, message["data"])

    def _all_missed(self) -> None:
        for readers in self._queues.values():
            for queue in readers:
                _offer(queue, None)


def _offer(queue: asyncio.Queue[bytes | None], item: bytes | None) -> None:
    # a reader too slow for its queue loses the queue, not the worker: it reads the log again
    if queue.full():
        while not queue.empty():
            queue.get_nowait()
        item = None
    queue.put_nowait(item)
