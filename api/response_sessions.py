"""The conversation under a response: a new one, the previous response's, or a branch of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, literal, select

from api.faces import Found
from backchannel.accept import Accepted, NewJob, accept
from backchannel.db import NOW
from backchannel.errors import Conflict
from backchannel.ids import new_id
from backchannel.tables import TERMINAL, jobs, sessions, turns

_LOCKED = select(sessions).where(sessions.c.id == bindparam("session")).with_for_update()
_LATEST = select(func.max(jobs.c.session_seq)).where(jobs.c.session_id == bindparam("session"))
_PLACE = select(jobs.c.session_seq, jobs.c.state, jobs.c.provider, jobs.c.model).where(
    jobs.c.id == bindparam("job")
)


def entering(
    previous: Found | None, *, apart: bool = False
) -> Callable[[Connection, NewJob], Accepted]:
    """How a response is accepted: together with its place in a conversation.

    Args:
        apart: In a branch of its own, since nothing shall follow it.
    """

    def enter(connection: Connection, new: NewJob) -> Accepted:
        if previous is None:
            session, made = _begin(connection, new, new.provider, new.model), True
        else:
            session, made = _after(connection, new, previous, apart)
        accepted = accept(connection, replace(new, session_id=session))
        if made and not accepted.created:  # an idempotent replay: its session is there already
            connection.execute(delete(turns).where(turns.c.session_id == session))
            connection.execute(delete(sessions).where(sessions.c.id == session))
        return accepted

    return enter


def _after(connection: Connection, new: NewJob, previous: Found, apart: bool) -> tuple[str, bool]:
    """The session in which `new` follows `previous`, and whether it was made for it.

    The latest response is followed in its own session, also while it runs: turns wait for each
    other. Any earlier one is left by a branch.
    """
    old = previous.job.session
    assert old is not None
    # two that follow the same response at once must not both find it the latest
    locked = connection.execute(_LOCKED, {"session": old}).one()
    at = connection.execute(_PLACE, {"job": previous.job.id}).one()
    latest = connection.execute(_LATEST, {"session": old}).scalar()
    if latest == at.session_seq and not apart:
        return old, False
    if at.state not in TERMINAL:
        raise Conflict(
            "The previous response still runs, and only one that is stored can wait behind it: "
            "any other begins a branch, which needs an answer to begin behind.",
            code="previous_response_running",
            param="previous_response_id",
        )
    session = _begin(connection, new, at.provider, at.model, locked.system)
    last = at.session_seq + len(previous.messages)
    _copy(connection, old, session, last)
    return session, True


def _begin(
    connection: Connection, new: NewJob, provider: str, model: str, system: str | None = None
) -> str:
    session = new_id("session")
    row: dict[str, Any] = {
        "id": session, "caller": new.caller, "title": None, "system": system,
        "provider": provider, "model": model, "model_version": 1, "last_seq": 0, "meta": {},
    }  # fmt: skip
    connection.execute(insert(sessions).values(created_ms=NOW, updated_ms=NOW), row)
    return session


def _copy(connection: Connection, old: str, session: str, last: int) -> None:
    """The turns up to `last`, which are over: told again, they belong to the jobs they had."""
    same = [
        turns.c.seq, turns.c.job_id, turns.c.message, turns.c.provider, turns.c.model,
        turns.c.created_ms,
    ]  # fmt: skip
    told = select(literal(session), *same).where(turns.c.session_id == old, turns.c.seq <= last)
    names = ["session_id", *(column.name for column in same)]
    connection.execute(insert(turns).from_select(names, told))
    connection.execute(sessions.update().where(sessions.c.id == session).values(last_seq=last))
