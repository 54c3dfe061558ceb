"""One process's connections to Redis: a client that fails fast, and one shared pub/sub listener."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.connection import HiredisRespSerializer
from redis.exceptions import RedisError

from backchannel.background import end

log = structlog.get_logger()

# A connection that answers no ping for this long is half open: keep-alive would take minutes.
SILENCE_S = 15.0

# A reader that hears nothing looks at the row: this soon, and then ever more rarely. An end that
# was never published is missed right after something was said; a silent crowd must cost little.
ROLL_CALL_S = 2.0
MOST_ROLL_CALL_S = 15.0

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
    pool = client.connection_pool
    pool.connection_class = _packing_in_c(pool.connection_class)
    return client


LARGE = 6000  # bytes of an argument that redis-py sends as it is, and hiredis would copy


def _packing_in_c(connection: Any) -> Any:
    """A class of connections: redis-py's asynchronous ones pack six times slower than hiredis.

    Its synchronous ones do as this does. What is large stays with redis-py: 30 answers of a
    megabyte each, sent at once, took 60 MB more when copied.
    """
    packer = HiredisRespSerializer()

    class Connection(connection):  # type: ignore[misc]
        def pack_command(self, *args: Any) -> Any:
            if any(type(arg) is bytes and len(arg) > LARGE for arg in args):
                return super().pack_command(*args)
            return packer.pack(*args)

    return Connection


class RollCall:
    """Waits for the messages of a subscribed channel, and looks up when there are none."""

    def __init__(self, queue: asyncio.Queue[bytes | None]) -> None:
        self._queue = queue
        self._patience_s = ROLL_CALL_S

    async def heard(self) -> list[bytes]:
        """All messages there are by now; an empty list: some may be missing, look at the row."""
        try:
            async with asyncio.timeout(self._patience_s):
                message = await self._queue.get()
        except TimeoutError:
            self._patience_s = min(2 * self._patience_s, MOST_ROLL_CALL_S)
            return []
        self._patience_s = ROLL_CALL_S
        messages = [message]
        while not self._queue.empty():
            messages.append(self._queue.get_nowait())
        return [] if None in messages else [each for each in messages if each is not None]


class _Channel:
    """Who reads a channel, and whether Redis has confirmed it."""

    def __init__(self) -> None:
        self.queues: set[asyncio.Queue[bytes | None]] = set()
        self.asked = False
        self.confirmed = asyncio.Event()


class Listener:
    """One process's one pub/sub connection, shared by everything that listens there."""

    def __init__(self, redis: Redis, keepalive: str) -> None:
        self._redis = redis
        self._pubsub = redis.pubsub()
        self._keepalive = keepalive  # a channel always subscribed, so that there is a connection
        self._channels: dict[str, _Channel] = {}
        # one at a time, or a reader's farewell could overtake the next reader's subscription
        self._asking = asyncio.Lock()
        self._connected = False
        self._task = asyncio.create_task(self._listen_forever(), name="pubsub-listener")

    async def close(self) -> None:
        """Stop listening and let go of the connection."""
        await end(self._task)
        with contextlib.suppress(*OUTAGE):
            await self._pubsub.aclose()  # type: ignore[no-untyped-call]

    @contextlib.asynccontextmanager
    async def subscribed(self, name: str) -> AsyncIterator[asyncio.Queue[bytes | None]]:
        """Messages of a channel from now on; None means some may have been missed.

        Waits up to 1 s for Redis to confirm, so that what is read afterwards has no gap before it;
        not at all while Redis is away: its return is told as something missed.
        """
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1000)
        channel = self._channels.setdefault(name, _Channel())
        channel.queues.add(queue)
        try:
            async with self._asking:
                # only the listener connects: here each reader would wait for the ones before it
                if self._connected and not channel.asked:
                    channel.asked = True
                    with contextlib.suppress(*OUTAGE):
                        await self._pubsub.subscribe(name)
            if self._connected:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(channel.confirmed.wait(), timeout=1.0)
            yield queue
        finally:
            channel.queues.discard(queue)
            async with self._asking:
                if not channel.queues and self._channels.get(name) is channel:
                    del self._channels[name]
                    if self._connected:
                        with contextlib.suppress(*OUTAGE):
                            await self._pubsub.unsubscribe(name)

    async def _listen_forever(self) -> None:
        while True:
            try:
                await self._pubsub.connect()  # type: ignore[no-untyped-call]
                self._connected = True  # from here on readers ask for themselves
                for channel in self._channels.values():
                    channel.asked = True
                await self._pubsub.subscribe(self._keepalive, *self._channels)
                heard = time.monotonic()
                while time.monotonic() - heard < SILENCE_S:
                    message = await self._pubsub.get_message(timeout=SILENCE_S / 3)
                    if message is not None:
                        heard = time.monotonic()
                        self._deliver(message)
                    else:
                        await self._pubsub.ping()
                raise TimeoutError(f"no answer to a ping for {SILENCE_S} s")
            except Exception as error:
                sentence = "The pub/sub connection broke; connecting again."
                if isinstance(error, OUTAGE):
                    log.debug(sentence, error=str(error))
                else:  # a defect: a process without its listener would follow no stream again
                    log.exception(sentence)
                self._connected = False
                for channel in self._channels.values():
                    channel.asked = False
                    channel.confirmed.clear()
                with contextlib.suppress(*OUTAGE):
                    await self._pubsub.aclose()  # type: ignore[no-untyped-call]
                self._pubsub = self._redis.pubsub()
                await asyncio.sleep(0.5)

    def _deliver(self, message: dict[str, Any]) -> None:
        name = message["channel"]
        name = name.decode() if isinstance(name, bytes) else name
        if message["type"] == "subscribe" and name == self._keepalive:
            self._all_missed()  # one command subscribes all, so none has a gap after this
        channel = self._channels.get(name)
        if channel is None:
            return
        if message["type"] == "subscribe":
            channel.confirmed.set()
        elif message["type"] == "message":
            for queue in channel.queues:
                _offer(queue, message["data"])

    def _all_missed(self) -> None:
        for channel in self._channels.values():
            for queue in channel.queues:
                _offer(queue, None)


def _offer(queue: asyncio.Queue[bytes | None], item: bytes | None) -> None:
    # a reader too slow for its queue loses the queue, not the worker: it reads the log again
    if queue.full():
        while not queue.empty():
            queue.get_nowait()
        item = None
    queue.put_nowait(item)
