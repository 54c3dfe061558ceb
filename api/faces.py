"""What the faces share: a job by its public id, the wait for its end, its stream, its deletion."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Protocol

from fastapi import Header, Request
from sqlalchemy import Connection, bindparam
from sse_starlette import EventSourceResponse
from starlette.types import Message

from api.cancelling import cancelled
from api.deps import Resources
from api.jobs import PING_S, Ping, follow, until_finished
from backchannel.background import end
from backchannel.batch_input import LINE
from backchannel.errors import (
    BackchannelError,
    Conflict,
    JobFailed,
    NotFound,
    Unavailable,
    job_failed,
)
from backchannel.events import Event
from backchannel.forget import forget
from backchannel.schemas import JOB, Job, job_of
from backchannel.tables import TERMINAL, batches, jobs, requests

FAREWELL_S = 2.0  # what a stream has to say why it ends, when the process stops

# What a route answers that may stream, beside its JSON.
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}}
}

# A client that goes leaves its job running, unless it said otherwise.
LeavingCancels = Annotated[
    bool,
    Header(
        alias="x-backchannel-cancel-on-disconnect",
        description="true: whoever hangs up before the end does not want the answer any more.",
    ),
]


@dataclass(frozen=True)
class Face:
    """Another form of a job: the kind on its row, and the beginning of its public id."""

    kind: str
    prefix: str
    endpoint: str  # where it is asked; what a batch's lines name

    def id_of(self, job_id: str) -> str:
        """The public id; it has the job's own digits, so there is no second id to keep."""
        return self.prefix + job_id.removeprefix("job_")

    def job_id(self, public_id: str) -> str:
        """The job of a public id; whether there is one is for the database to say."""
        if not public_id.startswith(self.prefix):
            raise self.missing(public_id)
        return f"job_{public_id.removeprefix(self.prefix)}"

    def missing(self, public_id: str) -> NotFound:
        """Nothing of this kind has this id."""
        return NotFound(f"There is no {self.kind} '{public_id}'.", param="id")


class Found(NamedTuple):
    """A job as a face needs it."""

    job: Job
    created_s: int
    messages: list[dict[str, Any]]
    asked: dict[str, Any]
    of_batch: bool = False


# Everything `found_of` needs; add conditions.
FOUND = JOB.add_columns(requests.c.messages, requests.c.asked).join(
    requests, requests.c.job_id == jobs.c.id
)
_OWN = FOUND.where(jobs.c.id == bindparam("job"), jobs.c.caller == bindparam("who"))
_ONE = _OWN.where(jobs.c.kind == bindparam("face"))
_LINE = _OWN.join(batches, batches.c.id == jobs.c.batch_id).where(
    jobs.c.kind == LINE, batches.c.endpoint == bindparam("endpoint")
)


def found_of(row: Any) -> Found:
    """A row of `FOUND`."""
    own = Found(job_of(row), row.created_ms // 1000, row.messages, row.asked or {})
    return own._replace(of_batch=row.kind == LINE)


async def find(
    its: Resources, caller: str, face: Face, public_id: str, *, lines: bool = False
) -> Found:
    """The caller's job with this public id.

    Args:
        lines: Also the line of a batch that its output shows with this id. Those are only read:
            what changed or deleted one would change a file that its reader may rely on.

    Raises:
        NotFound: There is none, it is somebody else's, or it was asked through another face.
    """
    who = {"job": face.job_id(public_id), "who": caller}
    row = await its.db.read(lambda c: c.execute(_ONE, who | {"face": face.kind}).first())
    if row is None and lines:
        line = who | {"endpoint": face.endpoint}
        row = await its.db.read(lambda c: c.execute(_LINE, line).first())
    if row is None:
        raise face.missing(public_id)
    return found_of(row)


# ---------------------------------------------------------------- wait


async def finished(
    its: Resources, request: Request, caller: str, face: Face, job: Job, leaving_cancels: bool
) -> Found:
    """The job once it has finished, however it ended.

    Raises:
        Unavailable: This process stops, or the client left, before the end; the job goes on.
    """
    if job.state not in TERMINAL:
        await until_finished(its, job.id, or_until=gone(request))
    found = await find(its, caller, face, face.id_of(job.id), lines=True)
    if found.job.state not in TERMINAL:
        if leaving_cancels and not its.stopping.is_set():
            await cancelled(its, caller, job.id)
        raise _unfinished(job.id)
    return found


async def gone(request: Request) -> None:
    """Return when the client has hung up; for a request whose body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _unfinished(job_id: str) -> Unavailable:
    error = Unavailable(
        f"This API process stops; the job goes on. Its answer will be at /v1/jobs/{job_id}.",
        code="api_stopping",
    )
    # to send the request again without an Idempotency-Key would be to pay twice
    error.headers = {"x-should-retry": "false", "x-backchannel-job": job_id}
    return error


def unfinished(public_id: str, job: Job, why: str) -> Conflict:
    """What was asked for needs the end of the job."""
    return Conflict(f"{public_id} is {job.state}: {why}.", code="not_finished")


def failure_of(job: Job) -> JobFailed:
    """The error of a job that did not succeed."""
    return job_failed(job.id, job.state, None if job.error is None else job.error.model_dump())


# ---------------------------------------------------------------- stream


class Translator(Protocol):
    """Says a job's events in a face's form."""

    over: bool  # nothing more is to be said, though the job may go on

    def take(self, event: Event | BackchannelError) -> list[bytes]:
        """The frames of an event; of an error, where this process cannot go on."""


def stream(
    its: Resources,
    caller: str,
    job_id: str,
    translator: Translator,
    *,
    first: list[bytes] | None = None,
    leaving_cancels: bool = False,
    headers: Mapping[str, str] | None = None,
) -> EventSourceResponse:
    """A job's events in a face's form, from the first one, live up to its end."""

    async def left(_: Message) -> None:
        if leaving_cancels:
            await cancelled(its, caller, job_id)

    async def frames() -> AsyncIterator[bytes]:
        for frame in first or ():
            yield frame
        async with contextlib.aclosing(_told(its, job_id)) as said:
            async for some in said:
                if frame := b"".join(_frames(translator, some)):
                    yield frame
                if translator.over:
                    return

    return EventSourceResponse(
        frames(),
        headers={**(headers or {}), "x-backchannel-job": job_id},
        sep="\n",
        ping=PING_S,
        ping_message_factory=Ping,
        client_close_handler_callable=left,
        shutdown_event=its.stopping,  # type: ignore[arg-type]  # an event is an event
        shutdown_grace_period=FAREWELL_S,
    )


def _frames(translator: Translator, said: Sequence[Event | BackchannelError]) -> Iterator[bytes]:
    for each in said:
        yield from translator.take(each)
        if translator.over:
            return


async def _told(its: Resources, job_id: str) -> AsyncGenerator[Sequence[Event | BackchannelError]]:
    """The events; an error instead of the rest when this process stops before the end.

    To the SDKs a stream that just ends is a success.
    """
    stopping = asyncio.create_task(its.stopping.wait(), name="stream-until-stop")
    following = follow(its, job_id)
    try:
        while True:
            step = asyncio.ensure_future(_next(following))
            try:
                await asyncio.wait({step, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if not step.done():
                    yield [_unfinished(job_id)]
                    return
            finally:
                await end(step)
            if not (some := step.result()):
                return
            yield some
    finally:
        await end(stopping)
        await following.aclose()  # type: ignore[attr-defined]


async def _next(following: AsyncIterator[list[Event]]) -> list[Event]:
    return await anext(following, [])


# ---------------------------------------------------------------- delete


async def delete(its: Resources, caller: str, face: Face, public_id: str) -> None:
    """Forget what a finished job asked and answered.

    Raises:
        NotFound: As in `find`.
        Conflict: It has not finished.
    """
    found = await find(its, caller, face, public_id)
    if found.job.state not in TERMINAL:
        raise unfinished(public_id, found.job, "cancel it before you delete it")

    def write(connection: Connection) -> None:
        forget(connection, found.job.id)

    await its.db.write(write)
