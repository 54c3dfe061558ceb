"""The guarded transitions of a job: the only place that changes a state.

Each is a function of an open transaction and answers for its own row: it either did the whole of
its step, or the guard matched nothing and it did nothing. ``attempt`` is the fencing token: every
write a worker makes names the attempt and the owner it acts for, so a worker that was frozen and
came back writes nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
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
    literal_column,
    or_,
    select,
    update,
)
from uuid_utils.compat import uuid7

from backchannel.books import (
    Doorbell,
    Finished,
    Outcome,
    Spent,
    close_attempt,
    doorbell,
    write_finish,
)
from backchannel.db import at_end, in_bulk, now_ms
from backchannel.events import END, encode, end_fields, pack_log
from backchannel.history import Message, Turn, budget_of, fit
from backchannel.stored_keys import PROVIDERS_VERSION
from backchannel.tables import (
    CANCELLED,
    EXPIRED,
    FAILED,
    FOLLOWS,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    TERMINAL,
    attempts,
    jobs,
    requests,
    sessions,
    turns,
    workers,
)

NOW = now_ms()


def new_id(kind: str) -> str:
    """A time-ordered id such as ``job_0192…``: 128 bits, uuid version 7 (RFC 9562)."""
    moment: uuid.UUID = uuid7()
    return f"{kind}_{moment.hex}"


def state_is(state: str) -> ColumnElement[bool]:
    """A condition with the state written out: for a parameter no partial index can be prepared."""
    # a column of that text: `literal_execute` would write the statement anew at every execution
    return jobs.c.state == literal_column(f"'{state}'")


# When the attempt that ends here called its provider, if it did. With the statement that ends it:
# what is on record decides whether there is something to pay, not what the worker believes.
_call = (
    select(attempts.c.provider_call_ms)
    .where(
        attempts.c.job_id == jobs.c.id,
        attempts.c.attempt == jobs.c.attempt,
        attempts.c.finished_ms.is_(None),
    )
    .correlate(jobs)
    .scalar_subquery()
    .label("provider_call_ms")
)

_its_id = jobs.c.id == bindparam("job")


def _move(here: str, there: str, which: ColumnElement[bool] = _its_id) -> Update:
    """The one statement that changes a state; it asks the table of states."""
    if there not in FOLLOWS[here]:
        raise AssertionError(f"{there} does not follow {here}")
    return (
        update(jobs)
        .where(which, state_is(here))
        .values(
            state=there,
            **({"finished_ms": NOW, "lease_ms": None} if there in TERMINAL else {}),
        )
    )


def _fenced(statement: Update) -> Update:
    return statement.where(
        jobs.c.attempt == bindparam("by_attempt"), jobs.c.owner == bindparam("by_owner")
    )


_earlier = jobs.alias("earlier")
turn_has_come: ColumnElement[bool] = jobs.c.session_id.is_(None) | ~exists().where(
    _earlier.c.session_id == jobs.c.session_id,
    _earlier.c.session_seq < jobs.c.session_seq,
    _earlier.c.state.in_([QUEUED, RUNNING]),
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


_CLAIM = (
    _move(QUEUED, RUNNING)
    .where(
        jobs.c.run_ms <= NOW,
        jobs.c.deadline_ms > NOW,
        jobs.c.cancel_ms.is_(None),
        jobs.c.crashes < bindparam("crashes_below"),
        turn_has_come,
    )
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
_BEGIN_ATTEMPTS = in_bulk(insert(attempts).values(started_ms=NOW))
_SESSION = select(sessions.c.system, sessions.c.history).where(
    sessions.c.id == bindparam("session")
)
# Turns of jobs that did not succeed stay visible in the session but are not told to the model:
# a question without its answer would be asked twice when it is retried. What was interrupted is
# told: whoever wrote on has read as far as that.
_HISTORY = (
    select(turns.c.job_id, turns.c.message)
    .join(jobs, jobs.c.id == turns.c.job_id)
    .where(
        turns.c.session_id == bindparam("session"),
        turns.c.seq < bindparam("seq"),
        or_(
            jobs.c.state == SUCCEEDED,
            and_(jobs.c.state == CANCELLED, jobs.c.interrupted_by.is_not(None)),
        ),
    )
    .order_by(turns.c.seq)
)
_DROPPED = (
    update(jobs).where(jobs.c.id == bindparam("job")).values(turns_dropped=bindparam("dropped"))
)


def claim(
    connection: Connection, job_id: str, owner: str, lease_s: float, crashes_below: int = 1000
) -> Claim | None:
    """Take a queued job that is due; None means the doorbell was a duplicate, or too early.

    Args:
        crashes_below: Leave jobs alone that have taken this many workers with them.
    """
    row = connection.execute(
        _CLAIM,
        {
            "job": job_id,
            "by_owner": owner,
            "lease_in_ms": int(lease_s * 1000),
            "crashes_below": crashes_below,
        },
    ).first()
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
        history = _history(connection, job_id, row, session.history, instructions, messages)
        messages = [*history, *messages]
    if instructions is not None:
        messages = [{"role": "system", "content": instructions}, *messages]
    return Claim(job_id=job_id, owner=owner, messages=messages, **claimed)


def _history(
    connection: Connection,
    job_id: str,
    row: Any,
    limits: dict[str, Any] | None,
    instructions: str | None,
    messages: list[Message],
) -> list[Message]:
    """What was said before, as far as the session's budget for the job's model goes."""
    said = connection.execute(_HISTORY, {"session": row.session_id, "seq": row.session_seq})
    budget = budget_of(limits, f"{row.provider}:{row.model}")
    if budget is None:
        return [each.message for each in said]
    by_job: dict[str, Turn] = {}
    for each in said:
        by_job.setdefault(each.job_id, []).append(each.message)
    system = [] if instructions is None else [{"role": "system", "content": instructions}]
    told = fit(list(by_job.values()), [*system, *messages], budget)
    connection.execute(_DROPPED, {"job": job_id, "dropped": told.dropped})
    return [message for turn in told.turns for message in turn]


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


def _ending(statement: Update) -> Update:
    return statement.values(
        finish_reason=bindparam("how"),
        error_code=bindparam("code"),
        error_message=bindparam("why"),
    ).returning(
        jobs.c.id, jobs.c.kind, jobs.c.caller, jobs.c.lane, jobs.c.provider, jobs.c.model,
        jobs.c.model_reason, jobs.c.attempt, jobs.c.session_id, jobs.c.session_seq,
        jobs.c.interrupted_by, jobs.c.batch_id, jobs.c.line, _call,
    )  # fmt: skip


_FINISH = {state: _ending(_fenced(_move(RUNNING, state))) for state in TERMINAL}


def finish(connection: Connection, claim: Claim, outcome: Outcome) -> Finished | None:
    """The one finish transaction of an attempt; None: the attempt is no longer ours."""
    row = connection.execute(
        _FINISH[outcome.state], {**claim.fence, **_ending_values(outcome)}
    ).first()
    return None if row is None else write_finish(connection, row, outcome)


def _ending_values(outcome: Outcome) -> dict[str, Any]:
    return {
        "how": outcome.finish_reason,
        "code": outcome.error_code,
        "why": outcome.error_message,
    }


# ---------------------------------------------------------------- back to the queue

_back = {
    "owner": None,
    "lease_ms": None,
    "rung_ms": None,
}
_row = (
    jobs.c.id, jobs.c.caller, jobs.c.lane, jobs.c.provider, jobs.c.model, jobs.c.model_reason,
    jobs.c.session_id, jobs.c.session_seq, jobs.c.attempt, _call,
)  # fmt: skip
_REQUEUE = (
    _fenced(_move(RUNNING, QUEUED))
    .values(
        run_ms=NOW + bindparam("delay_ms"),
        retries=jobs.c.retries + bindparam("burnt"),
        rank=bindparam("in_front"),
        **_back,
    )
    .returning(*_row)
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
    .where(_its_id, jobs.c.attempt == bindparam("by_attempt"), state_is(QUEUED))
    .values(
        provider=bindparam("new_provider"),
        model=bindparam("new_model"),
        model_reason=bindparam("new_reason"),
        fallback_from=func.coalesce(jobs.c.fallback_from, jobs.c.provider + ":" + jobs.c.model),
    )
)
_RUNG = (
    update(jobs)
    .where(_its_id, jobs.c.attempt == bindparam("by_attempt"), state_is(QUEUED))
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


# ---------------------------------------------------------------- the caretaker's transitions


class Lapsed(NamedTuple):
    """A running job whose lease is over."""

    job_id: str
    attempt: int
    crashes: int  # with this one, if it counts
    age_ms: int
    silent_ms: int  # since its lease was over
    deaths: int  # of workers, since it first ran; those of the last lease are not known yet

    def is_suspect(self, max_crashes: int) -> bool:
        """Whether it seems to be the job that kills workers.

        Not while most of those that died meanwhile died without it: then something else kills
        them, and an innocent job would be failed for having been there three times. A worker is
        known to be dead a lease after its death, so the verdict waits for one more lease: or of
        many deaths those that clear the job would be missing.
        """
        suspected = self.crashes >= max_crashes and 2 * self.crashes >= self.deaths
        return suspected or self.crashes >= PATIENCE * max_crashes


# Who died before its provider call was on record was hardly killed by the job: a worker that has
# just started takes many and imports the SDK first. That this goes on for ever it does count.
MOST_UNCALLED = 10
PATIENCE = 3  # times the crashes allowed, for a job that workers also die without
_counts = case(
    (
        exists().where(
            attempts.c.job_id == jobs.c.id,
            attempts.c.attempt == jobs.c.attempt,
            attempts.c.provider_call_ms.is_not(None),
        ),
        1,
    ),
    (jobs.c.attempt >= MOST_UNCALLED, 1),
    else_=0,
)
_deaths = (
    select(func.count())
    .select_from(workers)
    .where(
        workers.c.seen_ms >= jobs.c.started_ms - bindparam("lease_in_ms"),
        workers.c.seen_ms < NOW - bindparam("lease_in_ms"),
    )
    .scalar_subquery()
)
_LAPSED = (
    select(
        jobs.c.id,
        jobs.c.attempt,
        jobs.c.crashes + _counts,
        NOW - jobs.c.created_ms,
        NOW - jobs.c.lease_ms,
        _deaths,
    )
    .where(state_is(RUNNING), jobs.c.lease_ms < NOW)
    .limit(1000)
)


def lapsed(connection: Connection, lease_s: float = 20.0) -> list[Lapsed]:
    """The running jobs whose worker has gone silent.

    Args:
        lease_s: A worker not heard of for this long is dead.
    """
    rows = connection.execute(_LAPSED, {"lease_in_ms": int(lease_s * 1000)})
    return [Lapsed(*row) for row in rows]


def _reaped(statement: Update) -> Update:
    return statement.where(jobs.c.attempt == bindparam("by_attempt"), jobs.c.lease_ms < NOW).values(
        crashes=jobs.c.crashes + _counts
    )


_LOCK_CALL = (
    select(attempts.c.provider_call_ms)
    .where(attempts.c.job_id == bindparam("job"), attempts.c.attempt == bindparam("by_attempt"))
    .with_for_update()
)


def _with_call(connection: Connection, row: Any) -> Any:
    """The row of a reaped job, with its call as it is on record by now.

    A worker that is not dead may have marked it while we took the job; from here on it cannot.
    """
    its = {"job": row.id, "by_attempt": row.attempt}
    called = connection.execute(_LOCK_CALL, its).scalar()
    return SimpleNamespace(**{**row._mapping, "provider_call_ms": called})


_REAP = _reaped(_move(RUNNING, QUEUED)).values(run_ms=NOW, rank=0, **_back).returning(*_row)
_REAP_POISON = _ending(_reaped(_move(RUNNING, FAILED)))


def reap(connection: Connection, job_id: str, attempt: int) -> bool:
    """Put a job whose worker died back at the head of the line."""
    row = connection.execute(_REAP, {"job": job_id, "by_attempt": attempt}).first()
    if row is None:
        return False
    row = _with_call(connection, row)
    close_attempt(connection, row, "reaped", None, None, None, billable=False)
    return True


def reap_poison(connection: Connection, job_id: str, attempt: int, outcome: Outcome) -> bool:
    """Fail a job that took too many workers with it."""
    row = connection.execute(
        _REAP_POISON, {"job": job_id, "by_attempt": attempt, **_ending_values(outcome)}
    ).first()
    if row is not None:
        write_finish(connection, _with_call(connection, row), outcome)
    return row is not None


class Overdue(NamedTuple):
    """A queued job that must end without (another) attempt, and in which state."""

    job_id: str
    attempt: int
    state: str
    age_ms: int


_overdue = (
    select(
        jobs.c.id,
        jobs.c.attempt,
        case((jobs.c.cancel_ms.is_not(None), CANCELLED), else_=EXPIRED),
        NOW - jobs.c.created_ms,
    )
    .where(state_is(QUEUED))
    .limit(1000)
)
_OVERDUE = (
    _overdue.where(jobs.c.cancel_ms.is_not(None)),
    _overdue.where(jobs.c.deadline_ms <= NOW),
)


def overdue(connection: Connection) -> list[Overdue]:
    """The queued jobs that were cancelled, or whose deadline has passed."""
    found = [Overdue(*row) for statement in _OVERDUE for row in connection.execute(statement)]
    return list({each.job_id: each for each in found}.values())


_CLOSE_QUEUED = {
    CANCELLED: _ending(
        _move(QUEUED, CANCELLED).where(
            jobs.c.attempt == bindparam("by_attempt"), jobs.c.cancel_ms.is_not(None)
        )
    ),
    EXPIRED: _ending(
        _move(QUEUED, EXPIRED).where(
            jobs.c.attempt == bindparam("by_attempt"), jobs.c.deadline_ms <= NOW
        )
    ),
}


def close_queued(
    connection: Connection, job_id: str, attempt: int, outcome: Outcome
) -> Finished | None:
    """End a queued job that was cancelled or has expired; None: it is not queued any more."""
    row = connection.execute(
        _CLOSE_QUEUED[outcome.state],
        {"job": job_id, "by_attempt": attempt, **_ending_values(outcome)},
    ).first()
    return None if row is None else write_finish(connection, row, outcome)


# ---------------------------------------------------------------- cancel


class Cancelling(NamedTuple):
    """Where a job stood when its cancel was put on record."""

    state: str
    attempt: int
    age_ms: int


_REQUEST_CANCEL = (
    update(jobs)
    .where(
        jobs.c.id == bindparam("job"),
        jobs.c.caller == bindparam("who"),
        jobs.c.state.in_([QUEUED, RUNNING]),
    )
    .values(cancel_ms=case((jobs.c.cancel_ms.is_(None), NOW), else_=jobs.c.cancel_ms))
    .returning(jobs.c.state, jobs.c.attempt, NOW - jobs.c.created_ms)
)


def request_cancel(connection: Connection, job_id: str, caller: str) -> Cancelling | None:
    """Put a cancel on record: from here on no attempt starts. None: finished, or not there."""
    row = connection.execute(_REQUEST_CANCEL, {"job": job_id, "who": caller}).first()
    return None if row is None else Cancelling(*row)


_INTERRUPT = (
    update(jobs)
    .where(
        jobs.c.session_id == bindparam("session"),
        jobs.c.session_seq < bindparam("seq"),
        jobs.c.state.in_([QUEUED, RUNNING]),
        jobs.c.cancel_ms.is_(None),
    )
    .values(cancel_ms=NOW, interrupted_by=bindparam("by_job"))
    .returning(jobs.c.id, jobs.c.attempt)
)
_UNHEARD = Outcome(CANCELLED, pack_log([encode(0, END, end_fields(CANCELLED))]))


def interrupt(connection: Connection, session_id: str, seq: int, by_job: str) -> str | None:
    """Cancel a session's unfinished turns before a place, for the job that comes after them.

    Those that have not begun end at once. Of the one that has, the cancel is on record; returns it.
    """
    found = connection.execute(_INTERRUPT, {"session": session_id, "seq": seq, "by_job": by_job})
    begun = None
    for row in found.all():
        if row.attempt or close_queued(connection, row.id, 0, _UNHEARD) is None:
            begun = row.id
    return begun


# ---------------------------------------------------------------- the jobs of a batch

_unfinished = and_(jobs.c.batch_id == bindparam("batch"), jobs.c.finished_ms.is_(None))
_CANCEL_BATCH = (
    update(jobs)
    .where(_unfinished, jobs.c.cancel_ms.is_(None))
    .values(cancel_ms=NOW)
    .returning(jobs.c.id, jobs.c.state)
)


def request_cancel_of_batch(connection: Connection, batch_id: str) -> list[str]:
    """Put a cancel on record for all unfinished jobs of a batch; returns those that run."""
    rows = connection.execute(_CANCEL_BATCH, {"batch": batch_id})
    return [row.id for row in rows if row.state == RUNNING]


CLOSE_AT_ONCE = 500


def _unstarted(must_end: ColumnElement[bool]) -> ColumnElement[bool]:
    some = (
        select(jobs.c.id)
        .where(_unfinished, state_is(QUEUED), jobs.c.attempt == 0, must_end)
        .limit(CLOSE_AT_ONCE)
    )
    # what changed since `some` looked must match as it is now
    return and_(jobs.c.id.in_(some), jobs.c.attempt == 0, must_end)


_CLOSE_UNSTARTED = {
    CANCELLED: _ending(_move(QUEUED, CANCELLED, _unstarted(jobs.c.cancel_ms.is_not(None)))),
    EXPIRED: _ending(_move(QUEUED, EXPIRED, _unstarted(jobs.c.deadline_ms <= NOW))),
}


def close_unstarted(connection: Connection, batch_id: str, outcome: Outcome) -> int:
    """End some of a batch's queued jobs that were cancelled or have expired; returns how many.

    Only jobs of which nothing has been streamed: `close_queued` ends the others one by one.
    """
    rows = connection.execute(
        _CLOSE_UNSTARTED[outcome.state], {"batch": batch_id, **_ending_values(outcome)}
    ).all()
    for row in rows:
        write_finish(connection, row, outcome)
    return len(rows)
