"""Accept: a job, its request and its session's turns become rows, or nothing does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import (
    Connection,
    Insert,
    String,
    and_,
    bindparam,
    case,
    exists,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from backchannel.books import Doorbell, doorbell
from backchannel.cancelling import interrupt
from backchannel.db import NOW
from backchannel.errors import Conflict, NotFound, key_mismatch
from backchannel.ids import new_id
from backchannel.tables import (
    INTERACTIVE,
    INTERRUPT,
    QUEUED,
    REJECT,
    RUNNING,
    jobs,
    requests,
    sessions,
    state_is,
    turns,
)

if TYPE_CHECKING:
    from backchannel.choice import Choice


@dataclass(frozen=True, slots=True)
class NewJob:
    """What the API accepted, checked and resolved."""

    caller: str
    lane: str
    provider: str
    model: str
    requested_model: str | None
    model_reason: str
    messages: list[dict[str, Any]]
    parameters: dict[str, Any]
    request_hash: str
    deadline_s: float
    stream: bool = True
    kind: str = "job"
    instructions: str | None = None
    asked: dict[str, Any] | None = None
    idempotency_key: str | None = None
    session_id: str | None = None
    parent_id: str | None = None
    batch_id: str | None = None
    line: int | None = None
    meta: dict[str, str] = field(default_factory=dict)
    fallbacks: list[str] | None = None  # provider:model, in order
    model_rule: str | None = None  # the tier, or auto, by which the model was chosen
    # checks it anew for the model that its session has by the time it enters it
    refit: Callable[[str], Choice] | None = None
    ring: bool = True  # now; False: the dispatcher does it, as for all of a batch

    @property
    def rings(self) -> bool:
        """Whether it is rung for at accept."""
        return self.ring and self.lane == INTERACTIVE


class Accepted(NamedTuple):
    """The committed job, whether this call made it, and the doorbell to ring, if any."""

    job_id: str
    created: bool
    doorbell: Doorbell | None
    created_ms: int
    interrupted: str | None = None  # the begun turn of its session that was cancelled for it


_values = {
    "id": bindparam("job"),
    **{
        name: bindparam(f"new_{name}")
        for name in (
            "caller", "kind", "lane", "provider", "model", "requested_model", "model_reason",
            "request_hash", "stream", "idempotency_key", "session_id", "parent_id", "batch_id",
            "line", "meta", "fallbacks",
        )
    },
    "state": literal(QUEUED),
    "created_ms": bindparam("now"),
    "run_ms": bindparam("now"),
    "deadline_ms": bindparam("deadline"),
    "rung_ms": bindparam("rung"),
    "rank": literal(1),
    "attempt": literal(0),
    "retries": literal(0),
    "crashes": literal(0),
}  # fmt: skip
_INSERT_JOB: dict[str, Insert] = {
    "sqlite": sqlite.insert(jobs).values(_values).on_conflict_do_nothing().returning(jobs.c.id),
    "postgresql": postgresql.insert(jobs)
    .values(_values)
    .on_conflict_do_nothing()
    .returning(jobs.c.id),
}
_INSERT_JOBS = insert(jobs).values(_values)
_NOW = select(NOW)
_SAME_KEY = select(jobs.c.id, jobs.c.request_hash, jobs.c.created_ms).where(
    jobs.c.caller == bindparam("who"), jobs.c.idempotency_key == bindparam("key")
)
_named = bindparam("switch") == True  # noqa: E712
# a turn that names no model brings the one that its session's rule chose for it
_brings = or_(_named, sessions.c.model_rule == bindparam("rule", type_=String))
_switching = and_(
    _brings,
    (sessions.c.model != bindparam("to_model")) | (sessions.c.provider != bindparam("to_provider")),
)
_ENTER_SESSION = (
    update(sessions)
    .where(sessions.c.id == bindparam("session"), sessions.c.caller == bindparam("who"))
    .values(
        last_seq=sessions.c.last_seq + bindparam("room"),
        provider=case((_switching, bindparam("to_provider")), else_=sessions.c.provider),
        model=case((_switching, bindparam("to_model")), else_=sessions.c.model),
        model_rule=case((_named, bindparam("rule", type_=String)), else_=sessions.c.model_rule),
        model_version=sessions.c.model_version + case((_switching, 1), else_=0),
        updated_ms=NOW,
    )
    .returning(
        sessions.c.last_seq, sessions.c.provider, sessions.c.model, sessions.c.double_texting
    )
)
_before = jobs.alias("before")
_unfinished = and_(
    _before.c.session_id == bindparam("session"),
    _before.c.session_seq < bindparam("seq"),
    state_is(QUEUED, RUNNING, of=_before),
)
_TURN_HAS_COME = ~exists().where(_unfinished)
_UNFINISHED = select(_before.c.id).where(_unfinished).limit(1)
_PLACE_IN_SESSION = (
    update(jobs)
    .where(jobs.c.id == bindparam("job"))
    .values(
        session_seq=bindparam("seq"),
        provider=bindparam("in_provider"),
        model=bindparam("in_model"),
        fallbacks=bindparam("in_fallbacks", type_=jobs.c.fallbacks.type),
        model_reason=case(
            (
                and_(
                    jobs.c.provider == bindparam("in_provider"),
                    jobs.c.model == bindparam("in_model"),
                ),
                jobs.c.model_reason,
            ),
            else_=literal("the session's model"),  # it was switched since the request was read
        ),
        rung_ms=case((_TURN_HAS_COME, jobs.c.rung_ms), else_=None),
    )
    .returning(
        jobs.c.id, jobs.c.lane, jobs.c.provider, jobs.c.model, jobs.c.attempt, jobs.c.rung_ms
    )
)


def accept(connection: Connection, new: NewJob) -> Accepted:
    """Write a job, its request and its session's turns; the caller may have the id once committed.

    A job whose request names a model switches its session to it; one that names none takes the
    session's model of this moment.

    Raises:
        Conflict: The idempotency key was used for another request, or the session takes one turn
            at a time and is at one.
        NotFound: No such session for this caller.
        InvalidRequest: The session's model of this moment cannot answer it.
    """
    job_id, now = new_id("job"), connection.execute(_NOW).scalar_one()
    row = _row(job_id, new, now)
    if connection.execute(_INSERT_JOB[connection.dialect.name], row).first() is None:
        same = connection.execute(_SAME_KEY, {"who": new.caller, "key": new.idempotency_key}).one()
        if same.request_hash != new.request_hash:
            raise key_mismatch()
        return Accepted(same.id, created=False, doorbell=None, created_ms=same.created_ms)
    bell, interrupted = _bell(job_id, new), None
    if new.session_id is not None:
        bell, interrupted, new = _enter_session(connection, job_id, new)
    connection.execute(insert(requests), _request(job_id, new))
    return Accepted(job_id, True, bell, now, interrupted)


def accept_many(connection: Connection, new: Sequence[NewJob]) -> list[Accepted]:
    """Write jobs without key or session, at a tenth of the cost of one `accept` each.

    Lines of a batch are accepted so; somebody else's guard says that they are not there yet.
    """
    if not new:
        return []
    now = connection.execute(_NOW).scalar_one()
    both = [(new_id("job"), each) for each in new]
    connection.execute(_INSERT_JOBS, [_row(job_id, each, now) for job_id, each in both])
    connection.execute(insert(requests), [_request(job_id, each) for job_id, each in both])
    return [Accepted(job_id, True, _bell(job_id, each), now) for job_id, each in both]


def _bell(job_id: str, new: NewJob) -> Doorbell | None:
    if not new.rings:
        return None
    return Doorbell(job_id, new.lane, f"{new.provider}:{new.model}", 1)


def _row(job_id: str, new: NewJob, now: int) -> dict[str, Any]:
    return {
        "job": job_id,
        "new_caller": new.caller,
        "new_kind": new.kind,
        "new_lane": new.lane,
        "new_provider": new.provider,
        "new_model": new.model,
        "new_requested_model": new.requested_model,
        "new_model_reason": new.model_reason,
        "new_request_hash": new.request_hash,
        "new_stream": new.stream,
        "new_idempotency_key": new.idempotency_key,
        "new_session_id": new.session_id,
        "new_parent_id": new.parent_id,
        "new_batch_id": new.batch_id,
        "new_line": new.line,
        "new_meta": new.meta,
        "new_fallbacks": new.fallbacks,
        "now": now,
        "deadline": now + int(new.deadline_s * 1000),
        "rung": now if new.rings else None,
    }


def _request(job_id: str, new: NewJob) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "instructions": new.instructions,
        "messages": new.messages,
        "parameters": new.parameters,
        "asked": new.asked,
    }


def _enter_session(
    connection: Connection, job_id: str, new: NewJob
) -> tuple[Doorbell | None, str | None, NewJob]:
    """Take the session's next places; the bell is rung only if no turn before is unfinished.

    What becomes of one that is, the session's `double_texting` says.
    """
    room = len(new.messages) + 1  # the last place is the answer's
    session = connection.execute(
        _ENTER_SESSION,
        {
            "session": new.session_id,
            "who": new.caller,
            "room": room,
            "switch": new.requested_model is not None,
            "to_provider": new.provider,
            "to_model": new.model,
            "rule": new.model_rule,
        },
    ).first()
    if session is None:
        raise NotFound(f"There is no session '{new.session_id}'.", param="session")
    if new.refit is not None and (session.provider, session.model) != (new.provider, new.model):
        # it was switched since the request was read: what was checked then was another model
        choice = new.refit(f"{session.provider}:{session.model}")
        new = replace(
            new,
            provider=choice.resolved.provider.id,
            model=choice.resolved.model,
            parameters=choice.parameters,
            fallbacks=choice.fallbacks,
        )
    first = session.last_seq - room + 1
    interrupted = None
    if session.double_texting == REJECT:
        _refuse_if_busy(connection, new, first)
    elif session.double_texting == INTERRUPT:
        interrupted = interrupt(connection, str(new.session_id), first, job_id)
    placed = connection.execute(
        _PLACE_IN_SESSION,
        {
            "job": job_id,
            "session": new.session_id,
            "seq": first,
            "in_provider": session.provider if new.refit is None else new.provider,
            "in_model": session.model if new.refit is None else new.model,
            "in_fallbacks": new.fallbacks,
        },
    ).one()
    connection.execute(
        insert(turns).values(created_ms=NOW),
        [
            {
                "session_id": new.session_id,
                "seq": first + offset,
                "job_id": job_id,
                "message": message,
            }
            for offset, message in enumerate(new.messages)
        ],
    )
    return None if placed.rung_ms is None else doorbell(placed), interrupted, new


def _refuse_if_busy(connection: Connection, new: NewJob, first: int) -> None:
    busy = connection.execute(_UNFINISHED, {"session": new.session_id, "seq": first}).scalar()
    if busy is not None:
        raise Conflict(
            f"Session {new.session_id} takes one turn at a time, and job {busy} has not finished. "
            "Wait for it or cancel it, then send this again.",
            code="session_busy",
            param="session",
        )
