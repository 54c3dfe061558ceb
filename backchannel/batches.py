"""The guarded transitions of a batch: each is one transaction, and `turn` alone changes its status.

What its lines do to it is in `batch_lines`; the counts of finished ones are written with their
jobs' finish: `counts.count`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Update, and_, bindparam, case, exists, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from backchannel.db import NOW
from backchannel.errors import Conflict, key_mismatch
from backchannel.files import OUTPUT
from backchannel.ids import new_id
from backchannel.notices import End, tell
from backchannel.tables import (
    BATCH_FOLLOWS,
    BATCH_TERMINAL,
    CANCELLED,
    CANCELLING,
    COMPLETED,
    EXPIRED,
    FINALIZING,
    IN_PROGRESS,
    VALIDATING,
    batch_lines,
    batches,
    files,
    jobs,
)
from backchannel.writer import at_end

its_row = batches.c.id == bindparam("batch")


def turn(here: str, there: str) -> Update:
    """The one statement that changes a batch's status; it asks the table of states."""
    if there not in BATCH_FOLLOWS[here]:
        raise AssertionError(f"{there} does not follow {here}")
    return (
        update(batches)
        .where(its_row, batches.c.status == here)
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


_OWN = batches.select().where(its_row, batches.c.caller == bindparam("who"))


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


# ---------------------------------------------------------------- cancel and end

_CANCEL = tuple(turn(here, CANCELLING) for here in (VALIDATING, IN_PROGRESS))


def cancel(connection: Connection, batch_id: str, caller: str) -> Any:
    """Plan nothing more, and end what is queued or running; a planner does it.

    Returns the batch as it is then; None: there is none.

    Raises:
        Conflict: It is over, or as good as over.
    """
    row = find(connection, batch_id, caller)
    if row is None or row.status in (CANCELLING, CANCELLED):
        return row
    if not any(connection.execute(step, {"batch": batch_id}).rowcount for step in _CANCEL):
        raise Conflict(
            f"{batch_id} is {row.status}: there is nothing left to cancel.", code="not_cancellable"
        )
    return find(connection, batch_id, caller)


_LATE_CHECK = turn(VALIDATING, EXPIRED).values(total=0).returning(batches.c.caller)


def expire_unchecked(connection: Connection, batch_id: str) -> bool:
    """End a batch whose time was over before its file was read."""
    row = connection.execute(_LATE_CHECK, {"batch": batch_id}).first()
    if row is None:
        return False
    at_end(connection, tell, End(row.caller, batch_id, f"batch.{EXPIRED}"))
    return True


_all_planned_is_done = batches.c.planned == batches.c.completed + batches.c.failed
_FINALIZE = turn(IN_PROGRESS, FINALIZING).where(
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
    there: turn(here, there)
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
