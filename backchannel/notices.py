"""What callers can be told has ended, and the deliveries that tell them, written with the end."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, insert, literal_column, select

from backchannel.db import NOW
from backchannel.response_output import INCOMPLETE, PREFIX
from backchannel.tables import (
    CANCELLED,
    COMPLETED,
    EXPIRED,
    FAILED,
    PENDING,
    SUCCEEDED,
    deliveries,
    webhooks,
)

EVENT_TYPES = (
    *(f"job.{state}" for state in (SUCCEEDED, FAILED, CANCELLED, EXPIRED)),
    *(f"response.{status}" for status in (COMPLETED, FAILED, CANCELLED, "incomplete")),
    *(f"batch.{status}" for status in (COMPLETED, FAILED, EXPIRED, CANCELLED)),
)
RESPONSE = "response"  # the kind of a job that is read back as a response


class End(NamedTuple):
    """Something of a caller's has ended; ``subject`` is its id as the caller knows it."""

    caller: str
    subject: str
    event: str


def job_end(row: Any, state: str, finish_reason: str | None) -> End:
    """The end of a job, in the words of the face it was asked through."""
    if row.kind != RESPONSE:
        return End(row.caller, row.id, f"job.{state}")
    status = FAILED if state == EXPIRED else state
    if state == SUCCEEDED:
        status = "incomplete" if finish_reason in INCOMPLETE else COMPLETED
    return End(row.caller, PREFIX + row.id.removeprefix("job_"), f"response.{status}")


# Most installations have none: asking that first costs a tenth of asking for some callers'.
_ANY = select(webhooks.c.id).limit(literal_column("1"))
_LISTENING = select(webhooks.c.id, webhooks.c.caller, webhooks.c.event_types).where(
    webhooks.c.caller.in_(bindparam("callers", expanding=True)), webhooks.c.disabled_ms.is_(None)
)


def tell(connection: Connection, ends: list[End]) -> None:
    """Write a delivery for each webhook that wants to know; call it through `db.at_end`.

    One look for the whole transaction, so that ends of which nobody is told cost next to nothing.
    A subject ends once: its event's id is made of its own.
    """
    if connection.execute(_ANY).first() is None:
        return
    listening: dict[tuple[str, str], list[str]] = defaultdict(list)
    for webhook in connection.execute(_LISTENING, {"callers": sorted({e.caller for e in ends})}):
        for event in webhook.event_types:
            listening[webhook.caller, event].append(webhook.id)
    rows = [
        {
            "webhook_id": webhook_id,
            "event_id": f"evt_{end.subject.partition('_')[2]}",
            "type": end.event,
            "subject": end.subject,
        }
        for end in ends
        for webhook_id in listening.get((end.caller, end.event), ())
    ]
    if rows:
        connection.execute(
            insert(deliveries).values(created_ms=NOW, next_ms=NOW, state=PENDING, tries=0), rows
        )
