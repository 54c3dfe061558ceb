"""Messages: Anthropic's form of a job, with any provider behind it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response

from api.deps import Caller, IdempotencyKey, Shared, StrictRoute
from api.estimate import ModelEstimate
from api.faces import STREAMED, Face, LeavingCancels, failure_of, finished, stream
from api.jobs import submit
from api.message_events import MessageEvents, message
from api.message_input import NAMES, CountTokens, CreateMessage, messages_of, parameters_of
from api.requests import checked
from backchannel.choice import choose
from backchannel.errors import naming
from backchannel.schemas import CreateJob
from backchannel.tables import SUCCEEDED

router = APIRouter(prefix="/v1/messages", tags=["messages"], route_class=StrictRoute)

MESSAGE = Face("message", "msg_", router.prefix)


@router.post("", response_model=None, responses=STREAMED)
async def create_message(
    asked: CreateMessage,
    request: Request,
    its: Shared,
    caller: Caller,
    response: Response,
    key: IdempotencyKey = None,
    leaving_cancels: LeavingCancels = False,
    force: Annotated[
        bool, Header(alias="x-backchannel-force", description="As `force` of a job.")
    ] = False,
) -> Response | dict[str, Any]:
    """Answer a message, as soon as its job is done; or stream it."""
    order = CreateJob.model_construct(
        model=asked.model, parameters=parameters_of(asked), stream=asked.stream, force=force
    )
    sent = asked.model_dump(exclude_unset=True)
    with naming(NAMES):
        new = await checked(its, caller, order, messages_of(asked), key, face=(MESSAGE.kind, sent))
    job = await submit(its, new, response)
    if asked.stream:
        said = MessageEvents(job.id, job.model)
        return stream(
            its, caller, job.id, said, leaving_cancels=leaving_cancels, headers=response.headers
        )
    job = (await finished(its, request, caller, MESSAGE, job, leaving_cancels)).job
    if job.state != SUCCEEDED:
        raise failure_of(job)
    response.headers.update({"x-backchannel-job": job.id, "Location": f"/v1/jobs/{job.id}"})
    usage = None if job.usage is None else job.usage.model_dump()
    return message(job.id, job.model, job.message, job.finish_reason, usage)


@router.post("/count_tokens")
async def count_tokens(asked: CountTokens, its: Shared, caller: Caller) -> dict[str, int]:
    """About how long a message's input would be, judged by its characters: nobody is asked."""
    counted = ModelEstimate()
    with naming(NAMES):
        said, parameters = messages_of(asked), parameters_of(asked)
        choice = await its.roster.answer(
            (asked.model,),
            lambda registry: choose(
                registry, asked.model, said, parameters, force=True, allowed=caller.models
            ),
        )
        counted.add(None, said, choice.parameters)
    return {"input_tokens": counted.input_tokens()}
