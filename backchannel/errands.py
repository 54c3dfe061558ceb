"""Both ends of an errand: the API asks any worker for what only a worker may do, and waits.

Nothing of it is stored, and it takes no slot: who asks is there to ask again.

    {prefix}errands       channel; a message is one errand as JSON
    {prefix}errand:{id}   which worker does it; the others let it be
    {prefix}errand:{id}   channel; the answer as JSON
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from redis.asyncio import Redis

from backchannel.errors import Unavailable
from backchannel.pubsub import OUTAGE, Listener

HELD_S = 60

Errand = dict[str, Any]


async def ask(
    redis: Redis, listener: Listener, prefix: str, errand: Errand, patience_s: float
) -> dict[str, Any]:
    """The answer of whichever worker takes the errand first.

    Raises:
        Unavailable: No worker listens, none answers in time, or Redis is away.
    """
    place = f"{prefix}errand:{uuid.uuid4().hex}"
    async with listener.subscribed(place) as answers:
        message = msgspec.json.encode({**errand, "place": place})
        try:
            heard = await redis.publish(f"{prefix}errands", message)
        except OUTAGE as error:
            raise Unavailable(
                f"Redis does not answer, so no worker can be asked: {error}"
            ) from None
        if not heard:
            raise no_worker()
        try:
            async with asyncio.timeout(patience_s):
                while (answer := await answers.get()) is None:
                    pass  # the connection was new: the answer may still come
        except TimeoutError:
            raise Unavailable(f"No worker answered within {patience_s:g} s. Try again.") from None
    found: dict[str, Any] = msgspec.json.decode(answer)
    return found


def no_worker() -> Unavailable:
    """Nobody is there to talk to a provider."""
    return Unavailable(
        "No worker runs, and only workers talk to providers. Type: backchannel worker",
        code="no_worker",
    )


async def serve(
    redis: Redis, listener: Listener, prefix: str, do: Callable[[Errand], Awaitable[dict[str, Any]]]
) -> None:
    """Do errands, one after another, for as long as this runs."""
    async with listener.subscribed(f"{prefix}errands") as errands:
        while True:
            message = await errands.get()
            if message is not None:
                await _serve(redis, msgspec.json.decode(message), do)


async def _serve(
    redis: Redis, errand: Errand, do: Callable[[Errand], Awaitable[dict[str, Any]]]
) -> None:
    place = errand.pop("place")
    try:
        if await redis.set(place, b"taken", nx=True, ex=HELD_S):
            await redis.publish(place, msgspec.json.encode(await do(errand)))
    except OUTAGE:
        return  # who asked hears that nobody answered
