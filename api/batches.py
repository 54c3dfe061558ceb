"""Batches: a file of chats becomes jobs, a window at a time; its state, cancel and retry."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, select

from api.deps import Caller, IdempotencyKey, Resources, Shared, StrictRoute
from api.estimate import estimate
from api.pages import behind, ends
from api.requests import request_hash
from backchannel import batches as store
from backchannel import files
from backchannel.batch_input import ENDPOINTS
from backchannel.batches import NewBatch
from backchannel.db import NOW
from backchannel.errors import Conflict, InvalidRequest, NotFound
from backchannel.ids import new_id
from backchannel.schemas import Metadata
from backchannel.tables import BATCH_TERMINAL, CANCELLED, EXPIRED, FAILED, VALIDATING, batches

router = APIRouter(prefix="/v1/batches", tags=["batches"], route_class=StrictRoute)

# up to 43200m, 720h, 30d
_WINDOW = re.compile(
    r"(?:[1-9]\d{0,3}|[1-3]\d{4}|4[0-2]\d{3}|43[01]\d\d|43200)m"
    r"|(?:[1-9]\d?|[1-6]\d\d|7[01]\d|720)h"
    r"|(?:[1-9]|[12]\d|30)d"
)
_UNIT_S = {"m": 60, "h": 3_600, "d": 86_400}


class OwnWishes(BaseModel):
    """What OpenAI's batches do not have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dry_run: bool = Field(False, description="Answer what it would cost, and run nothing.")


class CreateBatch(BaseModel):
    """A file of chats to be answered."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: str
    endpoint: str = Field(
        description="/v1/chat/completions or /v1/responses.",
        json_schema_extra={"enum": [*ENDPOINTS]},
    )
    completion_window: str = Field(
        "24h",
        description="24h, or minutes, hours or days: 90m, 7d.",
        json_schema_extra={"pattern": f"^(?:{_WINDOW.pattern})$"},
    )
    metadata: Metadata | None = None
    x_backchannel: OwnWishes | None = None


class BatchFault(BaseModel):
    """What is wrong with a line of the input."""

    code: str
    message: str
    line: int | None
    param: str | None


class BatchFaults(BaseModel):
    """Why a batch failed before anything was sent."""

    object: Literal["list"] = "list"
    data: list[BatchFault]


class RequestCounts(BaseModel):
    """How many lines there are, and how many of them are done."""

    total: int
    completed: int
    failed: int


class InputTokensDetails(BaseModel):
    """Of the input."""

    cached_tokens: int


class OutputTokensDetails(BaseModel):
    """Of the output."""

    reasoning_tokens: int


class BatchUsage(BaseModel):
    """What the answers so far have cost; answers of unknown usage or price are counted apart."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    cost_usd: float
    cost_nanousd: int
    unknown_tokens: int
    unknown_price: int


class Batch(BaseModel):
    """A batch as OpenAI describes one, with what it cost."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    input_file_id: str
    completion_window: str
    status: str
    errors: BatchFaults | None
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None
    parent_id: str | None = None
    x_backchannel: dict[str, Any] | None = None


class BatchList(BaseModel):
    """One page of batches; the last one's id is the ``after`` of the following page."""

    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


# ---------------------------------------------------------------- create


@router.post("")
async def create_batch(
    asked: CreateBatch, its: Shared, caller: Caller, response: Response, key: IdempotencyKey = None
) -> Batch:
    """Accept a batch; its file is read, and its lines become jobs, by the workers."""
    window_s = _window_s(asked.completion_window)
    if asked.endpoint not in ENDPOINTS:
        raise InvalidRequest(f"endpoint: one of {', '.join(ENDPOINTS)}.", param="endpoint")
    new = NewBatch(
        caller=caller,
        endpoint=asked.endpoint,
        input_file_id=asked.input_file_id,
        completion_window=asked.completion_window,
        window_s=window_s,
        request_hash=request_hash(asked.model_dump(exclude_unset=True)),
        meta=asked.metadata,
        idempotency_key=key,
        models=caller.models,
    )
    if asked.x_backchannel is not None and asked.x_backchannel.dry_run:
        return await _dry_run(its, new)

    def write(connection: Connection) -> tuple[Batch, bool]:
        batch_id, created = _create(connection, new)
        return _read(connection, batch_id, caller), created

    batch, created = await its.db.write(write)
    if not created:
        response.headers["Idempotent-Replay"] = "true"
    return batch


def _window_s(window: str) -> int:
    if not _WINDOW.fullmatch(window):
        raise InvalidRequest(
            "completion_window: 24h, or a number of minutes, hours or days up to 30d, as in 90m.",
            param="completion_window",
        )
    return int(window[:-1]) * _UNIT_S[window[-1]]


def _create(connection: Connection, new: NewBatch) -> tuple[str, bool]:
    batch_id, created = store.create(connection, new)
    if created:  # a known key is answered though its file may be gone
        _check_input(connection, new)
    return batch_id, created


def _check_input(connection: Connection, new: NewBatch) -> None:
    row = files.find(connection, new.input_file_id, new.caller)
    if row is None or row.kind != files.INPUT:
        raise NotFound(f"There is no uploaded file '{new.input_file_id}'.", param="input_file_id")
    if row.purpose != "batch":
        raise Conflict(
            f"{row.id} has the purpose {row.purpose}: upload it with purpose batch.",
            code="wrong_purpose",
            param="input_file_id",
        )


async def _dry_run(its: Resources, new: NewBatch) -> Batch:
    await its.db.read(lambda c: _check_input(c, new))
    await its.roster.refresh()
    found = await estimate(its.db, its.registry, new.input_file_id, new.endpoint, new.models)
    row = await its.db.read(lambda c: c.execute(select(NOW.label("now_ms"))).one())
    return Batch(
        id=new_id("batch_dry_run"),
        endpoint=new.endpoint,
        input_file_id=new.input_file_id,
        completion_window=new.completion_window,
        status=FAILED if found.faults else VALIDATING,
        errors=_faults(found.faults, found.faults_count),
        created_at=row.now_ms // 1000,
        expires_at=row.now_ms // 1000 + new.window_s,
        request_counts=RequestCounts(total=found.lines, completed=0, failed=0),
        usage=_usage(dict.fromkeys(_SUMS, 0)),
        metadata=new.meta,
        x_backchannel={"dry_run": True, "estimate": found.as_json()},
    )


_UNBEGUN = {FAILED: "its file has errors: correct it"} | dict.fromkeys(
    (CANCELLED, EXPIRED), "it ended before its file was read: begin again"
)


@router.post("/{batch_id}/retry")
async def retry_batch(
    batch_id: str, its: Shared, caller: Caller, response: Response, key: IdempotencyKey = None
) -> Batch:
    """A new batch of just the lines that have no answer, with `parent_id`."""

    def write(connection: Connection) -> tuple[Batch, bool]:
        row = _found(connection, batch_id, caller)
        if row.status not in BATCH_TERMINAL:
            raise Conflict(f"{batch_id} is {row.status}: it is not over.", code="not_finished")
        if row.status == FAILED or row.failed == 0:
            why = "nothing failed" if row.in_progress_ms else _UNBEGUN[row.status]
            raise Conflict(f"{batch_id} has no lines to retry: {why}.", code="nothing_to_retry")
        new = NewBatch(
            caller=caller,
            endpoint=row.endpoint,
            input_file_id=row.input_file_id,
            completion_window=row.completion_window,
            window_s=_window_s(row.completion_window),
            request_hash=request_hash({"retry": batch_id}),
            meta=row.meta,
            idempotency_key=key,
            parent_id=batch_id,
            models=caller.models,
        )
        child, created = _create(connection, new)
        return _read(connection, child, caller), created

    batch, created = await its.db.write(write)
    if not created:
        response.headers["Idempotent-Replay"] = "true"
    return batch


# ---------------------------------------------------------------- cancel


@router.post("/{batch_id}/cancel")
async def cancel_batch(batch_id: str, its: Shared, caller: Caller) -> Batch:
    """Nothing more is sent, what runs is stopped; answers that are there stay."""

    def write(connection: Connection) -> Batch:
        row = store.cancel(connection, batch_id, caller)
        if row is None:
            raise _no_batch(batch_id)
        return _batch_of(row)

    return await its.db.write(write)


# ---------------------------------------------------------------- read


class BatchesQuery(BaseModel):
    """Which batches to list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, description="The `last_id` of the page before.")
    idempotency_key: str | None = Field(None, description="Only the batch made with this key.")


@router.get("")
async def list_batches(
    asked: Annotated[BatchesQuery, Query()], its: Shared, caller: Caller
) -> BatchList:
    """A page of batches, the newest first."""
    statement = batches.select().where(batches.c.caller == caller)
    if asked.idempotency_key is not None:
        statement = statement.where(batches.c.idempotency_key == asked.idempotency_key)
    page = behind(statement, batches.c.id, asked.after, asked.limit, newest_first=True)
    found = await its.db.read(lambda c: [_batch_of(row) for row in c.execute(page)])
    return BatchList(**ends(found, asked.limit))


@router.get("/{batch_id}")
async def get_batch(batch_id: str, its: Shared, caller: Caller) -> Batch:
    """A batch as it stands."""
    return await its.db.read(lambda c: _read(c, batch_id, caller))


def _read(connection: Connection, batch_id: str, caller: str) -> Batch:
    return _batch_of(_found(connection, batch_id, caller))


def _found(connection: Connection, batch_id: str, caller: str) -> Any:
    row = store.find(connection, batch_id, caller)
    if row is None:
        raise _no_batch(batch_id)
    return row


def _no_batch(batch_id: str) -> NotFound:
    return NotFound(f"There is no batch '{batch_id}'.")


_MOMENTS = (
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "expired",
    "cancelling",
    "cancelled",
)
_SUMS = (
    "input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "cost_nanousd",
    "unknown_tokens", "unknown_price",
)  # fmt: skip


def _batch_of(row: Any) -> Batch:
    """A row of the batches as it crosses HTTP."""
    its = row._mapping
    over = row.status in BATCH_TERMINAL
    moments: dict[str, Any] = {
        f"{name}_at": its[f"{name}_ms"] and its[f"{name}_ms"] // 1000 for name in _MOMENTS
    }
    return Batch(
        id=row.id,
        endpoint=row.endpoint,
        input_file_id=row.input_file_id,
        completion_window=row.completion_window,
        status=row.status,
        errors=_faults(row.faults, row.faults_count) if row.status == FAILED else None,
        # once it is over, a file is named only if there is something in it
        output_file_id=None if over and not row.completed else row.output_file_id,
        error_file_id=None if over and not row.failed else row.error_file_id,
        created_at=row.created_ms // 1000,
        expires_at=row.expires_ms // 1000,
        request_counts=RequestCounts(total=row.total, completed=row.completed, failed=row.failed),
        usage=_usage(its),
        metadata=row.meta,
        parent_id=row.parent_id,
        **moments,
    )


def _faults(named: list[dict[str, Any]], count: int) -> BatchFaults | None:
    if not count:
        return None
    data = [BatchFault(**each) for each in named]
    if count > len(named):
        more = f"{count - len(named)} more lines are not right."
        data.append(BatchFault(code="more_errors", message=more, line=None, param=None))
    return BatchFaults(data=data)


def _usage(sums: Any) -> BatchUsage:
    return BatchUsage(
        input_tokens=sums["input_tokens"],
        input_tokens_details=InputTokensDetails(cached_tokens=sums["cached_tokens"]),
        output_tokens=sums["output_tokens"],
        output_tokens_details=OutputTokensDetails(reasoning_tokens=sums["reasoning_tokens"]),
        total_tokens=sums["input_tokens"] + sums["output_tokens"],
        cost_usd=sums["cost_nanousd"] / 1e9,
        cost_nanousd=sums["cost_nanousd"],
        unknown_tokens=sums["unknown_tokens"],
        unknown_price=sums["unknown_price"],
    )
