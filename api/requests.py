"""What is asked of us, checked: nothing is left that could turn out wrong after accept."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import Connection, and_, select

from api.deps import Resources
from api.told import told_before
from backchannel import keys
from backchannel.accept import NewJob
from backchannel.choice import Choice, choose
from backchannel.errors import CapabilityMissing, InvalidRequest, NotFound
from backchannel.registry import NAMED, Registry
from backchannel.schemas import CreateJob
from backchannel.tables import sessions, turns
from backchannel.tiers import AUTO


async def checked(
    its: Resources,
    caller: keys.Caller,
    asked: CreateJob,
    messages: list[dict[str, Any]],
    key: str | None,
    *,
    face: tuple[str, dict[str, Any]] | None = None,
    keep: bool = False,
) -> NewJob:
    """What was asked, with nothing left that could turn out wrong after accept.

    Args:
        face: The kind of job and the request as it was sent, where another form was translated.
        keep: Whether the job must be able to give that request back.
    """
    kind, sent = face or ("job", asked.model_dump(exclude_unset=True))
    model, parameters = asked.model, asked.parameters or {}
    if model is None and asked.session is not None:
        model = await _model_of_session(its, caller, asked.session)
    told = messages
    if model == AUTO and asked.session is not None:
        told = [*await _said(its, caller, asked.session), *messages]

    def choose_for(name: str | None, registry: Registry) -> Choice:
        return choose(
            registry,
            name,
            told,
            parameters,
            asked.fallbacks,
            system=asked.system,
            force=asked.force,
            allowed=caller.models,
        )

    names = (model, *(asked.fallbacks or ()))
    choice = await its.roster.answer(names, partial(choose_for, model))
    if asked.session is not None and not asked.force and not choice.sees(its.registry):
        # an image of an earlier turn is told again, to this one's model
        first = choice.resolved.id
        told = [*await told_before(its, caller, asked.session, first, messages), *messages]
        with _naming_history():
            choice = await its.roster.answer(names, partial(choose_for, model))
    refit = None
    if asked.session is not None and asked.model is None:
        refit = partial(choose_for, registry=its.registry)
    resolved, reason = choice.resolved, choice.resolved.reason
    if model != asked.model:
        own = "the session's model"
        reason = f"the session's {reason}" if choice.rule else reason.replace(NAMED, own)
    longest = its.settings.job_deadline_s
    if asked.deadline_s is not None and asked.deadline_s > longest:
        raise InvalidRequest(f"deadline_s: at most {longest:.0f}.", param="deadline_s")
    return NewJob(
        caller=caller,
        lane=asked.lane,
        provider=resolved.provider.id,
        model=resolved.model,
        requested_model=asked.model,
        model_reason=reason,
        model_rule=choice.rule,
        fallbacks=choice.fallbacks,
        instructions=asked.system,
        messages=messages,
        parameters=choice.parameters,
        request_hash=request_hash(sent if face is None else {kind: sent}),
        deadline_s=asked.deadline_s or longest,
        stream=asked.stream,
        kind=kind,
        asked=sent if keep else None,
        idempotency_key=key,
        session_id=asked.session,
        meta=asked.metadata or {},
        refit=refit,
        ring=its.ringer.open,
    )


@contextlib.contextmanager
def _naming_history() -> Iterator[None]:
    try:
        yield
    except CapabilityMissing as error:
        error.message = f"{error.message} The session's earlier turns need it."
        raise


async def _model_of_session(its: Resources, caller: str, session_id: str) -> str:
    """The session's model, or the rule by which it is chosen for each turn."""
    current = select(sessions.c.provider, sessions.c.model, sessions.c.model_rule).where(
        sessions.c.id == session_id, sessions.c.caller == caller
    )
    row = await its.db.read(lambda c: c.execute(current).first())
    if row is None:
        raise NotFound(f"There is no session '{session_id}'.", param="session")
    return row.model_rule or f"{row.provider}:{row.model}"


async def _said(its: Resources, caller: str, session_id: str) -> list[dict[str, Any]]:
    """What a session's next turn follows: its system prompt and all its messages."""
    own = and_(sessions.c.id == session_id, sessions.c.caller == caller)
    system = select(sessions.c.system).where(own)
    said = (
        select(turns.c.message)
        .join(sessions, sessions.c.id == turns.c.session_id)
        .where(own)
        .order_by(turns.c.seq)
    )

    def read(connection: Connection) -> list[dict[str, Any]]:
        first = connection.execute(system).scalar()
        begun = [{"role": "system", "content": first}] if first else []
        return [*begun, *connection.execute(said).scalars()]

    return await its.db.read(read)


def request_hash(request: dict[str, Any]) -> str:
    """What tells one request from another under the same Idempotency-Key."""
    return hashlib.sha256(msgspec.json.encode(request, order="deterministic")).hexdigest()
