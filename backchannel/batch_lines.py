"""A batch's lines: checked chunk by chunk, then made jobs a window at a time.

A planner's step names the place it starts from (``checked``, ``next_line``, ``status``) and does
nothing where that has moved on: two planners at the same batch do each step once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Insert, and_, bindparam, delete, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from backchannel.accept import NewJob, accept_many
from backchannel.batch_input import EMPTY, MAX_FAULTS, Fault, Head, duplicate
from backchannel.batches import its_row, turn
from backchannel.db import NOW
from backchannel.files import ERROR, OUTPUT, PROCESSED
from backchannel.ids import new_file_id
from backchannel.notices import End, tell
from backchannel.tables import FAILED, IN_PROGRESS, VALIDATING, batch_lines, batches, files
from backchannel.writer import at_end

_its_line = and_(
    batch_lines.c.batch_id == bindparam("batch"), batch_lines.c.line == bindparam("its")
)

# ---------------------------------------------------------------- validate

_CHECKED = (
    update(batches)
    .where(its_row, batches.c.status == VALIDATING, batches.c.checked == bindparam("here"))
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
    .where(its_row)
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


_BEGIN = turn(VALIDATING, IN_PROGRESS).values(
    output_file_id=bindparam("output"), error_file_id=bindparam("error")
)
_FAIL = turn(VALIDATING, FAILED)


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
    .where(its_row, batches.c.status == IN_PROGRESS, batches.c.next_line == bindparam("here"))
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
