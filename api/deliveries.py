"""Deliveries: how each telling of a webhook went, and how to have it sent once more."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection

from api.deps import Caller, Shared, StrictRoute
from api.pages import behind, following
from api.webhooks import found_webhook
from backchannel import webhooks as store
from backchannel.errors import Conflict, NotFound
from backchannel.tables import DELIVERY_FOLLOWS, PENDING, deliveries

router = APIRouter(
    prefix="/v1/webhooks/{webhook_id}/deliveries", tags=["webhooks"], route_class=StrictRoute
)


class Delivery(BaseModel):
    """One event for one webhook; ``id`` is the header webhook-id of every try."""

    id: str
    object: Literal["webhook_delivery"] = "webhook_delivery"
    event_type: str
    subject: str
    state: str
    tries: int
    status_code: int | None
    error: str | None
    created_at: int
    next_try_at: int | None
    ended_at: int | None


class DeliveryList(BaseModel):
    """One page of deliveries; `next` is the ``after`` of the following one."""

    object: Literal["list"] = "list"
    data: list[Delivery]
    has_more: bool
    next: str | None


class Replayed(BaseModel):
    """How many are sent once more."""

    replayed: int


class DeliveriesQuery(BaseModel):
    """Which deliveries to list."""

    model_config = ConfigDict(extra="forbid")

    state: Literal[*DELIVERY_FOLLOWS] | None = None  # type: ignore[valid-type]
    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, description="The `next` of the page before.")


@router.get("")
async def list_deliveries(
    webhook_id: str, asked: Annotated[DeliveriesQuery, Query()], its: Shared, caller: Caller
) -> DeliveryList:
    """A page of deliveries, the newest subjects first."""
    statement = deliveries.select().where(deliveries.c.webhook_id == webhook_id)
    if asked.state is not None:
        statement = statement.where(deliveries.c.state == asked.state)
    page = behind(statement, deliveries.c.event_id, asked.after, asked.limit, newest_first=True)

    def read(connection: Connection) -> list[Delivery]:
        found_webhook(connection, webhook_id, caller)
        return [_delivery(row) for row in connection.execute(page)]

    found = await its.db.read(read)
    return DeliveryList(**following(found, asked.limit))


@router.post("/{delivery_id}/replay")
async def replay_delivery(
    webhook_id: str, delivery_id: str, its: Shared, caller: Caller
) -> Delivery:
    """Send a delivery once more, with the same id, whether it had arrived or was given up."""
    one = deliveries.select().where(
        deliveries.c.webhook_id == webhook_id, deliveries.c.event_id == delivery_id
    )

    def write(connection: Connection) -> Delivery:
        found_webhook(connection, webhook_id, caller)
        done = store.replay(connection, webhook_id, delivery_id)
        row = connection.execute(one).first()
        if row is None:
            raise NotFound(f"There is no delivery '{delivery_id}'.")
        if not done:
            raise Conflict(f"{delivery_id} is still being tried.", code="not_finished")
        return _delivery(row)

    return await its.db.write(write)


@router.post("/replay")
async def replay_dead(webhook_id: str, its: Shared, caller: Caller) -> Replayed:
    """Send once more all that was given up."""

    def write(connection: Connection) -> Replayed:
        found_webhook(connection, webhook_id, caller)
        return Replayed(replayed=store.replay_dead(connection, webhook_id))

    return await its.db.write(write)


def _delivery(row: Any) -> Delivery:
    return Delivery(
        id=row.event_id,
        event_type=row.type,
        subject=row.subject,
        state=row.state,
        tries=row.tries,
        status_code=row.status,
        error=row.error,
        created_at=row.created_ms // 1000,
        next_try_at=row.next_ms // 1000 if row.state == PENDING else None,
        ended_at=row.ended_ms and row.ended_ms // 1000,
    )
