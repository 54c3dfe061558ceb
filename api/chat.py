"""Chat completions: OpenAI's form of a job, answered when the job is, plain or as it streams."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, update

from api.chat_chunks import Chunks
from api.deps import Caller, IdempotencyKey, Shared, StrictRoute
from api.faces import (
    FOUND,
    STREAMED,
    Face,
    Found,
    LeavingCancels,
    delete,
    failure_of,
    find,
    finished,
    found_of,
    stream,
    unfinished,
)
from api.jobs import submit
from api.pages import behind
from api.requests import checked
from backchannel.chat_input import CreateChat
from backchannel.chat_output import PREFIX, completion, stored_message
from backchannel.errors import naming
from backchannel.schemas import Metadata
from backchannel.tables import SUCCEEDED, TERMINAL, jobs

router = APIRouter(prefix="/v1/chat/completions", tags=["chat"], route_class=StrictRoute)

CHAT = Face("chat.completion", PREFIX, router.prefix)


class UpdateChat(BaseModel):
    """New metadata for a stored completion."""

    model_config = ConfigDict(extra="forbid", strict=True)

    metadata: Metadata | None


# ---------------------------------------------------------------- create


@router.post("", response_model=None, responses=STREAMED)
async def create_chat(
    asked: CreateChat,
    request: Request,
    its: Shared,
    caller: Caller,
    response: Response,
    key: IdempotencyKey = None,
    leaving_cancels: LeavingCancels = False,
) -> Response | dict[str, Any]:
    """Answer a chat, as soon as its job is done; or stream it."""
    sent = asked.model_dump(exclude_unset=True)
    with naming(asked.NAMES):
        new = await checked(its, caller, asked.order(), asked.chat(), key, face=(CHAT.kind, sent))
    job = await submit(its, new, response)
    if asked.stream:
        found = await find(its, caller, CHAT, CHAT.id_of(job.id))
        usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        chunks = Chunks(job.id, found.created_s, job.model, include_usage=usage)
        return stream(
            its, caller, job.id, chunks, leaving_cancels=leaving_cancels, headers=response.headers
        )
    found = await finished(its, request, caller, CHAT, job, leaving_cancels)
    response.headers.update(
        {"x-backchannel-job": job.id, "Location": f"{router.prefix}/{_id(found)}"}
    )
    return _shown(found)


def _id(found: Found) -> str:
    return CHAT.id_of(found.job.id)


def _shown(found: Found) -> dict[str, Any]:
    job = found.job
    if job.state != SUCCEEDED:
        raise failure_of(job)
    usage = None if job.usage is None else job.usage.model_dump()
    return completion(
        job.id, found.created_s, job.model, job.message, job.finish_reason, usage, job.metadata
    )


# ---------------------------------------------------------------- stored


class ChatsQuery(BaseModel):
    """Which stored completions to list."""

    model_config = ConfigDict(extra="ignore")

    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, description="The id of the last one you have.")
    order: Literal["asc", "desc"] = "asc"
    model: str | None = Field(None, description="provider:model, or the model's name alone.")


@router.get("")
async def list_chats(
    asked: Annotated[ChatsQuery, Query()], request: Request, its: Shared, caller: Caller
) -> dict[str, Any]:
    """A page of the completions that have their answer; also by `metadata[key]=value`."""
    wanted = [jobs.c.caller == caller, jobs.c.kind == CHAT.kind, jobs.c.state == SUCCEEDED]
    if asked.model is not None:
        full_name = jobs.c.provider + ":" + jobs.c.model
        wanted.append((full_name == asked.model) | (jobs.c.model == asked.model))
    for name, value in request.query_params.items():
        if name.startswith("metadata["):
            wanted.append(jobs.c.meta[name[len("metadata[") : -1]].as_string() == value)
    page = behind(
        FOUND.where(*wanted), jobs.c.id, asked.after and CHAT.job_id(asked.after), asked.limit,
        newest_first=asked.order == "desc",
    )  # fmt: skip
    found = await its.db.read(lambda c: [found_of(row) for row in c.execute(page)])
    data = [_shown(each) for each in found[: asked.limit]]
    return page_of(data, has_more=len(found) > asked.limit)


def page_of(data: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """A page in OpenAI's form."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else ("", "")
    return {
        "object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more,
    }  # fmt: skip


@router.get("/{completion_id}")
async def get_chat(
    completion_id: str, request: Request, its: Shared, caller: Caller, response: Response
) -> dict[str, Any]:
    """A completion as soon as it has its answer: what its POST gave, or would have given."""
    found = await find(its, caller, CHAT, completion_id, lines=True)
    found = await finished(its, request, caller, CHAT, found.job, leaving_cancels=False)
    response.headers["x-backchannel-job"] = found.job.id
    return _shown(found)


@router.get("/{completion_id}/messages")
async def list_chat_messages(
    completion_id: str,
    its: Shared,
    caller: Caller,
    response: Response,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    order: Literal["asc", "desc"] = "asc",
) -> dict[str, Any]:
    """What was asked, message by message."""
    found = await find(its, caller, CHAT, completion_id, lines=True)
    response.headers["x-backchannel-job"] = found.job.id
    said = [
        {"id": f"{completion_id}-{place}", **stored_message(message)}
        for place, message in enumerate(found.messages)
    ]
    return cut(said, limit, after, newest_first=order == "desc")


def cut(
    items: list[dict[str, Any]], limit: int, after: str | None, *, newest_first: bool
) -> dict[str, Any]:
    """A page of items that are all at hand."""
    ordered = items[::-1] if newest_first else items
    ids = [item["id"] for item in ordered]
    start = ids.index(after) + 1 if after in ids else 0
    return page_of(ordered[start : start + limit], has_more=len(ordered) > start + limit)


@router.post("/{completion_id}")
async def update_chat(
    completion_id: str, asked: UpdateChat, its: Shared, caller: Caller, response: Response
) -> dict[str, Any]:
    """Replace a stored completion's metadata."""
    found = await find(its, caller, CHAT, completion_id)
    if found.job.state not in TERMINAL:
        raise unfinished(completion_id, found.job, "it has no answer to keep metadata with yet")
    shown = _shown(found)
    change = update(jobs).where(jobs.c.id == found.job.id).values(meta=asked.metadata or {})

    def write(connection: Connection) -> None:
        connection.execute(change)

    await its.db.write(write)
    response.headers["x-backchannel-job"] = found.job.id
    return shown | {"metadata": asked.metadata or {}}


@router.delete("/{completion_id}")
async def delete_chat(
    completion_id: str, its: Shared, caller: Caller, response: Response
) -> dict[str, Any]:
    """Forget what was asked and answered; what it cost stays on the books."""
    await delete(its, caller, CHAT, completion_id)
    response.headers["x-backchannel-job"] = CHAT.job_id(completion_id)
    return {"id": completion_id, "object": "chat.completion.deleted", "deleted": True}
