"""The guarded transitions of a batch: each is one transaction, and the only way its row changes.

A planner's step names the place it starts from (``checked``, ``next_line``, ``status``) and does
nothing where that has moved on: two planners at the same batch do each step once. The counts of
finished lines are written with their jobs' finish: `counts.count`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import (
    Connection,
    Insert,
    Update,
    and_,
    bindparam,
    case,
    delete,
    exists,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from backchannel.accept import NewJob, accept_many
from backchannel.batch_input import EMPTY, MAX_FAULTS, Fault, Head, duplicate
from backchannel.db import at_end, now_ms
from backchannel.errors import Conflict, key_mismatch
from backchannel.files import ERROR, OUTPUT, PROCESSED
from backchannel.lifecycle import new_id
from backchannel.notices import End, tell
from backchannel.tables import (
    BATCH_FOLLOWS,
    BATCH_TERMINAL,
    CANCELLED,
    CANCELLING,
    COMPLETED,
    EXPIRED,
    FAILED,
    FINALIZING,
    IN_PROGRESS,
    VALIDATING,
    batch_lines,
    batches,
    files,
    jobs,
)

NOW = now_ms()


def new_file_id() -> str:
    """A time-ordered id as OpenAI spells those of files."""
    return new_id("file").replace("_", "-")


_its_row = batches.c.id == bindparam("batch")
_its_line = and_(
    batch_lines.c.batch_id == bindparam("batch"), batch_lines.c.line == bindparam("its")
)


def _turn(here: str, there: str) -> Update:
    """The one statement that changes a batch's status; it asks the table of states."""
    if there not in BATCH_FOLLOWS[here]:
        raise AssertionError(f"{there} does not follow {here}")
    return (
        update(batches)
        .where(_its_row, batches.c.status == here)
        .values(
            status=there,
            **{f"{there}_ms": NOW},
            **({"ended_ms": NOW} if there in BATCH_TERMINAL else {}),
        )
    )


# ---------------------------------------------------------------- create


@dataclass(frozen=True, slots=True)
class NewBatch:
    """What the API accepted and checked."""

    caller: str
    endpoint: str
    input_file_id: str
    completion_window: str
    window_s: int
    request_hash: str
    meta: dict[str, str] | None = None
    idempotency_key: str | None = None
    parent_id: str | None = None
    models: Sequence[str] | None = None


_COUNTERS = (
    "input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "cost_nanousd",
    "tended_ms",
)  # fmt: skip
_KNOWN_KEY = batches.select().where(
    batches.c.caller == bindparam("who"), batches.c.idempotency_key == bindparam("key")
)


def create(connection: Connection, new: NewBatch) -> tuple[str, bool]:
    """Write a batch; its id, and whether this call made it.

    Raises:
        Conflict: The idempotency key was used for another request.
    """
    batch_id = new_id("batch")
    values: dict[str, Any] = {
        "id": batch_id,
        "caller": new.caller,
        "idempotency_key": new.idempotency_key,
        "request_hash": new.request_hash,
        "endpoint": new.endpoint,
        "completion_window": new.completion_window,
        "input_file_id": new.input_file_id,
        "parent_id": new.parent_id,
        "models": None if new.models is None else list(new.models),
        "meta": new.meta,
        "status": VALIDATING,
        "created_ms": NOW,
        "expires_ms": NOW + new.window_s * 1000,
        "faults": [],
        **dict.fromkeys(_COUNTERS, 0),
        **dict.fromkeys(("total", "completed", "failed", "checked", "planned", "last_seq"), 0),
        **dict.fromkeys(("faults_count", "unknown_tokens", "unknown_price"), 0),
        "next_line": 1,
    }
    make = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = make(batches).values(values).on_conflict_do_nothing().returning(batches.c.id)
    if connection.execute(statement).first() is not None:
        return batch_id, True
    known = connection.execute(_KNOWN_KEY, {"who": new.caller, "key": new.idempotency_key}).one()
    if known.request_hash != new.request_hash:
        raise key_mismatch()
    return str(known.id), False


_OWN = batches.select().where(_its_row, batches.c.caller == bindparam("who"))


def find(connection: Connection, batch_id: str, caller: str) -> Any:
    """A caller's batch, or None."""
    return connection.execute(_OWN, {"batch": batch_id, "who": caller}).first()


# ---------------------------------------------------------------- a planner takes them

TENDED_MS = 5_000  # for this long a batch is left to the planner that looked last

_ANY_LIVE = select(exists().where(batches.c.ended_ms.is_(None)))
_free = and_(
    batches.c.ended_ms.is_(None),
    or_(
        batches.c.tended_by.is_(None),
        batches.c.tended_by == bindparam("owner"),
        batches.c.tended_ms < NOW - TENDED_MS,
    ),
)
# in the order of their ids, and around what others hold: planners and finishes never deadlock
_some = select(batches.c.id).where(_free).order_by(batches.c.id).with_for_update(skip_locked=True)
_TAKE = (
    update(batches)
    .where(batches.c.id.in_(_some), _free)
    .values(tended_by=bindparam("owner"), tended_ms=NOW)
    .returning(batches, (batches.c.expires_ms - NOW).label("left_ms"))
)


def any_live(connection: Connection) -> bool:
    """Whether there is anything for a planner to do."""
    return bool(connection.execute(_ANY_LIVE).scalar())


def take(connection: Connection, owner: str) -> list[Any]:
    """The batches this planner tends for the next seconds, the oldest first.

    It saves work, it guards nothing: a planner that is slow may meet the next one.
    """
    return sorted(connection.execute(_TAKE, {"owner": owner}), key=lambda row: row.id)


# ---------------------------------------------------------------- validate

_CHECKED = (
    update(batches)
    .where(_its_row, batches.c.status == VALIDATING, batches.c.checked == bindparam("here"))
    .values(checked=bindparam("there"), total=batches.c.total + bindparam("more"))
    .returning(batches.c.caller, batches.c.total, batches.c.faults, batches.c.faults_count)
)
_line: dict[str, Any] = {
    name: bindparam(f"new_{name}") for name in ("batch_id", "line", "custom_id")
}
_NEW_LINES: dict[str, Insert] = {
    "sqlite": sqlite.insert(batch_lines).values(_line).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(batch_lines).values(_line).on_conflict_do_nothing(),
}
_FOUND_FAULTS = (
    update(batches)
    .where(_its_row)
    .values(total=bindparam("lines"), faults=bindparam("named"), faults_count=bindparam("how_many"))
)


def add_lines(
    connection: Connection,
    batch_id: str,
    here: int,
    heads: Sequence[Head],
    faults: Sequence[Fault],
    *,
    last: bool,
) -> bool:
    """The lines of the next chunk; after the last one the batch is in progress, or has failed.

    Returns whether this call did it.
    """
    row = connection.execute(
        _CHECKED, {"batch": batch_id, "here": here, "there": here + 1, "more": len(heads)}
    ).first()
    if row is None:
        return False
    found = [*faults, *_insert(connection, batch_id, heads)]
    lines = row.total - (len(found) - len(faults))
    if last and not lines and not found and not row.faults_count:
        found = [EMPTY]
    if found:
        room = MAX_FAULTS - len(row.faults)
        named = sorted(found, key=lambda fault: fault.line or 0)[:room]
        connection.execute(
            _FOUND_FAULTS,
            {
                "batch": batch_id,
                "lines": lines,
                "named": [*row.faults, *(fault._asdict() for fault in named)],
                "how_many": row.faults_count + len(found),
            },
        )
    if last:
        _conclude(connection, batch_id, row.caller, good=not (row.faults_count or found))
    return True


def _insert(connection: Connection, batch_id: str, heads: Sequence[Head]) -> list[Fault]:
    """Insert lines; those whose custom_id is there already come back as faults."""
    if not heads:
        return []
    connection.execute(
        _NEW_LINES[connection.dialect.name],
        [
            {"new_batch_id": batch_id, "new_line": head.line, "new_custom_id": head.custom_id}
            for head in heads
        ],
    )
    there = set(
        connection.execute(
            select(batch_lines.c.line).where(
                batch_lines.c.batch_id == batch_id,
                batch_lines.c.line.between(heads[0].line, heads[-1].line),
            )
        ).scalars()
    )
    return [duplicate(*head) for head in heads if head.line not in there]


_BEGIN = _turn(VALIDATING, IN_PROGRESS).values(
    output_file_id=bindparam("output"), error_file_id=bindparam("error")
)
_FAIL = _turn(VALIDATING, FAILED)


def _conclude(connection: Connection, batch_id: str, caller: str, *, good: bool) -> None:
    if not good:
        connection.execute(_FAIL, {"batch": batch_id})  # its lines: `forget_unbegun`
        at_end(connection, tell, End(caller, batch_id, f"batch.{FAILED}"))
        return
    ids = {OUTPUT: new_file_id(), ERROR: new_file_id()}
    connection.execute(_BEGIN, {"batch": batch_id, "output": ids[OUTPUT], "error": ids[ERROR]})
    connection.execute(
        insert(files).values(created_ms=NOW),
        [
            {
                "id": file_id,
                "caller": caller,
                "kind": kind,
                "purpose": "batch_output",
                "filename": f"{batch_id}_{kind}.jsonl",
                "status": PROCESSED,
                "bytes": 0,
                "batch_id": batch_id,
            }
            for kind, file_id in ids.items()
        ],
    )


AT_ONCE = 5_000  # lines of one statement: longer ones would hold up everybody's commits
_FORGOTTEN = (
    select(batch_lines.c.batch_id, batch_lines.c.line)
    .join(batches, batches.c.id == batch_lines.c.batch_id)
    .where(batches.c.ended_ms.is_not(None), batches.c.in_progress_ms.is_(None))
    .limit(AT_ONCE)
)


def forget_unbegun(connection: Connection) -> int:
    """Remove some lines of batches that never began; returns how many."""
    lines = connection.execute(_FORGOTTEN).all()
    if lines:
        connection.execute(
            delete(batch_lines).where(_its_line),
            [{"batch": batch_id, "its": line} for batch_id, line in lines],
        )
    return len(lines)


_parents = batch_lines.alias("parents")
_COPY_END = (
    select(_parents.c.line)
    .where(_parents.c.batch_id == bindparam("parent"), _parents.c.line > bindparam("here"))
    .order_by(_parents.c.line)
    .limit(AT_ONCE)
)
_FAILED_LINES = select(_parents.c.line, _parents.c.custom_id).where(
    _parents.c.batch_id == bindparam("parent"),
    _parents.c.line > bindparam("here"),
    _parents.c.line <= bindparam("there"),
    _parents.c.ok.is_not(True),  # NULL: never planned
)


def copy_lines(connection: Connection, batch_id: str, parent_id: str, here: int) -> bool:
    """The next failed lines of the batch that this one is a retry of."""
    seen = connection.execute(_COPY_END, {"parent": parent_id, "here": here}).scalars().all()
    there = seen[-1] if seen else here
    lines = connection.execute(
        _FAILED_LINES, {"parent": parent_id, "here": here, "there": there}
    ).all()
    row = connection.execute(
        _CHECKED, {"batch": batch_id, "here": here, "there": there, "more": len(lines)}
    ).first()
    if row is None:
        return False
    _insert(connection, batch_id, [Head(*line) for line in lines])
    if len(seen) < AT_ONCE:
        _conclude(connection, batch_id, row.caller, good=True)
    return True


_LATE_CHECK = _turn(VALIDATING, EXPIRED).values(total=0).returning(batches.c.caller)


def expire_unchecked(connection: Connection, batch_id: str) -> bool:
    """End a batch whose time was over before its file was read."""
    row = connection.execute(_LATE_CHECK, {"batch": batch_id}).first()
    if row is None:
        return False
    at_end(connection, tell, End(row.caller, batch_id, f"batch.{EXPIRED}"))
    return True


# ---------------------------------------------------------------- plan


class Refused(NamedTuple):
    """A line that cannot be a job: an HTTP status and an error body."""

    line: int
    status: int
    error: dict[str, Any]


_UNPLANNED = (
    select(batch_lines.c.line, batch_lines.c.custom_id)
    .where(batch_lines.c.batch_id == bindparam("batch"), batch_lines.c.line >= bindparam("here"))
    .order_by(batch_lines.c.line)
    .limit(bindparam("room"))
)


def unplanned(connection: Connection, batch_id: str, here: int, room: int) -> list[Head]:
    """The next lines that are not jobs yet."""
    rows = connection.execute(_UNPLANNED, {"batch": batch_id, "here": here, "room": room})
    return [Head(*row) for row in rows]


_PLANNED = (
    update(batches)
    .where(_its_row, batches.c.status == IN_PROGRESS, batches.c.next_line == bindparam("here"))
    .values(
        next_line=bindparam("there"),
        planned=batches.c.planned + bindparam("lines"),
        failed=batches.c.failed + bindparam("refused"),
        last_seq=batches.c.last_seq + bindparam("refused"),
    )
    .returning(batches.c.last_seq)
)
_IS_JOB = update(batch_lines).where(_its_line).values(job_id=bindparam("job"))
_IS_REFUSED = (
    update(batch_lines)
    .where(_its_line)
    .values(
        ok=False,
        done_seq=bindparam("seq"),
        error_status=bindparam("status"),
        error=bindparam("why"),
    )
)


def plan(
    connection: Connection,
    batch_id: str,
    here: int,
    there: int,
    new: Sequence[NewJob],
    refused: Sequence[Refused],
) -> bool:
    """Make jobs of the lines from `here` up to before `there`; False: somebody else has."""
    row = connection.execute(
        _PLANNED,
        {
            "batch": batch_id,
            "here": here,
            "there": there,
            "lines": len(new) + len(refused),
            "refused": len(refused),
        },
    ).first()
    if row is None:
        return False
    ids = [accepted.job_id for accepted in accept_many(connection, new)]
    if ids:
        connection.execute(
            _IS_JOB,
            [
                {"batch": batch_id, "its": job.line, "job": job_id}
                for job_id, job in zip(ids, new, strict=True)
            ],
        )
    if refused:
        first = row.last_seq - len(refused) + 1
        connection.execute(
            _IS_REFUSED,
            [
                {
                    "batch": batch_id,
                    "its": each.line,
                    "seq": first + number,
                    "status": each.status,
                    "why": each.error,
                }
                for number, each in enumerate(refused)
            ],
        )
    return True


# ---------------------------------------------------------------- cancel and end

_CANCEL = tuple(_turn(here, CANCELLING) for here in (VALIDATING, IN_PROGRESS))


def cancel(connection: Connection, batch_id: str, caller: str) -> Any:
    """Plan nothing more, and end what is queued or running; a planner does it.

    Returns the batch as it is then; None: there is none.

    Raises:
        Conflict: It is over, or as good as over.
    """
    row = find(connection, batch_id, caller)
    if row is None or row.status in (CANCELLING, CANCELLED):
        return row
    if not any(connection.execute(turn, {"batch": batch_id}).rowcount for turn in _CANCEL):
        raise Conflict(
            f"{batch_id} is {row.status}: there is nothing left to cancel.", code="not_cancellable"
        )
    return find(connection, batch_id, caller)


_all_planned_is_done = batches.c.planned == batches.c.completed + batches.c.failed
_FINALIZE = _turn(IN_PROGRESS, FINALIZING).where(
    (batches.c.total == batches.c.completed + batches.c.failed) | (batches.c.expires_ms <= NOW)
)


def finalize(connection: Connection, batch_id: str) -> bool:
    """Every line is done, or the time is over: nothing more is planned."""
    return connection.execute(_FINALIZE, {"batch": batch_id}).rowcount == 1


# Lines that were never planned have failed, too; but of a file that was not read to its end nobody
# knows how many it has: as at OpenAI such a batch has none, and no files.
_begun = batches.c.in_progress_ms.is_not(None)
_ends = {
    "failed": case((_begun, batches.c.total - batches.c.completed), else_=0),
    "total": case((_begun, batches.c.total), else_=0),
}
_END = {
    there: _turn(here, there)
    .where(_all_planned_is_done)
    .values(_ends)
    .returning(batches.c.caller)
    for here, there in (
        (FINALIZING, COMPLETED), (FINALIZING, EXPIRED), (CANCELLING, CANCELLED),
    )
}  # fmt: skip
_SIZE = (
    update(files)
    .where(files.c.batch_id == bindparam("batch"))
    .values(bytes=case((files.c.kind == OUTPUT, bindparam("output")), else_=bindparam("error")))
)


def end(connection: Connection, batch_id: str, there: str, output: int, error: int) -> bool:
    """The last step: from here on neither the batch nor its files change."""
    row = connection.execute(_END[there], {"batch": batch_id}).first()
    if row is None:
        return False
    connection.execute(_SIZE, {"batch": batch_id, "output": output, "error": error})
    at_end(connection, tell, End(row.caller, batch_id, f"batch.{there}"))
    return True


_HAS_EXPIRED = select(
    exists().where(
        batch_lines.c.batch_id == bindparam("batch"),
        batch_lines.c.ok.is_(False),
        batch_lines.c.done_seq > 0,
        jobs.c.id == batch_lines.c.job_id,
        jobs.c.state == EXPIRED,
    )
)


def has_expired(connection: Connection, row: Any) -> bool:
    """Whether a batch in `finalizing` left lines without an answer because its time was over."""
    if row.finalizing_ms < row.expires_ms:
        return False
    return row.planned < row.total or bool(
        connection.execute(_HAS_EXPIRED, {"batch": row.id}).scalar()
    )
