"""What every route stands on: what the process owns, who is asking, and strict JSON bodies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from fastapi.routing import APIRoute
from redis.asyncio import Redis

from api.auth import Gate, scope_of
from backchannel import keys
from backchannel.background import end
from backchannel.db import Database, migrate
from backchannel.errors import InvalidRequest, TooLarge, Unavailable
from backchannel.pubsub import Listener, connect
from backchannel.queue import Ringer
from backchannel.registry import Registry
from backchannel.roster import Roster
from backchannel.settings import Settings
from backchannel.strict_json import decode


@dataclass(frozen=True)
class Resources:
    """What one API process owns."""

    settings: Settings
    roster: Roster
    db: Database
    redis: Redis
    listener: Listener
    ringer: Ringer
    gate: Gate
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def registry(self) -> Registry:
        """The providers as this process knows them now; `roster.resolve` looks again."""
        return self.roster.registry

    @property
    def prefix(self) -> str:
        """Put before every Redis key."""
        return self.settings.redis_prefix

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that no request waits for, and that is only made sooner by it."""
        task = asyncio.create_task(_quietly(work), name="later")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Leave undone what was to be done later."""
        for task in list(self._tasks):
            await end(task)


async def _quietly(work: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(Unavailable):
        await work


async def open_resources(settings: Settings, stack: AsyncExitStack, host: str) -> Resources:
    """Open what a process that listens on `host` owns; the stack closes it, the last first."""
    await asyncio.to_thread(migrate, settings.database)
    db = Database(settings.database, name="api")
    stack.callback(db.close)
    redis = connect(settings.redis)
    stack.push_async_callback(redis.aclose)
    listener = Listener(redis, f"{settings.redis_prefix}api")
    stack.push_async_callback(listener.close)
    ringer = Ringer(redis, settings.redis_prefix)
    stack.push_async_callback(ringer.close)
    roster = Roster(settings, db)
    await roster.refresh()
    following = roster.follow(listener, settings.redis_prefix)
    stack.push_async_callback(end, asyncio.create_task(following, name="providers-follower"))
    gate = Gate(db, host, open_bind=settings.allow_open_bind)
    its = Resources(settings, roster, db, redis, listener, ringer, gate)
    stack.push_async_callback(its.close)
    return its


async def _resources(request: Request) -> Resources:
    shared: Resources = request.app.state.resources
    return shared


async def _caller(request: Request) -> keys.Caller:
    caller: keys.Caller = request.scope[_CALLER]  # the route has let them in
    return caller


Shared = Annotated[Resources, Depends(_resources)]
# Whose jobs these are. Every query is scoped by it: somebody else's id is a 404.
Caller = Annotated[keys.Caller, Depends(_caller)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?$",
        description="The same key and body again: the first answer again.",
    ),
]


_CALLER = "backchannel.caller"


class StrictRequest(Request):
    """A request whose body is capped and whose JSON is strict."""

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            TooLarge: It is over the cap.
        """
        if not hasattr(self, "_body"):
            cap = self.app.state.resources.settings.max_body_bytes
            chunks: list[bytes] = []
            size = int(self.headers.get("content-length", 0))
            if size <= cap:
                size = 0
                async for chunk in self.stream():
                    size += len(chunk)
                    if size > cap:
                        break
                    chunks.append(chunk)
            if size > cap:
                raise TooLarge(f"The body is over {cap:,} bytes, the cap of one request.")
            self._body = b"".join(chunks)
        return self._body

    async def json(self) -> Any:
        """The body, decoded.

        Raises:
            InvalidRequest: It is not strictly JSON.
        """
        return decode(await self.body())


Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class StrictRoute(APIRoute):
    """A route that knows who calls, whose JSON body is capped, and refused where it is not strict.

    Who may not call is refused before a byte of the body is read.

    It wants the header Content-Type: application/json, which no web page can send here without a
    permission that nobody gives (CORS): a page in the operator's browser must not order jobs.
    """

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()
        scope = scope_of(self.path, self.methods or ())

        async def strictly(request: Request) -> Response:
            gate = request.app.state.resources.gate
            request.scope[_CALLER] = await gate.admit(request.scope["headers"], scope)
            if "\0" in request.scope["path"] or b"%00" in request.scope["query_string"]:
                raise InvalidRequest("The address contains a NUL character.")
            return await handle(StrictRequest(request.scope, request.receive))

        return strictly
