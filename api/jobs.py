"""Jobs: a POST becomes a row and a doorbell; the row and its events come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, BackgroundTasks, Header, Query, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, and_, bindparam, select
from sse_starlette import EventSourceResponse, ServerSentEvent

from api.cancelling import cancel, cancelled
from api.deps import Caller, IdempotencyKey, Resources, Shared, StrictRoute
from api.pages import behind, following
from api.requests import checked, request_hash
from backchannel import bus
from backchannel.accept import Accepted, NewJob, accept, accept_many
from backchannel.background import end
from backchannel.choice import Choice, choose
from backchannel.errors import Conflict, NotFound, Unavailable
from backchannel.events import END, Event, decode, unpack_log
from backchannel.pubsub import RollCall
from backchannel.registry import Registry
from backchannel.schemas import JOB, CreateJob, Job, JobList, Moment, job_of
from backchannel.tables import QUEUED, TERMINAL, jobs, requests, results
from backchannel.tiers import rule_of

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=StrictRoute)

_own = and_(jobs.c.id == bindparam("job"), jobs.c.caller == bindparam("who"))
# Made once: to put a statement together costs more than to run it.
_ONE = JOB.where(_own)
_ASKED = (
    select(
        jobs,
        requests.c.instructions,
        requests.c.messages,
        requests.c.parameters,
        requests.c.asked,
    )
    .join(requests, requests.c.job_id == jobs.c.id)
    .where(_own)
)
_STATE = select(jobs.c.state).where(jobs.c.id == bindparam("job"))
_LOG = select(results.c.log).where(results.c.job_id == bindparam("job"))

PING_S = 10  # below the 15 to 60 s after which proxies give up on a silent stream


# ---------------------------------------------------------------- create


@router.post("", status_code=202)
async def create_job(
    asked: CreateJob, its: Shared, caller: Caller, response: Response, key: IdempotencyKey = None
) -> Job:
    """Accept a chat job; it is safe once this answers."""
    return await submit(its, await checked(its, caller, asked, asked.chat(), key), response)


async def submit(
    its: Resources,
    new: NewJob,
    response: Response,
    enter: Callable[[Connection, NewJob], Accepted] = accept,
) -> Job:
    """Commit a job, ring for it, and say where it is; `enter` may do more in its transaction."""

    def write(connection: Connection) -> tuple[Accepted, Job]:
        accepted = enter(connection, new)
        return accepted, _read(connection, new.caller, accepted.job_id)

    if enter is accept and new.session_id is None and new.idempotency_key is None:
        accepted = await its.db.write_together(accept_many, new)
        job = _as_written(new, accepted)
    else:
        accepted, job = await its.db.write(write)
    its.ringer.ring(accepted.doorbell)
    if accepted.interrupted is not None:
        its.later(cancelled(its, new.caller, accepted.interrupted))
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    if not accepted.created:
        response.headers["Idempotent-Replay"] = "true"
    return job


def _as_written(new: NewJob, accepted: Accepted) -> Job:
    """A job that was written a moment ago: to read it back costs as much as to write it."""
    at = accepted.created_ms
    row = SimpleNamespace(
        **_NOT_YET,
        **{name: getattr(new, name) for name in _SAME},
        id=accepted.job_id,
        created_ms=at,
        run_ms=at,
        deadline_ms=at + int(new.deadline_s * 1000),
    )
    return job_of(row)


_SAME = (
    "lane", "provider", "model", "requested_model", "model_reason", "session_id", "parent_id",
    "meta", "stream", "fallbacks",
)  # fmt: skip
_NOT_YET: dict[str, Any] = {
    "state": QUEUED,
    **dict.fromkeys(("attempt", "retries", "crashes"), 0),
    **dict.fromkeys(("started_ms", "finished_ms", "cancel_ms", "finish_reason", "message")),
    **dict.fromkeys(("error_code", "error_message", "source")),
    **dict.fromkeys(("fallback_from", "interrupted_by", "turns_dropped")),
}


@router.post("/{job_id}/retry", status_code=202)
async def retry_job(
    job_id: str, its: Shared, caller: Caller, response: Response, key: IdempotencyKey = None
) -> Job:
    """Ask the same again, as a new job with `parent_id`."""

    row = await its.db.read(lambda c: c.execute(_ASKED, {"job": job_id, "who": caller}).first())
    if row is None:
        raise _no_job(job_id)
    if row.state not in TERMINAL:
        raise Conflict(f"Job {job_id} is {row.state}: it has not finished.", code="not_finished")
    if not row.messages:
        raise Conflict(f"Job {job_id} was deleted: nobody knows what it asked.", code="deleted")
    first = row.fallback_from or f"{row.provider}:{row.model}"

    def choose_for(name: str, registry: Registry) -> Choice:
        return choose(
            registry,
            name,
            row.messages,
            row.parameters,
            row.fallbacks,
            force=True,
            allowed=caller.models,
        )

    choice = await its.roster.answer((first, *(row.fallbacks or ())), partial(choose_for, first))
    refit = None
    if row.session_id is not None and row.requested_model is None:
        refit = partial(choose_for, registry=its.registry)
    new = NewJob(
        caller=caller,
        lane=row.lane,
        provider=choice.resolved.provider.id,
        model=choice.resolved.model,
        fallbacks=choice.fallbacks,
        model_rule=row.requested_model and rule_of(row.requested_model),
        requested_model=row.requested_model,
        model_reason=f"as job {job_id}",
        kind=row.kind,
        instructions=row.instructions,
        asked=row.asked,
        messages=row.messages,
        parameters=choice.parameters,
        request_hash=request_hash({"retry": job_id}),
        deadline_s=(row.deadline_ms - row.created_ms) / 1000,
        stream=row.stream,
        idempotency_key=key,
        session_id=row.session_id,
        parent_id=job_id,
        meta=row.meta,
        refit=refit,
        ring=its.ringer.open,
    )
    return await submit(its, new, response)


# ---------------------------------------------------------------- read


class JobsQuery(BaseModel):
    """Which jobs to list."""

    model_config = ConfigDict(extra="forbid")

    state: Literal["queued", "running", "succeeded", "failed", "cancelled", "expired"] | None = None
    lane: Literal["interactive", "batch"] | None = None
    model: str | None = Field(None, description="provider:model, or the model's name alone.")
    provider: str | None = None
    session: str | None = None
    created_after: Moment | None = Field(None, description="RFC 3339, with its zone.")
    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, description="The `next` of the page before.")
    order: Literal["desc", "asc"] = "desc"


@router.get("")
async def list_jobs(asked: Annotated[JobsQuery, Query()], its: Shared, caller: Caller) -> JobList:
    """A page of jobs, the newest first."""
    full_name = jobs.c.provider + ":" + jobs.c.model
    wanted = [jobs.c.caller == caller]
    if asked.state is not None:
        wanted.append(jobs.c.state == asked.state)
    if asked.lane is not None:
        wanted.append(jobs.c.lane == asked.lane)
    if asked.model is not None:
        wanted.append((full_name == asked.model) | (jobs.c.model == asked.model))
    if asked.provider is not None:
        wanted.append(jobs.c.provider == asked.provider)
    if asked.session is not None:
        wanted.append(jobs.c.session_id == asked.session)
    if asked.created_after is not None:
        wanted.append(jobs.c.created_ms > asked.created_after)
    newest_first = asked.order == "desc"
    page = behind(
        JOB.where(*wanted), jobs.c.id, asked.after, asked.limit, newest_first=newest_first
    )
    found = await its.db.read(lambda c: [job_of(row) for row in c.execute(page)])
    return JobList(**following(found, asked.limit))


@router.get("/{job_id}")
async def get_job(
    job_id: str,
    its: Shared,
    caller: Caller,
    wait: Annotated[
        float, Query(ge=0, le=60, description="Seconds to wait for the job to finish.")
    ] = 0,
) -> Job:
    """A job as it stands; with `wait`, as soon as it has finished."""
    job = await read_job(its, caller, job_id)
    if wait and job.state not in TERMINAL:
        await until_finished(its, job_id, wait)
        job = await read_job(its, caller, job_id)
    return job


async def read_job(its: Resources, caller: str, job_id: str) -> Job:
    """The caller's job.

    Raises:
        NotFound: There is none, or it is somebody else's.
    """
    return await its.db.read(lambda c: _read(c, caller, job_id))


def _read(connection: Connection, caller: str, job_id: str) -> Job:
    row = connection.execute(_ONE, {"job": job_id, "who": caller}).first()
    if row is None:
        raise _no_job(job_id)
    return job_of(row)


def _no_job(job_id: str) -> NotFound:
    return NotFound(f"There is no job '{job_id}'.")


async def until_finished(
    its: Resources,
    job_id: str,
    wait_s: float | None = None,
    or_until: Coroutine[Any, Any, Any] | None = None,
) -> None:
    """Return when the job has finished, the time is over, this process stops, or `or_until` is."""
    tasks = {
        asyncio.create_task(_finished(its, job_id), name=f"wait-for-{job_id}"),
        asyncio.create_task(its.stopping.wait(), name="wait-for-stop"),
    }
    if or_until is not None:
        tasks.add(asyncio.create_task(or_until, name=f"wait-beside-{job_id}"))
    try:
        await asyncio.wait(tasks, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            await end(task)


async def _finished(its: Resources, job_id: str) -> None:
    async with its.listener.subscribed(bus.keys_of(its.prefix, job_id).stream) as queue:
        roll_call = RollCall(queue)
        while (
            await its.db.read(lambda c: c.execute(_STATE, {"job": job_id}).scalar()) not in TERMINAL
        ):
            while (said := await roll_call.heard()) and not any(map(_ends, said)):
                pass


def _ends(message: bytes) -> bool:
    return bool(message) and decode(message.rpartition(b"\n")[2]).type == END


# ---------------------------------------------------------------- cancel


@router.post("/{job_id}/cancel")
async def cancel_job(job_id: str, its: Shared, caller: Caller, afterwards: BackgroundTasks) -> Job:
    """Cancel: a queued job at once, a running one within moments; a finished one stays as it is."""
    await cancel(its, caller, job_id, afterwards)
    return await read_job(its, caller, job_id)


# ---------------------------------------------------------------- events


class Ping(ServerSentEvent):
    """What keeps a quiet stream open."""

    def encode(self) -> bytes:
        # without the blank line: after an `id:` line that would be an empty event to OpenAI's SDK
        return b": ping\n"


@router.get("/{job_id}/events", response_class=EventSourceResponse)
async def stream_events(
    job_id: str,
    its: Shared,
    caller: Caller,
    after: Annotated[int, Query(ge=-1, le=2**53, description="The last `seq` you have.")] = -1,
    last_event_id: Annotated[str | None, Header(pattern=r"^(-1|\d{1,15})$")] = None,
) -> EventSourceResponse:
    """The job's events, past and live, as server-sent events up to `end`."""
    await read_job(its, caller, job_id)
    if last_event_id is not None:  # a browser that reconnects repeats the old query beside it
        after = int(last_event_id)
    return EventSourceResponse(
        _frames(its, job_id, after), sep="\n", ping=PING_S, ping_message_factory=Ping
    )


async def _frames(its: Resources, job_id: str, after: int) -> AsyncIterator[bytes]:
    async for events in follow(its, job_id, after):
        yield b"".join(
            b"id: %d\nevent: %s\ndata: %s\n\n" % (event.seq, event.type.encode(), event.data)
            for event in events
        )


def follow(its: Resources, job_id: str, after: int = -1) -> AsyncIterator[list[Event]]:
    """A job's events numbered above `after`, past and live, up to its end; see `bus.follow`."""

    async def stored(job_id: str) -> list[Event] | None:
        return await stored_log(its, job_id)

    return bus.follow(its.redis, its.prefix, its.listener, stored, job_id, after)


async def stored_log(its: Resources, job_id: str) -> list[Event] | None:
    """The whole stream of a finished job; None: it runs, or the database does not answer."""

    def read(connection: Connection) -> list[Event] | None:
        packed = connection.execute(_LOG, {"job": job_id}).scalar()
        return None if packed is None else unpack_log(packed)

    try:
        return await its.db.read(read)
    except Unavailable:
        return None  # the stream goes on; the next look may find the database back
