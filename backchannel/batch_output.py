"""The output and error files of a batch: rendered from its lines, in the order of finishing.

They can be read while the batch runs, and only ever grow. Lines that were never planned follow at
the end of the error file, in the order of the input: no row is written for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection, Select, and_, bindparam, select

from backchannel.batch_input import RESPONSES
from backchannel.chat_output import chat_usage, completion
from backchannel.errors import job_failed
from backchannel.events import end_fields
from backchannel.files import ERROR, OUTPUT
from backchannel.pieces import items_of_message
from backchannel.response_output import ending, head
from backchannel.schemas import SPENT, usage_of
from backchannel.tables import (
    CANCELLED,
    CANCELLING,
    EXPIRED,
    FAILED,
    SUCCEEDED,
    batch_lines,
    batches,
    jobs,
    requests,
    results,
    usage,
)

PAGE_BYTES = 1 << 20
FIRST_PAGE = 100  # lines; later pages are as long as the lines before allow
LONGEST_PAGE = 1_000

_encode = msgspec.json.Encoder().encode


class Page(NamedTuple):
    """Some lines of a file, and the place of the last one."""

    data: bytes
    lines: int
    last: int


def _lines(*more: Any) -> Select[Any]:
    return (
        select(
            batch_lines.c.line,
            batch_lines.c.custom_id,
            batch_lines.c.done_seq,
            batch_lines.c.error_status,
            batch_lines.c.error,
            jobs.c.id.label("job_id"),
            jobs.c.state,
            jobs.c.provider,
            jobs.c.model,
            jobs.c.created_ms,
            jobs.c.meta,
            jobs.c.finish_reason,
            jobs.c.error_code,
            jobs.c.error_message,
            results.c.message,
            *SPENT,
            *more,
        )
        .select_from(batch_lines)
        .outerjoin(jobs, jobs.c.id == batch_lines.c.job_id)
        .outerjoin(results, results.c.job_id == jobs.c.id)
        .outerjoin(usage, and_(usage.c.job_id == jobs.c.id, usage.c.billable))
        .where(
            batch_lines.c.batch_id == bindparam("batch"),
            batch_lines.c.ok == bindparam("is_ok"),
            batch_lines.c.done_seq > bindparam("after"),
        )
        .order_by(batch_lines.c.done_seq)
        .limit(bindparam("room"))
    )


_CHAT_LINES = _lines()
_RESPONSE_LINES = _lines(requests.c.asked).outerjoin(requests, requests.c.job_id == jobs.c.id)
_VOID_LINES = (
    select(batch_lines.c.line, batch_lines.c.custom_id)
    .where(batch_lines.c.batch_id == bindparam("batch"), batch_lines.c.line >= bindparam("from_"))
    .order_by(batch_lines.c.line)
    .limit(bindparam("room"))
)
_BATCH = batches.select().where(batches.c.id == bindparam("batch"))


def page(
    connection: Connection,
    batch_id: str,
    kind: str,
    after: int,
    room: int,
    *,
    numbered: bool = False,
    ending: bool = False,
) -> Page:
    """The next lines of a batch's file behind a place; an empty page is the end as it is now.

    Args:
        numbered: Give each line its place as ``seq``, for a reader that comes back for more.
        ending: Show the lines that were never planned, though the batch has not ended yet.
    """
    batch = connection.execute(_BATCH, {"batch": batch_id}).one()
    lines = _RESPONSE_LINES if batch.endpoint == RESPONSES else _CHAT_LINES
    rows = connection.execute(
        lines, {"batch": batch_id, "is_ok": kind == OUTPUT, "after": after, "room": room}
    ).all()
    data = [_record(batch, row, row.done_seq, numbered) for row in rows]
    last = rows[-1].done_seq if rows else after
    if not rows and kind == ERROR and (ending or batch.status in (CANCELLED, EXPIRED)):
        skipped = max(after - batch.last_seq, 0)
        void = connection.execute(
            _VOID_LINES,
            {"batch": batch_id, "from_": batch.next_line + skipped, "room": room},
        ).all()
        as_void = _void_writer(batch, numbered)
        for row in void:
            # behind all that finished; a line's distance to the first unplanned one is its place
            last = batch.last_seq + 1 + row.line - batch.next_line
            data.append(as_void(row.line, row.custom_id, last))
    return Page(b"".join(data), len(data), last)


def pages(
    read: Callable[[int, int], Page],
) -> Iterator[Page]:
    """All pages from the start, each about `PAGE_BYTES` long.

    Args:
        read: `page` of one file, given a place and the most lines to return.
    """
    after, room = 0, FIRST_PAGE
    while (found := read(after, room)).lines:
        yield found
        after, room = found.last, next_room(found)


def next_room(found: Page) -> int:
    """How many lines like these make a page."""
    return max(1, min(LONGEST_PAGE, PAGE_BYTES * found.lines // len(found.data)))


def _record(batch: Any, row: Any, seq: int, numbered: bool) -> bytes:
    if row.job_id is None:
        return _line(batch, row, seq, numbered, (row.error_status, row.error), None)
    if row.state in (CANCELLED, EXPIRED):
        return _line(batch, row, seq, numbered, None, _ended(row.state) | _paid(row))
    if row.state == FAILED:
        return _line(batch, row, seq, numbered, failure(row), None)
    return _line(batch, row, seq, numbered, (200, answer(batch.endpoint, row)), None)


def answer(endpoint: str, row: Any) -> dict[str, Any]:
    """The body that answers a line: what a GET of a job like this one gives."""
    job_id, created_s, model = row.job_id, row.created_ms // 1000, f"{row.provider}:{row.model}"
    if endpoint == RESPONSES:
        end = end_fields(SUCCEEDED, row.finish_reason, _spent(row))
        begun = head(job_id, created_s, model, row.meta, None, row.asked or {})
        return begun | ending(job_id, items_of_message(row.message), end)
    return completion(
        job_id, created_s, model, row.message, row.finish_reason, _spent(row), row.meta
    )


def failure(row: Any) -> tuple[int, dict[str, Any]]:
    """The HTTP status and body that stand for a job that failed."""
    error = job_failed(row.job_id, FAILED, {"code": row.error_code, "message": row.error_message})
    body = error.body()
    if row.source is not None:  # it was called, and may have to be paid
        body["usage"] = chat_usage(_spent(row))
    return error.status, body


def _paid(row: Any) -> dict[str, Any]:
    """What is kept of a line that was ended while it ran."""
    if row.source is None:
        return {}
    return {"usage": chat_usage(_spent(row)), "kept": f"/v1/jobs/{row.job_id}"}


def _spent(row: Any) -> dict[str, Any] | None:
    spent = usage_of(row)
    return None if spent is None else spent.model_dump()


def _void_writer(batch: Any, numbered: bool) -> Callable[[int, str, int], bytes]:
    """Writes lines that were never planned: there may be a million, and they differ in little."""
    state = CANCELLED if batch.status in (CANCELLING, CANCELLED) else EXPIRED
    head = b'{"id":"batch_req_%s_' % batch.id.partition("_")[2].encode()
    rest = _encode({"response": None, "error": _ended(state)})[1:-1]

    def write(line: int, custom_id: str, seq: int) -> bytes:
        place = b',"seq":%d' % seq if numbered else b""
        return b'%s%d","custom_id":%s,%s%s}\n' % (head, line, _encode(custom_id), rest, place)

    return write


def _ended(state: str) -> dict[str, Any]:
    if state == CANCELLED:
        return {
            "code": "batch_cancelled",
            "message": "The batch was cancelled before this line had its answer.",
        }
    return {
        "code": "batch_expired",
        "message": "The completion window was over before this line had its answer.",
    }


def _line(
    batch: Any,
    row: Any,
    seq: int,
    numbered: bool,
    response: tuple[int, dict[str, Any]] | None,
    error: dict[str, Any] | None,
) -> bytes:
    record: dict[str, Any] = {
        "id": f"batch_req_{batch.id.partition('_')[2]}_{row.line}",
        "custom_id": row.custom_id,
        "response": None,
        "error": error,
    }
    if response is not None:
        status, body = response
        request_id = getattr(row, "job_id", None) or record["id"]
        record["response"] = {"status_code": status, "request_id": request_id, "body": body}
    if numbered:
        record["seq"] = seq
    return _encode(record) + b"\n"
