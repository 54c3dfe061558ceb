"""Dispatch: which queued jobs are rung now, in order, fairly, within a small window."""

from __future__ import annotations

from sqlalchemy import Connection, and_, bindparam, func, select, update

from backchannel.books import Doorbell, doorbell
from backchannel.db import NOW
from backchannel.lifecycle import turn_has_come
from backchannel.tables import QUEUED, jobs, state_is, workers

_bell = (
    jobs.c.id, jobs.c.lane, jobs.c.provider, jobs.c.model, jobs.c.attempt, jobs.c.rank,
)  # fmt: skip
_RING = (
    update(jobs)
    .where(
        jobs.c.id.in_(bindparam("picked", expanding=True)),
        jobs.c.state == QUEUED,
        jobs.c.rung_ms.is_(None) | (jobs.c.rung_ms < NOW - bindparam("lost_after_ms")),
    )
    .values(rung_ms=NOW)
    .returning(*_bell)
)
_rung = and_(state_is(QUEUED), jobs.c.rung_ms.is_not(None), jobs.c.lane == bindparam("in_lane"))
_COUNT_RUNG = select(func.count()).select_from(jobs).where(_rung)
_LOST = (
    select(jobs.c.id)
    .where(
        _rung,
        jobs.c.rung_ms < NOW - bindparam("lost_after_ms"),
        jobs.c.run_ms <= NOW,
        turn_has_come,
    )
    .order_by(jobs.c.rung_ms)
    .limit(bindparam("room"))
)
_unrung = and_(state_is(QUEUED), jobs.c.rung_ms.is_(None), jobs.c.lane == bindparam("in_lane"))
_NEXT_CALLER = (
    select(jobs.c.caller)
    .where(_unrung, jobs.c.caller > bindparam("after"))
    .order_by(jobs.c.caller)
    .limit(1)
)
_DUE = (
    select(jobs.c.id, jobs.c.rank, jobs.c.caller)
    .where(
        _unrung,
        jobs.c.caller == bindparam("who"),
        jobs.c.run_ms <= NOW,
        jobs.c.cancel_ms.is_(None),
        turn_has_come,
    )
    .order_by(jobs.c.rank, jobs.c.id)
    .limit(bindparam("room"))
)
_SLOTS = select(func.coalesce(func.sum(workers.c.slots), 0)).where(
    workers.c.seen_ms > NOW - bindparam("alive_ms")
)


def live_slots(connection: Connection, alive_s: float) -> int:
    """The slots of all worker processes that were heard of lately."""
    return int(connection.execute(_SLOTS, {"alive_ms": int(alive_s * 1000)}).scalar_one())


LOST_AFTER_MS = 5_000
_MAX_CALLERS = 100

# Where the last round of each lane ended. The next one starts with the caller after it: a window
# that has room for one job at a time is shared too, and so is one with more callers than a round.
_last_served: dict[str, str] = {}


def dispatch(connection: Connection, lane: str, *, window: int, in_queue: int) -> list[Doorbell]:
    """Choose whom to ring: the head of the line first, fair between callers, within the window.

    Args:
        lane: Which queue.
        window: How many doorbells may be in Redis.
        in_queue: How many are there now. When the books know of more rung jobs than that, some
            doorbells were lost, and the ones not heard of for 5 s are rung again.
    """
    lost_after = {"lost_after_ms": LOST_AFTER_MS}
    rung = connection.execute(_COUNT_RUNG, {"in_lane": lane}).scalar_one()
    picked: list[str] = []
    if rung > in_queue:
        picked += connection.execute(
            _LOST, {"in_lane": lane, "room": rung - in_queue, **lost_after}
        ).scalars()
    room = window - in_queue - len(picked)
    if room > 0:
        picked += _fair_share(connection, lane, room)
    if not picked:
        return []
    rows = {row.id: row for row in connection.execute(_RING, {"picked": picked, **lost_after})}
    return [doorbell(rows[job_id]) for job_id in picked if job_id in rows]


def _fair_share(connection: Connection, lane: str, room: int) -> list[str]:
    callers = _callers_in_turn(connection, lane)
    if not callers:
        return []
    lines = [
        connection.execute(_DUE, {"in_lane": lane, "who": caller, "room": room}).all()
        for caller in callers
    ]
    longest = max(map(len, lines))
    round_robin = [line[place] for place in range(longest) for line in lines if place < len(line)]
    # stable: whoever is ahead of the line goes first, the others keep their turns
    served = sorted(round_robin, key=lambda row: row.rank)[:room]
    whole_round = len(callers) == _MAX_CALLERS and room >= len(callers)
    _last_served[lane] = served[-1].caller if served and not whole_round else callers[-1]
    return [row.id for row in served]


def _callers_in_turn(connection: Connection, lane: str) -> list[str]:
    """Callers with a backlog; one index probe each, however long the backlogs are."""
    start = after = _last_served.get(lane, "")
    wrapped = not start
    callers: list[str] = []
    while len(callers) < _MAX_CALLERS:
        caller = connection.execute(_NEXT_CALLER, {"in_lane": lane, "after": after}).scalar()
        if caller is None and not wrapped:
            after, wrapped = "", True
        elif caller is None or (wrapped and start and caller > start):
            break
        else:
            callers.append(caller)
            after = caller
    return callers
