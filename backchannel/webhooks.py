"""The guarded transitions of deliveries: taken, delivered, tried again, given up, replayed.

``tries`` is the fencing token: a delivery is taken for `LEASE_MS`, and whoever comes back later
than that writes nothing. If its worker dies, the next one sends it again, under the same id.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from sqlalchemy import Connection, Update, and_, bindparam, delete, exists, or_, select, update
from sqlalchemy.engine import RowMapping

from backchannel.db import NOW
from backchannel.tables import DEAD, DELIVERED, DELIVERY_FOLLOWS, PENDING, deliveries, webhooks

LEASE_MS = 60_000  # four times what one try may take
# Between the tries, up to a day in all: a receiver that is down over night misses nothing.
WAITS_S = (5, 30, 120, 600, 1_800, 3_600, 7_200, 14_400, 28_800, 28_800)
MOST_ASKED_S = max(WAITS_S)  # a receiver may ask for a longer wait, up to this one
OLD_SECRET_MS = 86_400_000
KEPT_MS = {DELIVERED: 7 * 86_400_000, DEAD: 30 * 86_400_000}
AT_ONCE = 5_000  # rows of one statement that removes some
GONE = 410  # by its own word nobody is there any more


class Delivery(NamedTuple):
    """One try at telling one webhook of one event, with all it needs to be sent."""

    webhook_id: str
    event_id: str
    type: str
    subject: str
    created_ms: int
    tries: int
    url: str
    secrets: tuple[bytes, ...]  # sealed; more than one while a rotation lasts


class Answer(NamedTuple):
    """What came of a try: a status, or why there is none."""

    status: int | None
    error: str | None
    wait_s: float = 0.0  # that its receiver asks for


def _turn(here: str, there: str) -> Update:
    """The one statement that changes a delivery's state; it asks the table of states."""
    if there not in DELIVERY_FOLLOWS[here]:
        raise AssertionError(f"{there} does not follow {here}")
    ended = None if there == PENDING else NOW
    return (
        update(deliveries)
        .where(deliveries.c.webhook_id == bindparam("webhook"), deliveries.c.state == here)
        .values(state=there, ended_ms=ended)
    )


# ---------------------------------------------------------------- take

_is_due = and_(deliveries.c.state == PENDING, deliveries.c.next_ms <= NOW)
_WAITING = select(webhooks.c.id).where(
    webhooks.c.disabled_ms.is_(None),
    exists().where(deliveries.c.webhook_id == webhooks.c.id, _is_due),
)
_its = deliveries.c.webhook_id == bindparam("webhook")
# A statement of its own: PostgreSQL may run a subquery several times, which would skip what it has
# locked itself and take more each time.
_SOME = (
    select(deliveries.c.event_id)
    .where(_its, _is_due)
    .order_by(deliveries.c.next_ms)
    .limit(bindparam("room"))
    .with_for_update(skip_locked=True)
)
_TAKE = (
    update(deliveries)
    .where(_its, deliveries.c.event_id.in_(bindparam("events", expanding=True)), _is_due)
    .values(tries=deliveries.c.tries + 1, next_ms=NOW + LEASE_MS)
    .returning(deliveries)
)
_OPEN = select(webhooks, (webhooks.c.old_until_ms > NOW).label("both")).where(
    webhooks.c.id == bindparam("webhook"), webhooks.c.disabled_ms.is_(None)
)


def waiting(connection: Connection) -> list[str]:
    """The webhooks that have something due."""
    return list(connection.execute(_WAITING).scalars())


def take(connection: Connection, webhook_id: str, room: int) -> list[Delivery]:
    """Some of a webhook's due deliveries, ours for `LEASE_MS`."""
    its = connection.execute(_OPEN, {"webhook": webhook_id}).first()
    if its is None:
        return []
    some = connection.execute(_SOME, {"webhook": webhook_id, "room": room}).scalars().all()
    rows = connection.execute(_TAKE, {"webhook": webhook_id, "events": some}).all() if some else []
    return [
        Delivery(
            webhook_id, row.event_id, row.type, row.subject, row.created_ms, row.tries, its.url,
            secrets_of(its._mapping),
        )
        for row in rows
    ]  # fmt: skip


def secrets_of(webhook: RowMapping) -> tuple[bytes, ...]:
    """The sealed secrets that sign now; the row says as ``both`` whether the old one does."""
    return (webhook["secret"], webhook["old_secret"]) if webhook["both"] else (webhook["secret"],)


# ---------------------------------------------------------------- settle

_mine = and_(
    deliveries.c.event_id == bindparam("event"), deliveries.c.tries == bindparam("by_tries")
)
_said: dict[str, Any] = {"status": bindparam("its_status"), "error": bindparam("its_error")}
_END = {there: _turn(PENDING, there).where(_mine).values(_said) for there in (DELIVERED, DEAD)}
_AGAIN = (
    update(deliveries)
    .where(_its, deliveries.c.state == PENDING, _mine)
    .values(next_ms=NOW + bindparam("wait_ms"), **_said)
)
_DISABLE = (
    update(webhooks)
    .where(webhooks.c.id == bindparam("webhook"), webhooks.c.disabled_ms.is_(None))
    .values(disabled_ms=NOW, disabled_why=bindparam("why"))
)
_GIVE_UP_ALL = _turn(PENDING, DEAD).values(error=bindparam("why"))


def settle(connection: Connection, delivery: Delivery, answer: Answer) -> str | None:
    """Write what came of a try; the state it led to, or None: it is not ours any more."""
    values: dict[str, Any] = {
        "webhook": delivery.webhook_id,
        "event": delivery.event_id,
        "by_tries": delivery.tries,
        "its_status": answer.status,
        "its_error": answer.error,
    }
    there = DELIVERED if answer.error is None else PENDING
    if answer.status == GONE or delivery.tries > len(WAITS_S):
        there = DEAD
    if there == PENDING:
        wait_s = WAITS_S[delivery.tries - 1] * random.uniform(0.8, 1.0)
        wait_s = max(wait_s, min(answer.wait_s, MOST_ASKED_S))
        statement, values["wait_ms"] = _AGAIN, int(wait_s * 1000)
    else:
        statement = _END[there]
    done = connection.execute(statement, values).rowcount == 1
    if answer.status == GONE:
        gone = {
            "webhook": delivery.webhook_id,
            "why": "It answered 410: gone. Switch it on again when it is back.",
        }
        connection.execute(_DISABLE, gone)
        connection.execute(_GIVE_UP_ALL, gone)
    return there if done else None


# ---------------------------------------------------------------- replay and forget

_ANEW = {"tries": 0, "next_ms": NOW}
_REPLAY = tuple(
    _turn(here, PENDING).where(deliveries.c.event_id == bindparam("event")).values(_ANEW)
    for here in (DEAD, DELIVERED)
)
_REPLAY_DEAD = _turn(DEAD, PENDING).values(_ANEW)
_old = or_(
    *(
        and_(deliveries.c.state == state, deliveries.c.ended_ms < NOW - kept_ms)
        for state, kept_ms in KEPT_MS.items()
    )
)
_OLD = (
    select(deliveries.c.webhook_id, deliveries.c.event_id)
    .where(deliveries.c.ended_ms < NOW - min(KEPT_MS.values()), _old)
    .limit(AT_ONCE)
)
_FORGET = delete(deliveries).where(_its, deliveries.c.event_id == bindparam("event"), _old)


def replay(connection: Connection, webhook_id: str, event_id: str) -> bool:
    """Send a delivery that has ended once more, from its first try; False: it has not ended."""
    values = {"webhook": webhook_id, "event": event_id}
    return any(connection.execute(statement, values).rowcount for statement in _REPLAY)


def replay_dead(connection: Connection, webhook_id: str) -> int:
    """Send once more all that was given up; returns how many."""
    return connection.execute(_REPLAY_DEAD, {"webhook": webhook_id}).rowcount


def forget_old(connection: Connection) -> int:
    """Remove some deliveries that ended long ago; returns how many."""
    old = connection.execute(_OLD).all()
    if old:
        connection.execute(
            _FORGET, [{"webhook": webhook_id, "event": event_id} for webhook_id, event_id in old]
        )
    return len(old)
