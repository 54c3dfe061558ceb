"""Responses: OpenAI's other form of a job, in the background too, and followed by one another."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from api.cancelling import cancelled
from api.chat import cut
from api.deps import Caller, IdempotencyKey, Resources, Shared, StrictRoute
from api.faces import (
    STREAMED,
    Face,
    Found,
    LeavingCancels,
    delete,
    failure_of,
    find,
    finished,
    stream,
)
from api.jobs import stored_log, submit, until_finished
from api.requests import checked
from api.response_events import ResponseEvents, finished_response
from api.response_sessions import entering
from backchannel.accept import accept
from backchannel.errors import Conflict, InvalidRequest, NotFound, Unavailable, naming
from backchannel.pieces import items_of_message
from backchannel.response_input import CreateResponse, items_of
from backchannel.response_output import PREFIX, ending, head
from backchannel.schemas import Job
from backchannel.tables import EXPIRED, FAILED, TERMINAL

router = APIRouter(prefix="/v1/responses", tags=["responses"], route_class=StrictRoute)

RESPONSE = Face("response", PREFIX, router.prefix)
CANCEL_S = 5.0  # a running job ends within moments; a client would rather see it cancelled


# ---------------------------------------------------------------- create


@router.post("", response_model=None, responses=STREAMED)
async def create_response(
    asked: CreateResponse,
    request: Request,
    its: Shared,
    caller: Caller,
    response: Response,
    key: IdempotencyKey = None,
    leaving_cancels: LeavingCancels = False,
) -> Response | dict[str, Any]:
    """Make a response: wait for it, stream it, or leave it to the background."""
    previous = await _previous(its, caller, asked)
    order = asked.order()
    if previous is not None:
        order.session = previous.job.session
    sent = asked.model_dump(exclude_unset=True)
    with naming(asked.NAMES):
        new = await checked(
            its, caller, order, asked.chat(), key, face=(RESPONSE.kind, sent), keep=True
        )
    in_session = asked.x_backchannel.session is None and (asked.store or previous is not None)
    enter = entering(previous, apart=not asked.store) if in_session else accept
    job = await submit(its, new, response, enter)
    found = await find(its, caller, RESPONSE, RESPONSE.id_of(job.id))
    if asked.stream:
        return _stream(
            its, caller, found, leaving_cancels=leaving_cancels, headers=response.headers
        )
    if not asked.background:
        found = await finished(its, request, caller, RESPONSE, job, leaving_cancels)
        if found.job.state in (FAILED, EXPIRED):
            raise failure_of(found.job)
    place = f"{router.prefix}/{RESPONSE.id_of(job.id)}"
    response.headers.update({"x-backchannel-job": job.id, "Location": place})
    return await _shown(its, found)


async def _previous(its: Resources, caller: str, asked: CreateResponse) -> Found | None:
    """The response that is followed."""
    previous_id = asked.previous_response_id
    if previous_id is None:
        return None
    if asked.x_backchannel.session is not None:
        raise InvalidRequest(
            "previous_response_id: give it or x_backchannel.session, not both.",
            param="previous_response_id",
        )
    try:
        found = await find(its, caller, RESPONSE, previous_id)
    except NotFound:
        found = None
    if found is None or found.job.session is None or not found.asked.get("store", True):
        why = "there is none" if found is None else "it was not stored"
        raise NotFound(
            f"Response '{previous_id}' cannot be followed: {why}.",
            code="previous_response_not_found",
            param="previous_response_id",
        )
    return found


# ---------------------------------------------------------------- as it stands


def _head(found: Found) -> dict[str, Any]:
    job = found.job
    first = job.fallback_from or job.model  # a stream begins with it, also when it is told again
    return head(job.id, found.created_s, first, job.metadata, job.session, found.asked)


async def _shown(its: Resources, found: Found) -> dict[str, Any]:
    """A response as it stands; a finished one as the end of its stream says it."""
    job, begun = found.job, _head(found)
    if job.state not in TERMINAL:
        return begun | {"status": "in_progress" if job.attempt else "queued"}
    if found.of_batch:
        return begun | _ending(job)
    log = await stored_log(its, job.id)
    if log is None:
        raise Unavailable("The database does not answer. Try again.")
    return finished_response(job.id, begun, log)


def _ending(job: Job) -> dict[str, Any]:
    """How a line of a batch ended: nobody could watch it, so its stream has no words."""
    said = job.model_dump()
    end = {name: said[name] for name in ("state", "finish_reason", "usage", "error")}
    return ending(job.id, items_of_message(job.message), end)


def _stream(its: Resources, caller: str, found: Found, after: int = -1, **how: Any) -> Response:
    said = ResponseEvents(found.job.id, _head(found), after)
    return stream(its, caller, found.job.id, said, first=said.first(), **how)


# ---------------------------------------------------------------- stored


@router.get("/{response_id}", response_model=None, responses=STREAMED)
async def get_response(
    response_id: str,
    its: Shared,
    caller: Caller,
    response: Response,
    stream: bool = False,
    starting_after: Annotated[
        int, Query(ge=-1, le=2**53, description="The last number you have.")
    ] = -1,
) -> Response | dict[str, Any]:
    """A response as it stands; or its stream, from the first event, live or long over."""
    found = await find(its, caller, RESPONSE, response_id, lines=True)
    if stream and found.of_batch:
        raise Conflict(
            f"{response_id} is a line of a batch, whose answer comes whole: fetch it plain.",
            code="not_streamed",
        )
    if stream:
        return _stream(its, caller, found, starting_after)
    response.headers["x-backchannel-job"] = found.job.id
    return await _shown(its, found)


@router.get("/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    its: Shared,
    caller: Caller,
    response: Response,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """What was asked, item by item."""
    found = await find(its, caller, RESPONSE, response_id)
    response.headers["x-backchannel-job"] = found.job.id
    items = items_of(found.asked["input"], response_id.removeprefix(RESPONSE.prefix))
    return cut(items, limit, after, newest_first=order == "desc")


@router.post("/{response_id}/cancel")
async def cancel_response(
    response_id: str, its: Shared, caller: Caller, response: Response
) -> dict[str, Any]:
    """Cancel, in the background or not; a finished response stays as it is."""
    found = await find(its, caller, RESPONSE, response_id)
    await cancelled(its, caller, found.job.id)
    await until_finished(its, found.job.id, CANCEL_S)
    response.headers["x-backchannel-job"] = found.job.id
    return await _shown(its, await find(its, caller, RESPONSE, response_id))


@router.delete("/{response_id}")
async def delete_response(
    response_id: str, its: Shared, caller: Caller, response: Response
) -> dict[str, Any]:
    """Forget what was asked and answered; what it cost stays on the books."""
    await delete(its, caller, RESPONSE, response_id)
    response.headers["x-backchannel-job"] = RESPONSE.job_id(response_id)
    return {"id": response_id, "object": "response", "deleted": True}
