"""What crosses HTTP: strict JSON in, checked requests, and the rows as jobs, sessions and usage."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from sqlalchemy import Select, and_, select

from backchannel.books import Spent
from backchannel.errors import InvalidRequest
from backchannel.pricing import Tokens
from backchannel.tables import CANCELLED, jobs, results, turns, usage

# ---------------------------------------------------------------- strict JSON

MAX_DEPTH = 100


def decode(body: bytes) -> Any:
    """The value of a JSON body, refusing what a database or a provider would choke on later.

    Raises:
        InvalidRequest: Not JSON, or with a key given twice, NaN or Infinity, a number beyond 64
            bits, a NUL character or half a surrogate pair; the message and ``param`` say where.
    """
    try:
        value = json.loads(body.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        _not_json(f"byte {error.start} is not UTF-8")
    except json.JSONDecodeError as error:
        _not_json(f"{error.msg} at line {error.lineno} column {error.colno}")
    except RecursionError:
        _not_json("it is nested too deeply")
    except ValueError:
        _not_json("it holds a number of more than 4,300 digits")
    _check(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known = dict(pairs)
    if len(known) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                _not_json(f"the key {json.dumps(key)} is given twice in one object", key)
            seen.add(key)
    return known


def _not_json(why: str, param: str | None = None) -> NoReturn:
    raise InvalidRequest(f"The body is not valid JSON: {why}.", code="invalid_json", param=param)


def _check(value: Any) -> None:
    ahead: list[tuple[Any, str, int]] = [(value, "", 0)]
    while ahead:
        here, place, depth = ahead.pop()
        match here:
            case str():
                _check_text(here, place)
            case float() if not math.isfinite(here):
                _not_json(f"{place or 'it'} is not a finite number", place or None)
            case int() | float() if not -(2**63) <= here < 2**64:  # 1e30 is whole, too
                raise InvalidRequest(f"{place or 'The body'}: beyond 64 bits.", param=place or None)
            case dict() | list() if depth == MAX_DEPTH:
                _not_json(f"it is nested more than {MAX_DEPTH} deep", place)
            case dict():
                for key, item in here.items():
                    _check_text(key, place, "a key")
                    ahead.append((item, f"{place}.{key}" if place else key, depth + 1))
            case list():
                ahead += [(item, f"{place}[{i}]", depth + 1) for i, item in enumerate(here)]


def _check_text(text: str, place: str, what: str = "the text") -> None:
    if "\0" in text:
        fault = "contains a NUL character"
    elif not text.isascii() and any("\ud800" <= each <= "\udfff" for each in text):
        fault = "contains half a surrogate pair"
    else:
        return
    raise InvalidRequest(f"{place or 'The body'}: {what} {fault}.", param=place or None)


def place_of(loc: Sequence[int | str], value: Any, *, missing: bool = False) -> str:
    """A pydantic location as a path in the value, as ``messages[0].content``.

    A location also names the branches of unions; what cannot be followed in the value is one.
    """
    place = ""
    for step in loc:
        if isinstance(value, dict) and isinstance(step, str) and (step in value or missing):
            place += f".{step}" if place else step
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int):
            place += f"[{step}]"
            value = value[step]
    return place


def not_valid(faults: list[tuple[str, Mapping[str, Any]]]) -> InvalidRequest:
    """The errors that pydantic found, each with its place, as one sentence."""
    # of the branches of a union the one that got furthest is the one that was meant
    place, each = max(faults, key=lambda fault: len(fault[0]))
    match each["type"]:
        case "extra_forbidden":
            why = "there is no such field."
        case "missing":
            why = "it is missing." if place else "the request needs a JSON body."
        case _:
            said = each["msg"].removeprefix("Value error, ")  # of a check of ours
            why = f"{said[:1].lower()}{said[1:]}."
    return InvalidRequest(f"{place or 'The body'}: {why}", param=place or None)


Form = TypeVar("Form", bound=BaseModel)


def validated(form: type[Form], value: dict[str, Any]) -> Form:
    """A value as a request, as if it had been the body of one.

    Raises:
        InvalidRequest: It names the field.
    """
    try:
        return form.model_validate(value)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
    raise not_valid(
        [(place_of(each["loc"], value, missing=each["type"] == "missing"), each) for each in faults]
    )


# ---------------------------------------------------------------- requests


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NullsAreNotGiven(_Request):
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


class ToolCallFunction(_Request):
    """The function of a tool call, and its arguments as JSON in a string."""

    name: str
    arguments: str


class ToolCall(_Request):
    """A tool call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: ToolCallFunction


class Message(_Request):
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


class CreateJob(_Request):
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


class Ours(_Request):
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


DoubleTexting = Literal["enqueue", "reject", "interrupt"]
Budget = Annotated[int, Field(ge=1, le=2**53), BeforeValidator(whole)]


class History(_Request):
    """How much of a session's history is told, in likely tokens of all that is told."""

    max_tokens: Budget | None = Field(None, description="For models that have none of their own.")
    models: dict[Name, Budget] | None = Field(None, description="By provider:model.")


class CreateSession(_Request):
    """A new conversation."""

    model: Name | None = None
    title: Title | None = None
    system: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Said to the model before every turn's history."
    )
    double_texting: DoubleTexting = Field(
        "enqueue", description="What becomes of an unfinished turn when the next one is sent."
    )
    history: History | None = Field(None, description="Null: all of it is told.")
    metadata: Metadata | None = None


class ChangeSession(CreateSession):
    """What is left out stays; a change of model counts up ``model_version``."""


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


class Session(BaseModel):
    """A conversation and its current model."""

    id: str
    object: Literal["session"] = "session"
    model: str
    model_rule: str | None
    model_version: int
    double_texting: DoubleTexting
    history: History | None
    title: str | None
    system: str | None
    metadata: dict[str, str]
    created_at: str
    updated_at: str


class SessionMessage(BaseModel):
    """A message of a session, with the state of the job it belongs to."""

    model_config = ConfigDict(extra="allow")  # the message's own fields

    seq: int
    job_id: str
    state: str
    model: str | None  # of an answer
    interrupted: bool  # by the turn after it: an answer that is marked so broke off
    created_at: str


class SessionWithMessages(Session):
    """A conversation with all that was said."""

    messages: list[SessionMessage]


class SessionList(BaseModel):
    """One page of sessions; ``next`` is the ``after`` of the following one."""

    object: Literal["list"] = "list"
    data: list[Session]
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


def session_of(row: Any) -> Session:
    """A row of the sessions as it crosses HTTP."""
    return Session(
        id=row.id,
        model=f"{row.provider}:{row.model}",
        model_rule=row.model_rule,
        model_version=row.model_version,
        double_texting=row.double_texting,
        history=row.history and History(**row.history),
        title=row.title,
        system=row.system,
        metadata=row.meta,
        created_at=rfc3339(row.created_ms),
        updated_at=rfc3339(row.updated_ms),
    )


# Everything `message_of` needs.
MESSAGE: Select[Any] = select(turns, jobs.c.state, jobs.c.interrupted_by).join(
    jobs, jobs.c.id == turns.c.job_id
)


def message_of(row: Any) -> SessionMessage:
    """A row of `MESSAGE` as it crosses HTTP."""
    return SessionMessage(
        **{"content": None, **row.message},
        seq=row.seq,
        job_id=row.job_id,
        state=row.state,
        model=None if row.model is None else f"{row.provider}:{row.model}",
        # one that was to be interrupted and had just finished is whole
        interrupted=row.state == CANCELLED and row.interrupted_by is not None,
        created_at=rfc3339(row.created_ms),
    )
