"""A worker's transitions of its jobs: claimed, called, and finished or back to the queue.

Each is a function of an open transaction and answers for its own row: it either did the whole of
its step, or the guard matched nothing and it did nothing. ``attempt`` is the fencing token: every
write a worker makes names the attempt and the owner it acts for, so a worker that was frozen and
came back writes nothing. The transitions that need no living worker are in `reaping` and `closing`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Label,
    Update,
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    select,
    update,
)

from backchannel.books import (
    Doorbell,
    Finished,
    Outcome,
    Spent,
    close_attempt,
    doorbell,
    write_finish,
)
from backchannel.db import NOW
from backchannel.history import said_before
from backchannel.stored_keys import PROVIDERS_VERSION
from backchannel.tables import (
    QUEUED,
    RUNNING,
    TERMINAL,
    attempts,
    jobs,
    requests,
    sessions,
    state_is,
    workers,
)
from backchannel.transitions import ending, ending_values, going_back, its_id, move
from backchannel.writer import at_end, in_bulk


def _fenced(statement: Update) -> Update:
    return statement.where(
        jobs.c.attempt == bindparam("by_attempt"), jobs.c.owner == bindparam("by_owner")
    )


_earlier = jobs.alias("earlier")
turn_has_come: ColumnElement[bool] = jobs.c.session_id.is_(None) | ~exists().where(
    _earlier.c.session_id == jobs.c.session_id,
    _earlier.c.session_seq < jobs.c.session_seq,
    state_is(QUEUED, RUNNING, of=_earlier),
)

# ---------------------------------------------------------------- claim, heartbeat, call mark


@dataclass(frozen=True, slots=True)
class Claim:
    """One attempt at a job, owned by one worker process, with all it needs to run."""

    job_id: str
    attempt: int
    owner: str
    caller: str
    lane: str
    provider: str
    model: str
    session_id: str | None
    session_seq: int | None
    stream: bool
    retries: int
    age_ms: int  # since accept
    left_ms: int  # to the deadline
    messages: list[dict[str, Any]]
    parameters: dict[str, Any]
    model_reason: str = ""
    fallbacks: list[str] | None = None
    fallback_from: str | None = None
    registry_version: int = 0  # of the providers, at this moment

    @property
    def fence(self) -> dict[str, Any]:
        """The guard of every write made for this attempt."""
        return {"job": self.job_id, "by_attempt": self.attempt, "by_owner": self.owner}


def _asked(column: Column[Any]) -> Label[Any]:
    """With the claim itself: one statement less, on PostgreSQL one round trip."""
    its = select(column).where(requests.c.job_id == bindparam("job"))
    return its.scalar_subquery().label(column.name)


is_due = and_(
    jobs.c.run_ms <= NOW, jobs.c.deadline_ms > NOW, jobs.c.cancel_ms.is_(None), turn_has_come
)
# What was taken of a provider's limits is for it alone: a doorbell of the job's model before is
# a duplicate.
of_provider = jobs.c.provider == bindparam("of_provider")
_CLAIM = (
    move(QUEUED, RUNNING)
    .where(is_due, jobs.c.crashes < bindparam("crashes_below"))
    .values(
        attempt=jobs.c.attempt + 1,
        owner=bindparam("by_owner"),
        lease_ms=NOW + bindparam("lease_in_ms"),
        started_ms=case((jobs.c.started_ms.is_(None), NOW), else_=jobs.c.started_ms),
        rung_ms=None,
        rank=1,
    )
    .returning(
        jobs.c.attempt,
        jobs.c.caller,
        jobs.c.lane,
        jobs.c.provider,
        jobs.c.model,
        jobs.c.session_id,
        jobs.c.session_seq,
        jobs.c.stream,
        jobs.c.retries,
        jobs.c.model_reason,
        jobs.c.fallbacks,
        jobs.c.fallback_from,
        (NOW - jobs.c.created_ms).label("age_ms"),
        (jobs.c.deadline_ms - NOW).label("left_ms"),
        _asked(requests.c.instructions),
        _asked(requests.c.messages),
        _asked(requests.c.parameters),
        # in here it is no statement of its own, and no claim is older than what it says
        PROVIDERS_VERSION.label("registry_version"),
    )
)
_CLAIM_OF = _CLAIM.where(of_provider)
_BEGIN_ATTEMPTS = in_bulk(insert(attempts).values(started_ms=NOW))
_SESSION = select(sessions.c.system, sessions.c.history).where(
    sessions.c.id == bindparam("session")
)
PATIENCE = 3  # times the crashes allowed, for a job that workers also die without


def claim(
    connection: Connection,
    job_id: str,
    owner: str,
    lease_s: float,
    crashes_below: int = 1000,
    provider: str | None = None,
) -> Claim | None:
    """Take a queued job that is due; None means the doorbell was a duplicate, or too early.

    Args:
        crashes_below: Leave jobs alone that have taken this many workers with them.
        provider: Leave jobs alone that have come to ask another one.
    """
    asked = {
        "job": job_id,
        "by_owner": owner,
        "lease_in_ms": int(lease_s * 1000),
        "crashes_below": crashes_below,
    }
    if provider is None:
        row = connection.execute(_CLAIM, asked).first()
    else:
        row = connection.execute(_CLAIM_OF, {**asked, "of_provider": provider}).first()
    if row is None:
        return None
    begun = {"job_id": job_id, "attempt": row.attempt, "owner": owner}
    at_end(connection, _BEGIN_ATTEMPTS, begun)
    claimed = row._asdict()
    instructions, messages = claimed.pop("instructions"), claimed.pop("messages")
    if row.session_id is not None:
        session = connection.execute(_SESSION, {"session": row.session_id}).one()
        if instructions is None:
            instructions = session.system
        history = said_before(connection, job_id, row, session.history, instructions, messages)
        messages = [*history, *messages]
    if instructions is not None:
        messages = [{"role": "system", "content": instructions}, *messages]
    return Claim(job_id=job_id, owner=owner, messages=messages, **claimed)


def sign_on(connection: Connection, owner: str, host: str, pid: int, slots: int) -> None:
    """A worker process begins; the dispatcher counts its slots. Old dead ones are forgotten."""
    connection.execute(delete(workers).where(workers.c.seen_ms < NOW - 86_400_000))
    connection.execute(
        insert(workers).values(started_ms=NOW, seen_ms=NOW),
        {"owner": owner, "host": host, "pid": pid, "slots": slots, "in_flight": 0},
    )


def sign_off(connection: Connection, owner: str) -> None:
    """A worker process ends."""
    connection.execute(delete(workers).where(workers.c.owner == owner))


_HEARTBEAT = (
    update(jobs)
    .where(
        jobs.c.id.in_(bindparam("held", expanding=True)),
        jobs.c.owner == bindparam("by_owner"),
        jobs.c.state == RUNNING,
    )
    .values(lease_ms=NOW + bindparam("lease_in_ms"))
    .returning(jobs.c.id, jobs.c.attempt, jobs.c.cancel_ms)
)


class Beat(NamedTuple):
    """What a heartbeat says of one held job."""

    attempt: int
    cancelled: bool


def heartbeat(
    connection: Connection, owner: str, held: list[str], lease_s: float, registry_version: int = 0
) -> dict[str, Beat]:
    """Renew the leases of one process in one statement; what is missing from the answer is lost."""
    connection.execute(
        update(workers)
        .where(workers.c.owner == owner)
        .values(seen_ms=NOW, in_flight=len(held), registry_version=registry_version)
    )
    if not held:
        return {}
    rows = connection.execute(
        _HEARTBEAT, {"held": held, "by_owner": owner, "lease_in_ms": int(lease_s * 1000)}
    )
    return {row.id: Beat(row.attempt, row.cancel_ms is not None) for row in rows}


_MARK_CALL = (
    update(attempts)
    .where(
        attempts.c.job_id == bindparam("job"),
        attempts.c.attempt == bindparam("by_attempt"),
        # PostgreSQL looks at this row again after waiting for a reaper, but not at the job's
        attempts.c.finished_ms.is_(None),
        exists().where(
            jobs.c.id == bindparam("job"),
            jobs.c.attempt == bindparam("by_attempt"),
            jobs.c.owner == bindparam("by_owner"),
            jobs.c.state == RUNNING,
        ),
    )
    .values(provider_call_ms=NOW)
)


def mark_call(connection: Connection, claim: Claim) -> bool:
    """Put the provider call on record before it is made; False: the attempt is no longer ours."""
    return connection.execute(_MARK_CALL, claim.fence).rowcount == 1


# ---------------------------------------------------------------- finish


_FINISH = {state: ending(_fenced(move(RUNNING, state))) for state in TERMINAL}


def finish(connection: Connection, claim: Claim, outcome: Outcome) -> Finished | None:
    """The one finish transaction of an attempt; None: the attempt is no longer ours."""
    row = connection.execute(
        _FINISH[outcome.state], {**claim.fence, **ending_values(outcome)}
    ).first()
    return None if row is None else write_finish(connection, row, outcome)


# ---------------------------------------------------------------- back to the queue

_REQUEUE = going_back(_fenced(move(RUNNING, QUEUED))).values(
    run_ms=NOW + bindparam("delay_ms"),
    retries=jobs.c.retries + bindparam("burnt"),
    rank=bindparam("in_front"),
)


def retry_later(
    connection: Connection,
    claim: Claim,
    *,
    delay_s: float,
    burns_attempt: bool,
    error_code: str,
    error_message: str,
    spent: Spent | None,
    ask: Ask | None = None,
) -> bool:
    """Back to the queue after a provider error; its usage is on the books but not billable.

    Args:
        ask: Another model, for the next attempt.
    """
    back = _requeue(
        connection, claim.fence, "retried", error_code, error_message, spent,
        delay_ms=int(delay_s * 1000), burnt=int(burns_attempt), in_front=1,
    )  # fmt: skip
    if back and ask is not None:
        connection.execute(
            _ASK, {"job": claim.job_id, "by_attempt": claim.attempt, **ask._asdict()}
        )
    return back


class Ask(NamedTuple):
    """The model that the next attempt asks instead, and why."""

    new_provider: str
    new_model: str
    new_reason: str


_ASK = (
    update(jobs)
    .where(its_id, jobs.c.attempt == bindparam("by_attempt"), state_is(QUEUED))
    .values(
        provider=bindparam("new_provider"),
        model=bindparam("new_model"),
        model_reason=bindparam("new_reason"),
        fallback_from=func.coalesce(jobs.c.fallback_from, jobs.c.provider + ":" + jobs.c.model),
    )
)
_RUNG = (
    update(jobs)
    .where(its_id, jobs.c.attempt == bindparam("by_attempt"), state_is(QUEUED))
    .values(rung_ms=NOW)
    .returning(jobs.c.id, jobs.c.lane, jobs.c.provider, jobs.c.model, jobs.c.attempt, jobs.c.rank)
)


def fall_back(
    connection: Connection,
    claim: Claim,
    ask: Ask,
    *,
    error_code: str,
    error_message: str,
    spent: Spent | None,
) -> Doorbell | None:
    """Ask another model at once, at the head of the line: no retry is burnt. None: not ours.

    It is another attempt, because every provider call has an attempt of its own on the books.
    """
    if not _requeue(
        connection, claim.fence, "fell_back", error_code, error_message, spent,
        delay_ms=0, burnt=0, in_front=0,
    ):  # fmt: skip
        return None
    which = {"job": claim.job_id, "by_attempt": claim.attempt}
    connection.execute(_ASK, {**which, **ask._asdict()})
    return doorbell(connection.execute(_RUNG, which).one())


_MET = select(attempts.c.error_code).where(
    attempts.c.job_id == bindparam("job"), attempts.c.error_code.is_not(None)
)


def errors_met(connection: Connection, job_id: str) -> set[str]:
    """The codes of the errors that a job's attempts ended with."""
    return set(connection.execute(_MET, {"job": job_id}).scalars())


def hand_back(connection: Connection, claim: Claim, spent: Spent | None) -> bool:
    """Back to the head of the line at once: this process is going, the job is not at fault."""
    return _requeue(
        connection, claim.fence, "handed_back", spent=spent, delay_ms=0, burnt=0, in_front=0
    )


_STRAYS = select(jobs.c.id, jobs.c.attempt).where(
    state_is(RUNNING),
    jobs.c.owner == bindparam("by_owner"),
    jobs.c.lease_ms < NOW + bindparam("lease_in_ms"),
)


def hand_back_strays(
    connection: Connection, owner: str, held: Iterable[tuple[str, int]], lease_s: float
) -> int:
    """Hand back what the books say a process runs, and it does not; returns how many.

    The reply to its claim was lost, or its end could not be written in an outage. Nobody has died
    of that, so it is no crash.

    Args:
        held: Job and attempt of what the process does run.
        lease_s: Only leases with less than this left: a new claim may still be on its way.
    """
    found = connection.execute(
        _STRAYS, {"by_owner": owner, "lease_in_ms": int(lease_s * 1000)}
    ).all()
    strays = {(row.id, row.attempt) for row in found} - set(held)
    for job_id, attempt in strays:
        fence = {"job": job_id, "by_attempt": attempt, "by_owner": owner}
        _requeue(connection, fence, "handed_back", delay_ms=0, burnt=0, in_front=0)
    return len(strays)


def _requeue(
    connection: Connection,
    fence: dict[str, Any],
    what: str,
    code: str | None = None,
    why: str | None = None,
    spent: Spent | None = None,
    **values: int,
) -> bool:
    row = connection.execute(_REQUEUE, {**fence, **values}).first()
    if row is None:
        return False
    close_attempt(connection, row, what, code, why, spent, billable=False)
    return True
