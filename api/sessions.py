"""Sessions: ordered conversations, each with its current model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, and_, case, insert, not_, select, update

from api.deps import Caller, IdempotencyKey, Resources, Shared, StrictRoute
from api.pages import behind, following
from api.repeats import say_whether, use_of
from backchannel import keys
from backchannel.db import NOW
from backchannel.errors import NotFound
from backchannel.idempotency import SESSION, settle
from backchannel.ids import new_id
from backchannel.session_schemas import (
    MESSAGE,
    ChangeSession,
    CreateSession,
    Session,
    SessionList,
    SessionWithMessages,
    message_of,
    session_of,
)
from backchannel.tables import sessions, turns
from backchannel.tiers import rule_of

router = APIRouter(prefix="/v1/sessions", tags=["sessions"], route_class=StrictRoute)


@router.post("", status_code=201)
async def create_session(
    asked: CreateSession,
    its: Shared,
    caller: Caller,
    response: Response,
    key: IdempotencyKey = None,
) -> Session:
    """Begin a conversation."""
    resolved = await its.roster.resolve(asked.model)
    caller.check_model(resolved.id)
    session_id = new_id("session")
    values = {
        "id": session_id,
        "caller": caller,
        "title": asked.title,
        "system": asked.system,
        "provider": resolved.provider.id,
        "model": resolved.model,
        "model_rule": rule_of(asked.model or its.registry.default_model),
        "model_version": 1,
        "last_seq": 0,
        "double_texting": asked.double_texting,
        "history": _limits(asked),
        "meta": asked.metadata or {},
    }

    def write(connection: Connection) -> tuple[Session, bool]:
        settled = settle(connection, use_of(SESSION, caller, key, asked), session_id)
        if settled.first:
            now = connection.execute(select(NOW)).scalar_one()  # once: PostgreSQL's goes on
            times = {"created_ms": now, "updated_ms": now}
            connection.execute(insert(sessions).values(**values, **times))
        return _read(connection, caller, settled.subject), settled.first

    session, first = await its.db.write(write)
    response.headers["Location"] = f"/v1/sessions/{session.id}"
    say_whether(first, response)
    return session


class SessionsQuery(BaseModel):
    """Which sessions to list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, description="The `next` of the page before.")
    order: Literal["desc", "asc"] = "desc"


@router.get("")
async def list_sessions(
    asked: Annotated[SessionsQuery, Query()], its: Shared, caller: Caller
) -> SessionList:
    """A page of conversations, the newest first."""
    own = sessions.select().where(sessions.c.caller == caller)
    newest_first = asked.order == "desc"
    page = behind(own, sessions.c.id, asked.after, asked.limit, newest_first=newest_first)
    found = await its.db.read(lambda c: [session_of(row) for row in c.execute(page)])
    return SessionList(**following(found, asked.limit))


@router.get("/{session_id}")
async def get_session(session_id: str, its: Shared, caller: Caller) -> SessionWithMessages:
    """A conversation and all that was said, with the state of the job of each message."""

    def read(connection: Connection) -> SessionWithMessages:
        session = _read(connection, caller, session_id)
        said = MESSAGE.where(turns.c.session_id == session_id).order_by(turns.c.seq)
        messages = [message_of(row) for row in connection.execute(said)]
        return SessionWithMessages(**session.model_dump(), messages=messages)

    return await its.db.read(read)


@router.patch("/{session_id}")
async def change_session(
    session_id: str, asked: ChangeSession, its: Shared, caller: Caller
) -> Session:
    """Change what is named; jobs already accepted keep the model they have."""
    values: dict[str, Any] = {"updated_ms": NOW}
    if "title" in asked.model_fields_set:
        values["title"] = asked.title
    if "system" in asked.model_fields_set:
        values["system"] = asked.system
    if "metadata" in asked.model_fields_set:
        values["meta"] = asked.metadata or {}
    if "double_texting" in asked.model_fields_set:
        values["double_texting"] = asked.double_texting
    if "history" in asked.model_fields_set:
        values["history"] = _limits(asked)
    if asked.model is not None:
        values |= await _switch(its, caller, asked.model)

    def write(connection: Connection) -> Session:
        connection.execute(update(sessions).where(*_own(caller, session_id)).values(values))
        return _read(connection, caller, session_id)

    return await its.db.write(write)


async def _switch(its: Resources, caller: keys.Caller, model: str) -> dict[str, Any]:
    to = await its.roster.resolve(model)
    caller.check_model(to.id)
    same = and_(sessions.c.provider == to.provider.id, sessions.c.model == to.model)
    return {
        "provider": to.provider.id,
        "model": to.model,
        "model_rule": rule_of(model),
        "model_version": sessions.c.model_version + case((not_(same), 1), else_=0),
    }


def _read(connection: Connection, caller: str, session_id: str) -> Session:
    row = connection.execute(sessions.select().where(*_own(caller, session_id))).first()
    if row is None:
        raise NotFound(f"There is no session '{session_id}'.")
    return session_of(row)


def _own(caller: str, session_id: str) -> tuple[Any, Any]:
    return sessions.c.id == session_id, sessions.c.caller == caller


def _limits(asked: CreateSession) -> dict[str, Any] | None:
    return None if asked.history is None else asked.history.model_dump(exclude_none=True)
