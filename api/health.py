"""Health: whether this process lives, and whether what it needs answers."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from sqlalchemy import Connection, func, select, union_all

from api.deps import Resources, Shared
from backchannel import __version__
from backchannel.db import now_ms
from backchannel.errors import Forbidden, Unauthorized, Unavailable
from backchannel.keys import ADMIN
from backchannel.pubsub import OUTAGE
from backchannel.tables import LANES, QUEUED, jobs, workers

router = APIRouter(tags=["health"])

PATIENCE_S = 2.0  # shorter than what any prober waits


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """This process lives."""
    return {"status": "ok", "version": __version__}


@router.get("/readyz")
async def readyz(request: Request, its: Shared) -> JSONResponse:
    """Jobs can be accepted: the database answers. Without Redis they are, and wait."""
    (database, numbers), redis = await asyncio.gather(_ask_database(its, request), _ask_redis(its))
    ready = database == "ok"
    answer = {
        "status": "ok" if ready else "unavailable",
        "database": database,
        "redis": redis,
        **numbers,
    }
    return JSONResponse(answer, 200 if ready else 503)


async def _ask_redis(its: Resources) -> str:
    try:
        async with asyncio.timeout(PATIENCE_S):
            await its.redis.ping()
    except OUTAGE as error:
        return f"unavailable: {str(error) or 'no answer'}; jobs are accepted and wait"
    return "ok"


async def _ask_database(its: Resources, request: Request) -> tuple[str, dict[str, Any]]:
    try:
        async with asyncio.timeout(PATIENCE_S):
            numbers = await its.db.read(lambda c: _numbers(c, its.settings.lease_s))
            if not await _sees_all(its, request):
                del numbers["queued"]
            return "ok", numbers
    except (Unavailable, TimeoutError) as error:
        return f"unavailable: {str(error) or 'no answer'}", {}


async def _sees_all(its: Resources, request: Request) -> bool:
    """How much all callers together have waiting is only for who may see what all share."""
    try:
        await its.gate.admit(request.scope["headers"], ADMIN)
    except (Unauthorized, Forbidden):
        return False
    return True


# Two counts, because each has a partial index that holds just these rows.
_waiting = jobs.c.state == QUEUED
_QUEUED = union_all(
    *(
        select(jobs.c.lane, func.count().label("waiting"))
        .where(_waiting, rung)
        .group_by(jobs.c.lane)
        for rung in (jobs.c.rung_ms.is_(None), jobs.c.rung_ms.is_not(None))
    )
)


def _numbers(connection: Connection, lease_s: float) -> dict[str, Any]:
    queued = dict.fromkeys(LANES, 0)
    for lane, waiting in connection.execute(_QUEUED):
        queued[lane] += waiting
    alive = workers.c.seen_ms > now_ms() - int(lease_s * 1000)
    counted = select(func.count()).select_from(workers).where(alive)
    return {"workers": connection.execute(counted).scalar_one(), "queued": queued}
