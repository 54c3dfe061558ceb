"""Who is asking, and whether they may: a caller's key, or nobody has one yet."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

import structlog
from sqlalchemy import Connection

from backchannel import keys
from backchannel.db import Database
from backchannel.errors import Forbidden, Unauthorized
from backchannel.keys import ADMIN, BATCHES, JOBS_READ, JOBS_WRITE, LOCAL, USAGE_READ, Caller, Known

log = structlog.get_logger()
T = TypeVar("T")

REMEMBER_S = 5.0  # a key that was revoked is good for at most this long
OPEN_S = 2.0  # once the first key is made, nobody comes in without one after this long
MOST_REMEMBERED = 4_096  # of about 1 kB each
USE_MS = 60_000  # uses of a key are put on record this far apart

# What a key must be good for to read and to change, by the noun in the path. A noun that is not
# here wants an admin; a test wants it here.
SCOPES: dict[str, tuple[str, str]] = {
    "jobs": (JOBS_READ, JOBS_WRITE),
    "sessions": (JOBS_READ, JOBS_WRITE),
    "chat": (JOBS_READ, JOBS_WRITE),
    "responses": (JOBS_READ, JOBS_WRITE),
    "messages": (JOBS_READ, JOBS_WRITE),
    "models": (JOBS_READ, ADMIN),
    "files": (BATCHES, BATCHES),
    "batches": (BATCHES, BATCHES),
    "usage": (USAGE_READ, ADMIN),
    "providers": (JOBS_READ, ADMIN),
    "webhooks": (JOBS_READ, JOBS_WRITE),
    "webhook_endpoints": (JOBS_READ, JOBS_WRITE),
}

# Other names lead here only where somebody else answers for them: a page that was loaded from one
# (DNS rebinding) would speak with the operator's rights.
_LOCAL_NAMES = re.compile(
    rb"(?:localhost|[a-z0-9-]+\.localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d{1,5})?",
    re.IGNORECASE,
)

Headers = Iterable[tuple[bytes, bytes]]  # as ASGI has them: names in small letters


def scope_of(path: str, methods: Iterable[str]) -> str:
    """What a key must be good for to call a route."""
    noun = path.removeprefix("/v1/").partition("/")[0]
    reads, changes = SCOPES.get(noun, (ADMIN, ADMIN))
    return reads if set(methods) <= {"GET", "HEAD"} else changes


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Gate:
    """Lets callers in. Keys are read from the database at most once in `REMEMBER_S`, by their hash.

    It is open to everybody, as the caller ``local``, while nobody ever made a key, and then only
    on loopback or by the operator's word. Revoking the last key does not open it again.

    Args:
        host: The address this process listens on.
        open_bind: The operator's word that only what they trust reaches it.
    """

    def __init__(self, db: Database, host: str, *, open_bind: bool) -> None:
        self._db = db
        self._local_names_only = is_loopback(host) and not open_bind
        self._may_be_open = is_loopback(host) or open_bind
        self._open_until = 0.0
        self._known: dict[str, tuple[Known, float]] = {}
        self._asking: dict[str, asyncio.Task[Any]] = {}

    async def admit(self, headers: Headers, scope: str) -> Caller:
        """Who sent these headers.

        Raises:
            Unauthorized: Nobody we know.
            Forbidden: The key is not good for `scope`, or a web page was led here.
        """
        host = key = b""
        for name, value in headers:
            if name == b"host":
                host = value
            elif name == b"authorization" and value[:7].lower() == b"bearer ":
                key = value[7:].strip()
            elif name == b"x-api-key" and not key:
                key = value
        if self._may_be_open and await self._is_open():
            if self._local_names_only and not _LOCAL_NAMES.fullmatch(host):
                raise _misled(host)
            return _EVERYBODY
        known = await self._find(key)
        if scope not in known.scopes:
            raise Forbidden(
                f"This key is not good for '{scope}', only for {', '.join(sorted(known.scopes))}. "
                "Ask the operator for another."
            )
        return known.caller

    async def _is_open(self) -> bool:
        if time.monotonic() >= self._open_until:
            await self._once("", self._look_for_keys)
        return self._may_be_open

    async def _look_for_keys(self) -> None:
        self._may_be_open = not await self._db.read(keys.any_made)
        self._open_until = time.monotonic() + OPEN_S
        if not self._may_be_open:
            log.info("There are callers' keys: from now on every request needs one.")

    async def _find(self, key: bytes) -> Known:
        if not key:
            raise Unauthorized(
                "This needs a caller's key, as 'Authorization: Bearer bk_…' or 'x-api-key: bk_…'. "
                "The operator makes one with: backchannel callers add NAME"
            )
        its_hash = keys.hash_of(key)
        known, until = self._known.get(its_hash, (None, 0.0))
        if time.monotonic() >= until:
            known = await self._once(its_hash, lambda: self._ask(its_hash))
        if known is None:
            raise Unauthorized(
                "This caller's key is not known here, or it was revoked or has expired. The "
                "operator makes another with: backchannel callers add NAME"
            )
        return known

    async def _once(self, what: str, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What the database says; many who ask at once share one answer."""
        asking = self._asking.get(what)
        if asking is None:
            asking = asyncio.create_task(ask(), name="find-callers-key")
            self._asking[what] = asking
            asking.add_done_callback(lambda _: self._asking.pop(what))
        found: T = await asyncio.shield(asking)
        return found

    async def _ask(self, its_hash: str) -> Known | None:
        self._known.pop(its_hash, None)
        known = await self._db.read(lambda c: keys.find(c, its_hash))
        if known is None:
            return None
        good_s = REMEMBER_S if known.left_ms is None else min(REMEMBER_S, known.left_ms / 1000)
        if len(self._known) >= MOST_REMEMBERED:
            del self._known[next(iter(self._known))]  # the one that was read the longest ago
        self._known[its_hash] = known, time.monotonic() + good_s
        if known.unused_ms is None or known.unused_ms > USE_MS:

            def touch(connection: Connection) -> None:
                keys.touch(connection, known.id)

            self._db.submit(touch)  # nobody waits for it
        return known


_EVERYBODY = Caller(LOCAL)


def _misled(host: bytes) -> Forbidden:
    return Forbidden(
        f"This API is open to this machine only, and '{host.decode(errors='replace')}' is no name "
        "of it. Call http://127.0.0.1 or http://localhost; for other names make a caller's key: "
        "backchannel callers add NAME",
        code="host_not_allowed",
    )
