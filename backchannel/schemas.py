"""What crosses HTTP: the parts of every request; jobs, as they are asked for and as they stand."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)
from sqlalchemy import Select, and_, select

from backchannel.books import Spent
from backchannel.errors import InvalidRequest
from backchannel.pricing import Tokens
from backchannel.tables import jobs, results, usage

# ---------------------------------------------------------------- requests


class Request(BaseModel):
    """A form without room for what it does not name."""

    model_config = ConfigDict(extra="forbid", strict=True)


class NullsAreNotGiven(Request):
    """A request in which a null is as good as nothing."""

    @model_validator(mode="before")
    @classmethod
    def _left_out(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: each for name, each in value.items() if each is not None}
        return value


def as_text(value: Any) -> str:
    """A value that must be a text; what it is part of lacks something otherwise: TypeError."""
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def as_object(value: Any) -> dict[str, Any]:
    """A value that must be an object, likewise."""
    if not isinstance(value, dict):
        raise TypeError("not an object")
    return value


def whole(value: Any) -> Any:
    """A number without a fraction as what it is: to JSON 5.0 is an integer."""
    if isinstance(value, float) and value.is_integer() and -(2.0**63) <= value < 2.0**64:
        return int(value)
    return value


Whole = Annotated[int, BeforeValidator(whole)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Title = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=16, description="Your own pairs, kept with the job and given back."),
]


class Part(BaseModel):
    """A part of a message; its type says which other fields there are."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str


class ToolCallFunction(Request):
    """The function of a tool call, and its arguments as JSON in a string."""

    name: str
    arguments: str


class ToolCall(Request):
    """A tool call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: ToolCallFunction


class Message(Request):
    """One message, as in chat completions."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None


Fallbacks = Annotated[
    list[Name],
    Field(
        max_length=16,
        description="Models asked in this order when the one before does not answer at all.",
    ),
]


class CreateJob(Request):
    """One chat to be answered."""

    prompt: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="One user message; or give messages."
    )
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    system: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Put before the messages; in a session, in place of the session's own."
    )
    model: Name | None = Field(
        None, description="provider:model, a bare name, tier:fast or another tier, or auto."
    )
    fallbacks: Fallbacks | None = None
    session: str | None = Field(None, description="The session this is the next turn of.")
    parameters: dict[str, Any] | None = Field(
        None, description="Any parameter of chat completions."
    )
    lane: Literal["interactive", "batch"] = "interactive"
    metadata: Metadata | None = None
    stream: bool = Field(True, description="False: nobody will watch the text arrive.")
    deadline_s: float | None = Field(None, gt=0, description="Seconds until the job expires.")
    force: bool = Field(
        False, description="True: send images, a schema or tools whatever the model is known for."
    )

    def chat(self) -> list[dict[str, Any]]:
        """The messages this asks to be answered, as they were sent.

        Raises:
            InvalidRequest: Not exactly one of prompt and messages, or a message lacks its content.
        """
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("Give either prompt or messages.", param="prompt")
        for number, message in enumerate(self.messages or ()):
            check_message(message, f"messages[{number}]")
        if self.prompt is not None:
            return [{"role": "user", "content": self.prompt}]
        return [each.model_dump(exclude_unset=True) for each in self.messages or ()]


class Ours(Request):
    """What a face's request may say beyond its own form, in `x_backchannel`."""

    lane: Literal["interactive", "batch"] = "interactive"
    session: str | None = None
    deadline_s: float | None = Field(None, gt=0)
    fallbacks: Fallbacks | None = None
    force: bool = False


def check_message(message: Message, place: str) -> None:
    """Refuse a message that lacks what its role needs.

    Raises:
        InvalidRequest: It names the place.
    """
    answered = message.role == "assistant" and (message.tool_calls or message.refusal)
    if message.content is None and not answered:
        raise InvalidRequest(f"{place}.content: it is missing.", param=f"{place}.content")
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(
            f"{place}.tool_calls: only the assistant calls tools.", param=f"{place}.tool_calls"
        )
    if (message.tool_call_id is None) == (message.role == "tool"):
        raise InvalidRequest(
            f"{place}.tool_call_id: a message of role tool has one, and no other.",
            param=f"{place}.tool_call_id",
        )


_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d.*")


def _as_text(value: Any) -> Any:
    # pydantic would take a bare number as seconds since 1970
    if isinstance(value, str) and not _MOMENT.fullmatch(value):
        raise ValueError("write it as 2026-11-30T12:00:00Z")
    return value


def _in_ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


# A moment of a query, in milliseconds since 1970.
Moment = Annotated[
    int,
    BeforeValidator(_in_ms),
    BeforeValidator(TypeAdapter(AwareDatetime).validate_python),
    BeforeValidator(_as_text),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]


# ---------------------------------------------------------------- answers


def rfc3339(ms: int) -> str:
    """A moment as ``2026-11-30T12:00:00.000Z``."""
    moment = datetime.fromtimestamp(ms // 1000, UTC).replace(microsecond=ms % 1000 * 1000)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JobError(BaseModel):
    """Why a job did not succeed."""

    code: str
    message: str | None


class Usage(BaseModel):
    """What the answer cost; null is unknown, which is not zero."""

    input_tokens: int | None
    cached_tokens: int | None
    cache_write_tokens: int | None
    output_tokens: int | None
    reasoning_tokens: int | None
    cost_usd: float | None
    cost_nanousd: int | None
    price_date: str | None
    source: Literal["final", "partial", "estimated", "unknown"]


class Job(BaseModel):
    """A job as it stands."""

    id: str
    object: Literal["job"] = "job"
    state: str
    lane: str
    model: str
    provider: str
    requested_model: str | None
    model_reason: str
    fallbacks: list[str]
    fallback_from: str | None
    session: str | None
    turns_dropped: int | None
    interrupted_by: str | None
    parent_id: str | None
    metadata: dict[str, str]
    stream: bool
    created_at: str
    started_at: str | None
    finished_at: str | None
    run_at: str
    deadline_at: str
    cancel_requested_at: str | None
    attempt: int
    retries: int
    crashes: int
    finish_reason: str | None
    message: dict[str, Any] | None
    usage: Usage | None
    error: JobError | None


class JobList(BaseModel):
    """One page of jobs; ``next`` is the ``after`` of the following one."""

    object: Literal["list"] = "list"
    data: list[Job]
    has_more: bool
    next: str | None


# ---------------------------------------------------------------- from the rows

# Everything `usage_of` needs.
SPENT = (
    usage.c.source, usage.c.input_tokens, usage.c.cached_tokens, usage.c.cache_write_tokens,
    usage.c.output_tokens, usage.c.reasoning_tokens, usage.c.cost_nanousd, usage.c.price_date,
)  # fmt: skip

# Everything `job_of` needs; add the caller's own conditions.
JOB: Select[Any] = (
    select(jobs, results.c.message, *SPENT)
    .outerjoin(results, results.c.job_id == jobs.c.id)
    .outerjoin(usage, and_(usage.c.job_id == jobs.c.id, usage.c.billable))
)


def job_of(row: Any) -> Job:
    """A row of `JOB` as it crosses HTTP."""
    error = (
        None if row.error_code is None else JobError(code=row.error_code, message=row.error_message)
    )
    return Job(
        id=row.id,
        state=row.state,
        lane=row.lane,
        model=f"{row.provider}:{row.model}",
        provider=row.provider,
        requested_model=row.requested_model,
        model_reason=row.model_reason,
        fallbacks=row.fallbacks or [],
        fallback_from=row.fallback_from,
        session=row.session_id,
        turns_dropped=row.turns_dropped,
        interrupted_by=row.interrupted_by,
        parent_id=row.parent_id,
        metadata=row.meta,
        stream=row.stream,
        created_at=rfc3339(row.created_ms),
        started_at=row.started_ms and rfc3339(row.started_ms),
        finished_at=row.finished_ms and rfc3339(row.finished_ms),
        run_at=rfc3339(row.run_ms),
        deadline_at=rfc3339(row.deadline_ms),
        cancel_requested_at=row.cancel_ms and rfc3339(row.cancel_ms),
        attempt=row.attempt,
        retries=row.retries,
        crashes=row.crashes,
        finish_reason=row.finish_reason,
        message=row.message,
        usage=usage_of(row),
        error=error,
    )


def usage_of(row: Any) -> Usage | None:
    """What a finished job spent; None: no provider was called, or it is not over."""
    if row.source is None:
        return None
    tokens = None
    if row.input_tokens is not None:
        tokens = Tokens(
            row.input_tokens, row.output_tokens, row.cached_tokens, row.cache_write_tokens,
            row.reasoning_tokens,
        )  # fmt: skip
    return Usage(**Spent(row.source, tokens, row.cost_nanousd, row.price_date).as_json())
