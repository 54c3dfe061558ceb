"""What crosses HTTP of sessions: checked requests, and the rows as sessions and their messages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from sqlalchemy import Select, select

from backchannel.schemas import Metadata, Name, Request, Title, rfc3339, whole
from backchannel.tables import CANCELLED, jobs, turns

DoubleTexting = Literal["enqueue", "reject", "interrupt"]
Budget = Annotated[int, Field(ge=1, le=2**53), BeforeValidator(whole)]


class History(Request):
    """How much of a session's history is told, in likely tokens of all that is told."""

    max_tokens: Budget | None = Field(None, description="For models that have none of their own.")
    models: dict[Name, Budget] | None = Field(None, description="By provider:model.")


class CreateSession(Request):
    """A new conversation."""

    model: Name | None = None
    title: Title | None = None
    system: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Said to the model before every turn's history."
    )
    double_texting: DoubleTexting = Field(
        "enqueue", description="What becomes of an unfinished turn when the next one is sent."
    )
    history: History | None = Field(None, description="Null: all of it is told.")
    metadata: Metadata | None = None


class ChangeSession(CreateSession):
    """What is left out stays; a change of model counts up ``model_version``."""


class Session(BaseModel):
    """A conversation and its current model."""

    id: str
    object: Literal["session"] = "session"
    model: str
    model_rule: str | None
    model_version: int
    double_texting: DoubleTexting
    history: History | None
    title: str | None
    system: str | None
    metadata: dict[str, str]
    created_at: str
    updated_at: str


class SessionMessage(BaseModel):
    """A message of a session, with the state of the job it belongs to."""

    model_config = ConfigDict(extra="allow")  # the message's own fields

    seq: int
    job_id: str
    state: str
    model: str | None  # of an answer
    interrupted: bool  # by the turn after it: an answer that is marked so broke off
    created_at: str


class SessionWithMessages(Session):
    """A conversation with all that was said."""

    messages: list[SessionMessage]


class SessionList(BaseModel):
    """One page of sessions; ``next`` is the ``after`` of the following one."""

    object: Literal["list"] = "list"
    data: list[Session]
    has_more: bool
    next: str | None


def session_of(row: Any) -> Session:
    """A row of the sessions as it crosses HTTP."""
    return Session(
        id=row.id,
        model=f"{row.provider}:{row.model}",
        model_rule=row.model_rule,
        model_version=row.model_version,
        double_texting=row.double_texting,
        history=row.history and History(**row.history),
        title=row.title,
        system=row.system,
        metadata=row.meta,
        created_at=rfc3339(row.created_ms),
        updated_at=rfc3339(row.updated_ms),
    )


# Everything `message_of` needs.
MESSAGE: Select[Any] = select(turns, jobs.c.state, jobs.c.interrupted_by).join(
    jobs, jobs.c.id == turns.c.job_id
)


def message_of(row: Any) -> SessionMessage:
    """A row of `MESSAGE` as it crosses HTTP."""
    return SessionMessage(
        **{"content": None, **row.message},
        seq=row.seq,
        job_id=row.job_id,
        state=row.state,
        model=None if row.model is None else f"{row.provider}:{row.model}",
        # one that was to be interrupted and had just finished is whole
        interrupted=row.state == CANCELLED and row.interrupted_by is not None,
        created_at=rfc3339(row.created_ms),
    )
