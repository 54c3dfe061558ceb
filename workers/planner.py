"""The batch planner: validates files, keeps a window of jobs planned, and ends what is done.

A habit of every worker process, safe in any number of copies: each step is one guarded
transaction (`backchannel.batches`), and a batch is left to the planner that looked last.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Coroutine, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
from sqlalchemy import Connection

from backchannel import (
    batch_lines,
    batches,
    books,
    bus,
    cancelling,
    closing,
    dispatch,
    events,
    files,
    idempotency,
)
from backchannel.batch_input import Fault, Head, check_lines, job_of_line, refusal, too_long
from backchannel.batch_lines import Refused
from backchannel.batch_output import page, pages
from backchannel.errors import BackchannelError, InvalidRequest, Unavailable
from backchannel.events import END, encode, end_fields
from backchannel.pubsub import OUTAGE
from backchannel.tables import (
    BATCH,
    CANCELLED,
    CANCELLING,
    COMPLETED,
    EXPIRED,
    IN_PROGRESS,
    VALIDATING,
)
from workers.caretaker import ring_due
from workers.heart import survive

if TYPE_CHECKING:
    from backchannel.accept import NewJob
    from workers.process import Process

log = structlog.get_logger()

LOOK_S = 0.5
BUSY_LOOK_S = 0.2  # while a batch is alive, so that short jobs do not wait for the window
FORGET_S = 60.0
WINDOW_PER_SLOT = 8  # jobs planned and not over: twice what is rung for, few to cancel
LEAST_WINDOW = 1_000
PLAN_AT_ONCE = 500  # lines of one transaction


def habits(process: Process) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
    """The planner's tasks, with their names."""
    yield "batch-planner", _tend_forever(process)
    yield "forgetting", _forget_forever(process)


async def _forget_forever(process: Process) -> None:
    while True:
        await asyncio.sleep(FORGET_S * random.uniform(0.75, 1.0))
        await survive("What nobody needs could not be removed.", lambda: _forget(process))


async def _forget(process: Process) -> None:
    await process.db.write(files.forget_expired)
    await process.db.write(idempotency.forget_free)
    while await process.db.write(batch_lines.forget_unbegun):
        pass


async def _tend_forever(process: Process) -> None:
    alive = False

    async def round_() -> None:
        nonlocal alive
        alive = await process.db.read(batches.any_live)
        while alive and not process.draining and await tend(process):
            pass

    while True:
        await asyncio.sleep((BUSY_LOOK_S if alive else LOOK_S) * random.uniform(0.75, 1.0))
        await survive("The batch planner could not go on; batches wait.", round_)


async def tend(process: Process) -> bool:
    """One step for each batch that is ours to tend; False: there was nothing to do."""
    moved = False
    for batch in await process.db.write(partial(batches.take, owner=process.owner)):
        try:
            moved |= await _step(process, batch)
        except Unavailable:
            raise
        except Exception:
            # a defect: the other batches must not wait for it
            log.exception("A batch could not be gone on with.", batch=batch.id)
    return moved


async def _step(process: Process, batch: Any) -> bool:
    if batch.status == VALIDATING:
        return await _validate(process, batch)
    if batch.status == IN_PROGRESS:
        return await _go_on(process, batch)
    return await _wind_down(process, batch, CANCELLED if batch.status == CANCELLING else EXPIRED)


# ---------------------------------------------------------------- validate


async def _validate(process: Process, batch: Any) -> bool:
    if batch.left_ms <= 0:
        return await process.db.write(partial(batches.expire_unchecked, batch_id=batch.id))
    if batch.parent_id is not None:
        copy = partial(
            batch_lines.copy_lines, batch_id=batch.id, parent_id=batch.parent_id, here=batch.checked
        )
        return await process.db.write(copy)

    def read(connection: Connection) -> tuple[files.Chunk | None, bool]:
        here = files.chunk(connection, batch.input_file_id, batch.checked)
        last = files.is_last(connection, batch.input_file_id, batch.checked)
        return here, last

    chunk, last = await process.db.read(read)
    heads, faults = await asyncio.to_thread(_look_at, chunk, last, batch.endpoint)
    done = await process.db.write(
        partial(
            batch_lines.add_lines,
            batch_id=batch.id, here=batch.checked, heads=heads, faults=faults, last=last,
        )
    )  # fmt: skip
    if done and last:
        log.info("A batch's file was read.", batch=batch.id)
    return done


def _look_at(
    chunk: files.Chunk | None, last: bool, endpoint: str
) -> tuple[list[Head], list[Fault]]:
    if chunk is None:
        return [], []
    if not last and chunk.is_torn():
        return [], [too_long(chunk.first_line + chunk.lines)]
    return check_lines(chunk.unpack(), chunk.first_line, endpoint)


# ---------------------------------------------------------------- plan


async def _go_on(process: Process, batch: Any) -> bool:
    done = batch.completed + batch.failed
    if done == batch.total or batch.left_ms <= 0:
        return await process.db.write(partial(batches.finalize, batch_id=batch.id))
    if batch.planned == batch.total:
        return False
    slots = await process.db.read(lambda c: dispatch.live_slots(c, process.settings.lease_s))
    window = max(LEAST_WINDOW, WINDOW_PER_SLOT * slots)
    room = min(PLAN_AT_ONCE, window - (batch.planned - done))
    if room < min(PLAN_AT_ONCE, window // 8):
        return False
    return await _plan(process, batch, room)


async def _plan(process: Process, batch: Any, room: int) -> bool:
    def read(connection: Connection) -> tuple[list[Head], files.Chunk | None]:
        heads = batch_lines.unplanned(connection, batch.id, batch.next_line, room)
        return heads, files.chunk_with(connection, batch.input_file_id, heads[0].line)

    heads, chunk = await process.db.read(read)
    await process.roster.refresh()
    assert chunk is not None, "a file is not deleted before its batch has ended"
    new, refused = await asyncio.to_thread(_jobs_of, process, batch, heads, chunk)
    last = heads[len(new) + len(refused) - 1].line
    planned = await process.db.write(
        partial(
            batch_lines.plan,
            batch_id=batch.id, here=batch.next_line, there=last + 1, new=new,
            refused=refused,
        )
    )  # fmt: skip
    if planned and new:
        with contextlib.suppress(*OUTAGE):  # the dispatcher rings when Redis is back
            await ring_due(process, BATCH)
    return planned


def _jobs_of(
    process: Process, batch: Any, heads: list[Head], chunk: files.Chunk
) -> tuple[list[NewJob], list[Refused]]:
    lines = chunk.unpack()
    new: list[NewJob] = []
    refused: list[Refused] = []
    for head in heads:
        place = head.line - chunk.first_line
        if place >= len(lines):
            break  # of the next chunk: the next step's
        try:
            raw = lines[place]
            new.append(job_of_line(batch, raw, head, process.registry))
        except InvalidRequest as error:
            refused.append(Refused(head.line, error.status, refusal(error)))
        except Exception:
            # a defect of ours: it costs this line, not the batch; the log has where, not what
            log.exception("A line of a batch could not be read.", batch=batch.id, line=head.line)
            refused.append(Refused(head.line, 500, BackchannelError("It cannot be read.").body()))
    return new, refused


# ---------------------------------------------------------------- cancel, expire, end


async def _wind_down(process: Process, batch: Any, state: str) -> bool:
    """End what is queued, wait for what runs, then end the batch."""
    if batch.planned > batch.completed + batch.failed:
        if state == CANCELLED:
            cancel = partial(cancelling.request_cancel_of_batch, batch_id=batch.id)
            for job_id in await process.db.write(cancel):
                await bus.hint_cancel(process.redis, process.settings.redis_prefix, job_id)
        close = partial(closing.close_unstarted, batch_id=batch.id, outcome=_outcome(state))
        return await process.db.write(close) > 0
    there = state
    if state == EXPIRED and not await process.db.read(lambda c: batches.has_expired(c, batch)):
        there = COMPLETED
    output, error = await asyncio.to_thread(_sizes, process, batch)
    ended = await process.db.write(
        partial(batches.end, batch_id=batch.id, there=there, output=output, error=error)
    )
    if ended:
        log.info(
            "A batch has ended.", batch=batch.id, status=there, lines=batch.total,
            completed=batch.completed,
        )  # fmt: skip
    return ended


def _outcome(state: str) -> books.Outcome:
    code, why = ("expired", "The job's deadline passed.") if state == EXPIRED else (None, None)
    end = end_fields(state, error_code=code, error_message=why)
    return books.Outcome(
        state=state,
        log=events.pack_log([encode(0, END, end)]),
        error_code=code,
        error_message=why,
    )


def _sizes(process: Process, batch: Any) -> tuple[int, int]:
    """How many bytes the output and the errors will have."""
    if batch.output_file_id is None:
        return 0, 0  # it never began, and has no files

    def size(kind: str) -> int:
        def read(after: int, room: int) -> Any:
            return process.db.read_now(lambda c: page(c, batch.id, kind, after, room, ending=True))

        return sum(len(found.data) for found in pages(read))

    return size(files.OUTPUT), size(files.ERROR)
