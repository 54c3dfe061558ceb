"""Jobs that wait for their provider: put off before they begin, and called back."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, bindparam, null, select, update

from backchannel.db import NOW
from backchannel.lifecycle import is_due, of_provider
from backchannel.tables import QUEUED, jobs, state_is

_its_id = jobs.c.id == bindparam("job")
_DEFER = (
    update(jobs)
    .where(_its_id, state_is(QUEUED), is_due, of_provider)
    .values(run_ms=NOW + bindparam("delay_ms"), rung_ms=None)
)
_DEFER_FAITHFUL = _DEFER.where(jobs.c.fallbacks.is_(null()))


def defer(
    connection: Connection,
    job_id: str,
    provider: str,
    delay_s: float,
    *,
    unless_fallbacks: bool = False,
) -> bool:
    """Put off a job whose provider takes no more calls now: it was not begun, and costs nothing.

    False: it was not for this doorbell to begin, or has fallbacks and that is for its claim.
    """
    values = {"job": job_id, "of_provider": provider, "delay_ms": int(delay_s * 1000)}
    statement = _DEFER_FAITHFUL if unless_fallbacks else _DEFER
    return connection.execute(statement, values).rowcount == 1


_RECALL = (
    update(jobs)
    .where(state_is(QUEUED), of_provider, jobs.c.rung_ms.is_(None), jobs.c.run_ms > NOW)
    .values(run_ms=NOW)
)


def recall(connection: Connection, provider: str) -> None:
    """Have all jobs try again that wait for a provider: its limits are others now."""
    connection.execute(_RECALL, {"of_provider": provider})


_WAY = select(jobs.c.provider, jobs.c.lane).where(_its_id)


def way_of(connection: Connection, job_id: str) -> Any:
    """The provider and the lane of a job; None if there is no such job."""
    return connection.execute(_WAY, {"job": job_id}).first()
