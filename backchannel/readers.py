"""The readers' end of a job's wire: its events, past and live, whatever happens in between."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from redis.asyncio import Redis

from backchannel import events
from backchannel.bus import keys_of, read_log
from backchannel.events import Event
from backchannel.pubsub import OUTAGE, Listener, RollCall

TOGETHER = 50  # events that a reader gets at once, at most: what waits for a slow one stays small

# The stored log of a job, or None while it runs.
Stored = Callable[[str], Awaitable[list[Event] | None]]


async def follow(
    redis: Redis, prefix: str, listener: Listener, stored: Stored, job_id: str, after: int = -1
) -> AsyncIterator[list[Event]]:
    """A job's events numbered above `after`, first the past, then live, up to its end.

    Those that are there together come together: a reader that falls behind catches up.

    Subscribed before the first read, so no event is lost between the two; numbers sort out what
    came by both ways. Whatever happens to Redis, the stored log ends the stream.
    """
    last = after
    async with listener.subscribed(keys_of(prefix, job_id).stream) as queue:
        roll_call = RollCall(queue)
        heard, finished = await _catch_up(redis, prefix, stored, job_id, last)
        while True:
            fresh = _above(last, heard)
            for start in range(0, len(fresh), TOGETHER):
                yield fresh[start : start + TOGETHER]
            if fresh:
                last = fresh[-1].seq
            if finished or (fresh and fresh[-1].type == events.END):
                return  # also when the reader had the end already
            heard = [
                events.decode(line)
                for message in await roll_call.heard()
                for line in message.split(b"\n")
            ]
            if not heard or _has_gap(last, heard):
                heard, finished = await _catch_up(redis, prefix, stored, job_id, last)


def _above(last: int, heard: list[Event]) -> list[Event]:
    """What is new of what was heard, some of it twice: in order, up to the end."""
    fresh: list[Event] = []
    for event in heard:
        if event.seq > last:
            last = event.seq
            fresh.append(event)
            if event.type == events.END:
                break
    return fresh


def _has_gap(last: int, heard: list[Event]) -> bool:
    for event in heard:
        if event.seq > last + 1:
            return True
        last = max(last, event.seq)
    return False


async def _catch_up(
    redis: Redis, prefix: str, stored: Stored, job_id: str, last: int
) -> tuple[list[Event], bool]:
    """The events above `last` that are to be had now, and whether they are all there will be."""
    whole = await stored(job_id)
    if whole is not None:
        return whole, True
    try:
        return await read_log(redis, prefix, job_id, last), False
    except OUTAGE:
        return [], False
