"""A planner's part, played by a test step by step: files, batches and the ends of their jobs."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import select

from backchannel import batch_lines, batches, files, ids, lifecycle
from backchannel.batch_input import check_lines, job_of_line, too_long
from backchannel.batch_output import page, pages
from backchannel.batches import NewBatch
from backchannel.db import Database, now_ms
from backchannel.files import Chunk, Cutter
from backchannel.registry import get_registry
from backchannel.tables import SUCCEEDED, jobs
from backchannel.tables import batch_lines as lines_table
from backchannel.tables import batches as table
from tests import makers

CHAT = "/v1/chat/completions"


def line(custom_id: Any, **changes: Any) -> bytes:
    """One line of a batch's file."""
    body = {"model": "echo", "messages": [{"role": "user", "content": f"Say {custom_id}."}]}
    value = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body, **changes}
    return json.dumps({name: each for name, each in value.items() if each is not None}).encode()


def upload(database: Database, *lines: bytes) -> str:
    """A file of these lines."""
    file_id, cutter = ids.new_file_id(), Cutter()
    database.write_now(lambda c: files.begin(c, file_id, "alice"))

    def put(chunk: Chunk | None) -> None:
        if chunk is not None:
            database.write_now(lambda c: files.put(c, file_id, chunk))

    for each in lines:
        if cutter.add(each + b"\n"):
            put(cutter.cut())
    put(cutter.rest())
    database.write_now(
        lambda c: files.complete(
            c, file_id, filename="in", size=cutter.bytes, purpose="batch", expires_in_s=None
        )
    )
    return file_id


def create(database: Database, file_id: str, **changes: Any) -> str:
    """A batch over a file."""
    usual: dict[str, Any] = {
        "caller": "alice",
        "endpoint": CHAT,
        "input_file_id": file_id,
        "completion_window": "24h",
        "window_s": 86_400,
        "request_hash": "hash",
    }
    return database.write_now(lambda c: batches.create(c, NewBatch(**usual | changes)))[0]


def row(database: Database, batch_id: str) -> Any:
    """A batch as its planner sees it."""
    left = (table.c.expires_ms - now_ms()).label("left_ms")
    statement = select(table, left).where(table.c.id == batch_id)
    return database.read_now(lambda c: c.execute(statement).one())


def validate_once(database: Database, batch: Any) -> bool:
    """Check the next chunk."""
    chunk = database.read_now(lambda c: files.chunk(c, batch.input_file_id, batch.checked))
    last = database.read_now(lambda c: files.is_last(c, batch.input_file_id, batch.checked))
    heads, faults = [], []
    if chunk is not None and not last and chunk.is_torn():
        faults = [too_long(chunk.first_line)]
    elif chunk is not None:
        heads, faults = check_lines(chunk.unpack(), chunk.first_line, batch.endpoint)
    return database.write_now(
        lambda c: batch_lines.add_lines(c, batch.id, batch.checked, heads, faults, last=last)
    )


def plan_once(database: Database, batch: Any, room: int = 10) -> bool:
    """Make jobs of the next lines of one chunk."""
    heads = database.read_now(lambda c: batch_lines.unplanned(c, batch.id, batch.next_line, room))
    chunk = database.read_now(lambda c: files.chunk_with(c, batch.input_file_id, heads[0].line))
    assert chunk is not None
    lines = chunk.unpack()
    heads = [head for head in heads if head.line - chunk.first_line < len(lines)]
    new = [
        job_of_line(batch, lines[head.line - chunk.first_line], head, get_registry())
        for head in heads
    ]
    there = heads[-1].line + 1
    return database.write_now(
        lambda c: batch_lines.plan(c, batch.id, batch.next_line, there, new, [])
    )


def validated(database: Database, *lines: bytes, **changes: Any) -> str:
    """A batch whose file was read."""
    batch_id = create(database, upload(database, *lines), **changes)
    while (batch := row(database, batch_id)).status == "validating":
        validate_once(database, batch)
    return batch_id


def planned(database: Database, *lines: bytes) -> str:
    """A batch whose lines are all jobs."""
    batch_id = validated(database, *lines)
    while (batch := row(database, batch_id)).planned < batch.total:
        assert plan_once(database, batch)
    return batch_id


def jobs_of(database: Database, batch_id: str) -> list[Any]:
    """A batch's jobs in the order of their lines."""
    statement = jobs.select().where(jobs.c.batch_id == batch_id).order_by(jobs.c.line)
    return list(database.read_now(lambda c: c.execute(statement).all()))


def lines_of(database: Database, batch_id: str) -> list[Any]:
    """A batch's lines."""
    statement = lines_table.select().where(lines_table.c.batch_id == batch_id)
    found = database.read_now(lambda c: c.execute(statement.order_by(lines_table.c.line)).all())
    return list(found)


def finish(database: Database, job_id: str, state: str = SUCCEEDED, **changes: Any) -> None:
    """One attempt that brings a job to its end."""
    claim = makers.calling(database, job_id)
    outcome = makers.outcome(state, **changes)
    assert database.write_now(lambda c: lifecycle.finish(c, claim, outcome))


def end(database: Database, batch_id: str, there: str = "completed") -> bool:
    """The last step."""
    return database.write_now(lambda c: batches.end(c, batch_id, there, 1, 2))


def content(database: Database, batch_id: str, kind: str, after: int = 0) -> list[dict[str, Any]]:
    """The lines of a batch's file."""
    lines: list[dict[str, Any]] = []
    for found in pages(
        lambda place, _room: database.read_now(
            lambda c: page(c, batch_id, kind, max(place, after), 2, numbered=True)
        )
    ):
        lines += [json.loads(each) for each in found.data.splitlines()]
    return lines
