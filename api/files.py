"""Files: uploaded piece by piece into the database, and a batch's results read as they grow."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection

from api.deps import Caller, IdempotencyKey, Resources, Shared, StrictRoute
from api.multipart import Form, read_form
from api.pages import behind, ends
from api.requests import request_hash
from backchannel import files as store
from backchannel.batch_output import FIRST_PAGE, Page, next_room, page
from backchannel.db import NOW
from backchannel.errors import BackchannelError, InvalidRequest, NotFound, TooLarge
from backchannel.files import INPUT, PROCESSED, Chunk, Cutter
from backchannel.idempotency import FILE, Use, settle
from backchannel.ids import new_file_id
from backchannel.tables import files

router = APIRouter(prefix="/v1/files", tags=["files"], route_class=StrictRoute)

Purpose = Literal["assistants", "batch", "batch_output", "fine-tune", "user_data", "vision"]
UPLOADS = ("batch", "user_data", "assistants", "fine-tune", "vision")
ANCHOR = "created_at"
SHORTEST_LIFE_S, LONGEST_LIFE_S = 3_600, 2_592_000  # OpenAI's own bounds
_SECONDS = re.compile("[0-9]{1,9}")


class StoredFile(BaseModel):
    """A file as OpenAI describes one."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    """One page of files; the last one's id is the ``after`` of the following page."""

    object: Literal["list"] = "list"
    data: list[StoredFile]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(BaseModel):
    """What is left of a file."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def _file_of(row: Any) -> StoredFile:
    return StoredFile(
        id=row.id,
        bytes=row.bytes,
        created_at=row.created_ms // 1000,
        expires_at=None if row.expires_ms is None else row.expires_ms // 1000,
        filename=row.filename,
        purpose=row.purpose,
    )


# ---------------------------------------------------------------- upload

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(UPLOADS)},
                        "expires_after[anchor]": {"type": "string", "enum": [ANCHOR]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": SHORTEST_LIFE_S,
                            "maximum": LONGEST_LIFE_S,
                        },
                    },
                }
            }
        },
    }
}


@router.post("", openapi_extra=_FORM)
async def create_file(
    request: Request, its: Shared, caller: Caller, response: Response, key: IdempotencyKey = None
) -> StoredFile:
    """Store a file; it is there once this answers."""
    file_id = new_file_id()
    content = None if key is None else hashlib.sha256()
    await its.db.write(lambda c: store.begin(c, file_id, caller))
    try:
        form, size = await _receive(its, file_id, request, content)
        purpose, expires_in_s = _wishes(form)

        def complete(connection: Connection) -> StoredFile:
            store.complete(
                connection, file_id,
                filename=form.filename or "", size=size, purpose=purpose, expires_in_s=expires_in_s,
            )  # fmt: skip
            first = file_id
            if key is not None and content is not None:
                sent = {"file": content.hexdigest(), "name": form.filename, "life": expires_in_s}
                digest = request_hash(sent | {"purpose": purpose})
                first = settle(connection, Use(FILE, caller, key, digest), file_id).subject
            if first != file_id:
                store.drop(connection, file_id)
            return _file_of(_found(connection, first, caller))

        file = await its.db.write(complete)
        if file.id != file_id:
            response.headers["Idempotent-Replay"] = "true"
        return file
    except BaseException:
        # also when the client goes away; what even this leaves behind is removed within a day
        with contextlib.suppress(BackchannelError):
            await asyncio.shield(its.db.write(lambda c: store.drop(c, file_id)))
        raise


async def _receive(
    its: Resources, file_id: str, request: Request, content: hashlib._Hash | None
) -> tuple[Form, int]:
    cutter = Cutter()
    cap = its.settings.max_file_bytes

    async def keep(chunk: Chunk | None) -> None:
        if chunk is not None:
            await its.db.write(lambda c: store.put(c, file_id, chunk))

    async def take(piece: bytes) -> None:
        if cutter.bytes + len(piece) > cap:
            raise TooLarge(
                f"The file is over {cap:,} bytes. Send it in parts, or raise "
                "BACKCHANNEL_MAX_FILE_BYTES."
            )
        if content is not None:
            content.update(piece)
        if cutter.add(piece):
            await keep(await asyncio.to_thread(cutter.cut))

    form = await read_form(request.headers.get("content-type", ""), request.stream(), take)
    await keep(await asyncio.to_thread(cutter.rest))
    return form, cutter.bytes


def _wishes(form: Form) -> tuple[str, int | None]:
    if form.filename is None:
        raise InvalidRequest("file: it is missing.", param="file")
    purpose = form.fields.get("purpose", "")
    if purpose not in UPLOADS:
        raise InvalidRequest(f"purpose: one of {', '.join(UPLOADS)}.", param="purpose")
    if form.fields.get("expires_after[anchor]", ANCHOR) != ANCHOR:
        raise InvalidRequest(f"expires_after.anchor: {ANCHOR}.", param="expires_after.anchor")
    seconds = form.fields.get("expires_after[seconds]")
    if seconds is None:
        return purpose, None
    param = "expires_after.seconds"
    known = _SECONDS.fullmatch(seconds)
    if not known or not SHORTEST_LIFE_S <= int(seconds) <= LONGEST_LIFE_S:
        raise InvalidRequest(f"{param}: {SHORTEST_LIFE_S} to {LONGEST_LIFE_S}.", param=param)
    return purpose, int(seconds)


# ---------------------------------------------------------------- read


class FilesQuery(BaseModel):
    """Which files to list."""

    model_config = ConfigDict(extra="forbid")

    purpose: Purpose | None = None
    limit: int = Field(10_000, ge=1, le=10_000)
    after: str | None = Field(None, description="The `last_id` of the page before.")
    order: Literal["desc", "asc"] = "desc"


@router.get("")
async def list_files(
    asked: Annotated[FilesQuery, Query()], its: Shared, caller: Caller
) -> FileList:
    """A page of files, the newest first."""
    wanted = [
        files.c.caller == caller,
        files.c.status == PROCESSED,
        files.c.expires_ms.is_(None) | (files.c.expires_ms > NOW),
    ]
    if asked.purpose is not None:
        wanted.append(files.c.purpose == asked.purpose)
    page = behind(
        files.select().where(*wanted), files.c.id, asked.after, asked.limit,
        newest_first=asked.order == "desc",
    )  # fmt: skip
    found = await its.db.read(lambda c: [_file_of(row) for row in c.execute(page)])
    return FileList(**ends(found, asked.limit))


@router.get("/{file_id}")
async def get_file(file_id: str, its: Shared, caller: Caller) -> StoredFile:
    """What is known of a file; a batch's have their size once it has ended."""
    return await its.db.read(lambda c: _file_of(_found(c, file_id, caller)))


@router.delete("/{file_id}")
async def delete_file(file_id: str, its: Shared, caller: Caller) -> DeletedFile:
    """Remove a file that no running batch needs."""

    def write(connection: Connection) -> None:
        _found(connection, file_id, caller)
        store.drop(connection, file_id)

    await its.db.write(write)
    return DeletedFile(id=file_id)


def _found(connection: Connection, file_id: str, caller: str) -> Any:
    row = store.find(connection, file_id, caller)
    if row is None:
        raise NotFound(f"There is no file '{file_id}'.")
    return row


@router.get("/{file_id}/content", response_class=StreamingResponse)
async def get_content(
    file_id: str,
    its: Shared,
    caller: Caller,
    after: Annotated[
        int | None,
        Query(
            ge=0,
            le=2**53,
            description="Of a batch's output or errors: only lines behind this `seq`, each with "
            "its own. 0 is all of them.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        Query(ge=1, le=2**53, description="Of a batch's output or errors: so many lines."),
    ] = None,
) -> StreamingResponse:
    """The bytes of a file. A batch's output and errors grow while it runs, and never change."""
    row = await its.db.read(lambda c: _found(c, file_id, caller))
    if row.kind == INPUT:
        return StreamingResponse(_stored(its, file_id), media_type="application/octet-stream")
    lines = _lines(its, row.batch_id, row.kind, after, limit)
    return StreamingResponse(lines, media_type="application/jsonl")


async def _stored(its: Resources, file_id: str) -> AsyncIterator[bytes]:
    n = 0
    while (chunk := await its.db.read(lambda c: store.chunk(c, file_id, n))) is not None:  # noqa: B023
        yield await asyncio.to_thread(chunk.raw)
        n += 1


async def _lines(
    its: Resources, batch_id: str, kind: str, after: int | None, limit: int | None
) -> AsyncIterator[bytes]:
    here, room = after or 0, FIRST_PAGE
    left = 2**53 if limit is None else limit

    def read(connection: Connection) -> Page:
        most = min(room, left)
        return page(connection, batch_id, kind, here, most, numbered=after is not None)

    while left and (found := await its.db.read(read)).lines:
        yield found.data
        here, room, left = found.last, next_room(found), left - found.lines
