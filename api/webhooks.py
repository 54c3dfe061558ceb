"""Webhooks: where a caller is told of what has ended; their secrets, and a test of each."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import Connection, delete, func, insert, null, select, update

from api.deps import Caller, IdempotencyKey, Resources, Shared, StrictRoute
from api.pages import behind, ends
from api.repeats import say_whether, use_of
from backchannel import webhooks as store
from backchannel.db import NOW
from backchannel.egress import AllowedHosts, check_url
from backchannel.errors import Conflict, InvalidRequest, NotFound
from backchannel.idempotency import SECRET, WEBHOOK, Settled, settle
from backchannel.ids import new_id
from backchannel.notices import EVENT_TYPES
from backchannel.sealed import seal, unseal
from backchannel.tables import webhooks
from backchannel.webhook_post import new_secret, open_session, post

MOST = 20  # webhooks of one caller: each is a look at every end

EventTypes = Annotated[list[str], Field(min_length=1, max_length=2 * len(EVENT_TYPES))]
Name = Annotated[str, StringConstraints(max_length=200)]
Url = Annotated[str, StringConstraints(min_length=1, max_length=2048)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class CreateWebhook(_Request):
    """Where to tell whom of what."""

    url: Url = Field(description="https, or what the operator allowed.")
    event_types: EventTypes = Field(list(EVENT_TYPES), description="All of them if not given.")
    name: Name = ""


class ChangeWebhook(_Request):
    """Only what is named changes."""

    url: Url | None = None
    event_types: EventTypes | None = None
    name: Name | None = None
    enabled: bool | None = None


class RotateSecret(_Request):
    """How long the old secret goes on."""

    keep_old_secret_active_for_24_hours: bool = True


class TestWebhook(_Request):
    """What to send."""

    event_type: str | None = Field(None, description="By default the webhook's first.")


class Webhook(BaseModel):
    """A webhook as OpenAI describes one, and whether it is switched on."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str
    enabled: bool
    disabled_reason: str | None


class WebhookWithSecret(Webhook):
    """With its secret, which is shown this once; null if it has been changed since."""

    signing_secret: str | None


class WebhookList(BaseModel):
    """One page; the last one's id is the ``after`` of the following page."""

    object: Literal["list"] = "list"
    data: list[Webhook]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedWebhook(BaseModel):
    """It is gone, with its deliveries."""

    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


class TestResult(BaseModel):
    """What the receiver answered; without an answer ``error`` says why."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    success: bool
    status_code: int | None
    error: str | None


router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], route_class=StrictRoute)

# ---------------------------------------------------------------- make, change, remove


@router.post("", status_code=201)
async def create_webhook(
    asked: CreateWebhook,
    its: Shared,
    caller: Caller,
    response: Response,
    key: IdempotencyKey = None,
) -> WebhookWithSecret:
    """Make a webhook. Its signing secret is in this answer and nowhere else."""
    _check_url(its, asked.url)
    webhook_id, secret = new_id("wh"), new_secret()
    use = use_of(WEBHOOK, caller, key, asked)
    values = {
        "id": webhook_id,
        "caller": caller,
        "name": asked.name,
        "url": asked.url,
        "event_types": _known(asked.event_types),
        **_sealed(its, secret),
        "created_ms": NOW,
        "updated_ms": NOW,
    }

    def write(connection: Connection) -> tuple[Settled, Any]:
        settled = settle(connection, use, webhook_id, _mark(secret))
        if not settled.first:
            return settled, found_webhook(connection, settled.subject, caller)
        there = select(func.count()).select_from(webhooks).where(webhooks.c.caller == caller)
        if connection.execute(there).scalar_one() >= MOST:
            raise Conflict(
                f"There are {MOST} webhooks already, the most there can be. Remove one first.",
                code="too_many_webhooks",
            )
        connection.execute(insert(webhooks).values(values))
        return settled, found_webhook(connection, webhook_id, caller)

    settled, row = await its.db.write(write)
    response.headers["Location"] = f"/v1/webhooks/{row.id}"
    say_whether(settled.first, response)
    return _with_secret(its, row, settled)


@router.patch("/{webhook_id}")
async def change_webhook(
    webhook_id: str, asked: ChangeWebhook, its: Shared, caller: Caller
) -> Webhook:
    """Change what is named; deliveries that wait go to the new address."""
    values: dict[str, Any] = {"updated_ms": NOW}
    if asked.url is not None:
        _check_url(its, asked.url)
        values["url"] = asked.url
    if asked.event_types is not None:
        values["event_types"] = _known(asked.event_types)
    if asked.name is not None:
        values["name"] = asked.name
    if asked.enabled is not None:
        values["disabled_ms"] = null() if asked.enabled else NOW
        values["disabled_why"] = None if asked.enabled else "It was switched off."

    def write(connection: Connection) -> Webhook:
        connection.execute(update(webhooks).where(*_own(webhook_id, caller)).values(values))
        return _shown(found_webhook(connection, webhook_id, caller))

    return await its.db.write(write)


@router.delete("/{webhook_id}")
async def remove_webhook(webhook_id: str, its: Shared, caller: Caller) -> DeletedWebhook:
    """Remove a webhook and its deliveries; what is being sent now may still arrive."""

    def write(connection: Connection) -> None:
        found_webhook(connection, webhook_id, caller)
        connection.execute(delete(webhooks).where(*_own(webhook_id, caller)))

    await its.db.write(write)
    return DeletedWebhook(id=webhook_id)


@router.post("/{webhook_id}/rotate")
async def rotate_secret(
    webhook_id: str,
    its: Shared,
    caller: Caller,
    response: Response,
    asked: RotateSecret | None = None,
    key: IdempotencyKey = None,
) -> WebhookWithSecret:
    """A new secret. For a day everything is signed with both, so receivers can change in peace."""
    secret = new_secret()
    use = use_of(SECRET, caller, key, asked, webhook=webhook_id)
    values: dict[str, Any] = {**_sealed(its, secret), "updated_ms": NOW}
    if asked is None or asked.keep_old_secret_active_for_24_hours:
        values |= {"old_secret": webhooks.c.secret, "old_until_ms": NOW + store.OLD_SECRET_MS}
    else:
        values |= {"old_secret": null(), "old_until_ms": null()}

    def write(connection: Connection) -> tuple[Settled, Any]:
        settled = settle(connection, use, webhook_id, _mark(secret))
        if settled.first:
            connection.execute(update(webhooks).where(*_own(webhook_id, caller)).values(values))
        return settled, found_webhook(connection, webhook_id, caller)

    settled, row = await its.db.write(write)
    say_whether(settled.first, response)
    return _with_secret(its, row, settled)


# ---------------------------------------------------------------- read


class WebhooksQuery(BaseModel):
    """Which webhooks to list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, description="The `last_id` of the page before.")


@router.get("")
async def list_webhooks(
    asked: Annotated[WebhooksQuery, Query()], its: Shared, caller: Caller
) -> WebhookList:
    """A page of webhooks, the newest first."""
    own = webhooks.select().where(webhooks.c.caller == caller)
    page = behind(own, webhooks.c.id, asked.after, asked.limit, newest_first=True)
    found = await its.db.read(lambda c: [_shown(row) for row in c.execute(page)])
    return WebhookList(**ends(found, asked.limit))


@router.get("/{webhook_id}")
async def get_webhook(webhook_id: str, its: Shared, caller: Caller) -> Webhook:
    """A webhook as it stands."""
    return await its.db.read(lambda c: _shown(found_webhook(c, webhook_id, caller)))


# ---------------------------------------------------------------- test


@router.post("/{webhook_id}/test")
async def send_test(
    webhook_id: str, its: Shared, caller: Caller, asked: TestWebhook | None = None
) -> TestResult:
    """Send one event now, signed like all others, and say what was answered; it is not repeated."""
    both = (webhooks.c.old_until_ms > NOW).label("both")
    statement = select(webhooks, NOW.label("now_ms"), both).where(*_own(webhook_id, caller))
    row = await its.db.read(lambda c: c.execute(statement).first())
    if row is None:
        raise _no_webhook(webhook_id)
    event = (asked and asked.event_type) or row.event_types[0]
    _known([event], "event_type")
    sample = store.Delivery(
        webhook_id=webhook_id,
        event_id=new_id("evt"),
        type=event,
        subject=f"{event.partition('.')[0].replace('response', 'resp')}_test",
        created_ms=row.now_ms,
        tries=1,
        url=row.url,
        secrets=store.secrets_of(row._mapping),
    )
    async with await open_session(its.settings) as session:
        answer = await post(session, sample, its.settings)
    return TestResult(
        webhook_endpoint_id=webhook_id,
        event_type=event,
        success=answer.status is not None,
        status_code=answer.status,
        error=answer.error,
    )


# ---------------------------------------------------------------- what they share


def _check_url(its: Resources, url: str) -> None:
    try:
        check_url(url, AllowedHosts.parse(its.settings.egress_allow))
    except InvalidRequest as error:
        error.param = "url"
        raise


def _known(event_types: list[str], param: str = "event_types") -> list[str]:
    for event in event_types:
        if event not in EVENT_TYPES:
            raise InvalidRequest(
                f"There is no event '{event}'. There are: {', '.join(EVENT_TYPES)}.", param=param
            )
    return list(dict.fromkeys(event_types))


def _sealed(its: Resources, secret: str) -> dict[str, Any]:
    return {"secret": seal(its.settings, secret), "secret_hint": f"whsec_…{secret[-4:]}"}


def _mark(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _with_secret(its: Resources, row: Any, settled: Settled) -> WebhookWithSecret:
    """A webhook with the secret that was made with it, unless there is another by now."""
    secret = unseal(its.settings, row.secret)
    own = secret if _mark(secret) == settled.mark else None
    return WebhookWithSecret(**_shown(row).model_dump(), signing_secret=own)


def _own(webhook_id: str, caller: str) -> tuple[Any, Any]:
    return webhooks.c.id == webhook_id, webhooks.c.caller == caller


def found_webhook(connection: Connection, webhook_id: str, caller: str) -> Any:
    """A caller's webhook.

    Raises:
        NotFound: There is none, or it is somebody else's.
    """
    row = connection.execute(webhooks.select().where(*_own(webhook_id, caller))).first()
    if row is None:
        raise _no_webhook(webhook_id)
    return row


def _no_webhook(webhook_id: str) -> NotFound:
    return NotFound(f"There is no webhook '{webhook_id}'.")


def _shown(row: Any) -> Webhook:
    return Webhook(
        id=row.id,
        created_at=row.created_ms // 1000,
        updated_at=row.updated_ms // 1000,
        name=row.name,
        url=row.url,
        event_types=row.event_types,
        signing_secret_hint=row.secret_hint,
        enabled=row.disabled_ms is None,
        disabled_reason=row.disabled_why,
    )


# ---------------------------------------------------------------- where OpenAI's SDK looks for them

theirs = APIRouter(prefix="/v1/webhook_endpoints", route_class=StrictRoute, include_in_schema=False)
for route in router.routes:
    assert isinstance(route, StrictRoute)
    theirs.add_api_route(
        route.path.removeprefix(router.prefix),
        route.endpoint,
        methods=list(route.methods or ()),
        status_code=route.status_code,
    )
# the SDK changes one with a POST
theirs.post("/{webhook_id}")(change_webhook)
theirs.post("/{webhook_id}/rotate_secret")(rotate_secret)
