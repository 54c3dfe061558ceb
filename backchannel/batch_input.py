"""The lines of a batch's input: what is wrong with their form, and the chat that each asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from backchannel.accept import NewJob
from backchannel.chat_input import CreateChat
from backchannel.choice import choose
from backchannel.errors import InvalidRequest, UnsupportedParameter, naming
from backchannel.files import MAX_LINE_BYTES
from backchannel.registry import Registry, Resolved
from backchannel.response_input import CreateResponse
from backchannel.schemas import CreateJob
from backchannel.strict_json import decode, validated
from backchannel.tables import BATCH

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
_FORMS: dict[str, type[CreateChat] | type[CreateResponse]] = {
    CHAT: CreateChat,
    RESPONSES: CreateResponse,
}
ENDPOINTS = tuple(_FORMS)
LINE = "batch"  # the kind of the jobs; the batch's endpoint says which face reads them
MAX_ID_CHARS = 512
MAX_FAULTS = 100  # named one by one; the rest are counted


class Head(NamedTuple):
    """A line whose form is good."""

    line: int
    custom_id: str


class Fault(NamedTuple):
    """What is wrong with the form of a line; one of them fails the batch."""

    line: int | None
    code: str
    message: str
    param: str | None = None


class _Line(msgspec.Struct):
    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: msgspec.Raw = msgspec.Raw(b"")


# Reads the whole line as JSON, and makes objects of four fields only.
_decode = msgspec.json.Decoder(_Line).decode


def check_lines(
    raw_lines: list[bytes], first_line: int, endpoint: str
) -> tuple[list[Head], list[Fault]]:
    """The form of some lines of a file; blank ones do not count.

    Whether a custom_id stands on an earlier line is for the database to say.
    """
    heads: list[Head] = []
    faults: list[Fault] = []
    for number, raw in enumerate(raw_lines, first_line):
        text = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
        if text:
            found = _check(number, text, endpoint)
            if isinstance(found, Head):
                heads.append(found)
            else:
                faults.append(found)
    return heads, faults


def _check(number: int, text: bytes, endpoint: str) -> Head | Fault:
    if len(text) > MAX_LINE_BYTES:
        return too_long(number)
    try:
        line = _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Fault(number, "invalid_json_line", f"The line is not a JSON object: {error}.")
    if line.custom_id is None:
        return Fault(number, "missing_required_parameter", "It has no custom_id.", "custom_id")
    if not isinstance(line.custom_id, str) or not 0 < len(line.custom_id) <= MAX_ID_CHARS:
        why = f"custom_id must be a string of 1 to {MAX_ID_CHARS} characters."
        return Fault(number, "invalid_custom_id", why, "custom_id")
    if "\0" in line.custom_id:
        return Fault(number, "invalid_custom_id", "custom_id holds a NUL character.", "custom_id")
    if line.method != "POST":
        return Fault(number, "invalid_method", "method must be POST.", "method")
    if line.url != endpoint:
        why = f"url must be that of the batch, {endpoint}."
        return Fault(number, "invalid_url", why, "url")
    if bytes(line.body)[:1] != b"{":
        return Fault(number, "missing_required_parameter", "body must be an object.", "body")
    return Head(number, line.custom_id)


def too_long(number: int) -> Fault:
    """A line that no chunk could hold whole, or that is over the cap."""
    return Fault(number, "line_too_long", f"The line is over {MAX_LINE_BYTES:,} bytes.")


EMPTY = Fault(None, "empty_file", "The file has no lines.")


def duplicate(number: int, custom_id: str) -> Fault:
    """A custom_id that an earlier line has."""
    why = f"custom_id '{custom_id}' stands on an earlier line too."
    return Fault(number, "duplicate_custom_id", why, "custom_id")


# ---------------------------------------------------------------- a line becomes a job

# What a POST to the endpoint may ask and a line may not, and why.
_NOT_IN_A_LINE = {
    "stream": "its answer comes whole",
    "background": "all of a batch is done in the background",
    "previous_response_id": "lines are answered in any order",
}
_OURS_IN_A_LINE = {"fallbacks", "force"}  # of x_backchannel


class Asked(NamedTuple):
    """What a line asks, checked like the body of a POST to its endpoint."""

    form: CreateChat | CreateResponse
    order: CreateJob
    messages: list[dict[str, Any]]
    resolved: Resolved
    parameters: dict[str, Any]
    fallbacks: list[str] | None


def ask(
    endpoint: str, raw: bytes, registry: Registry, models: Sequence[str] | None = None
) -> Asked:
    """What a line whose form is good asks.

    Args:
        models: What the batch's caller may name; None: all.

    Raises:
        InvalidRequest: It cannot be a job; ``param`` is the field of its body.
    """
    body = decode(raw.removeprefix(b"\xef\xbb\xbf"))["body"]
    for name, why in _NOT_IN_A_LINE.items():
        if body.get(name):
            raise UnsupportedParameter(f"{name} is refused in a batch: {why}.", param=name)
    ours = body.get("x_backchannel")
    if isinstance(ours, dict) and ours.keys() - _OURS_IN_A_LINE:
        raise UnsupportedParameter(
            "x_backchannel of a line may hold fallbacks and force: lane, session and deadline are "
            "those of the batch.",
            param="x_backchannel",
        )
    form = validated(_FORMS[endpoint], body)
    with naming(form.NAMES):
        order, messages = form.order(), form.chat()
        asked, fallbacks = order.parameters or {}, order.fallbacks
        choice = choose(
            registry,
            order.model,
            messages,
            asked,
            fallbacks,
            system=order.system,
            force=order.force,
            allowed=models,
        )
    return Asked(form, order, messages, choice.resolved, choice.parameters, choice.fallbacks)


def job_of_line(batch: Any, raw: bytes, head: Head, registry: Registry) -> NewJob:
    """What a line asks, as the API would have accepted it.

    Args:
        batch: A row of the batches, with ``left_ms`` to its end.

    Raises:
        InvalidRequest: It cannot be a job.
    """
    form, order, messages, resolved, parameters, fallbacks = ask(
        batch.endpoint, raw, registry, batch.models
    )
    sent = None
    if batch.endpoint == RESPONSES:  # it repeats what was asked, but for the input
        sent = form.model_dump(exclude_unset=True, exclude={"input"})
    return NewJob(
        caller=batch.caller,
        kind=LINE,
        lane=BATCH,
        provider=resolved.provider.id,
        model=resolved.model,
        requested_model=order.model,
        model_reason=resolved.reason,
        fallbacks=fallbacks,
        instructions=order.system,
        messages=messages,
        parameters=parameters,
        asked=sent,
        request_hash=f"{batch.id}:{head.line}",
        deadline_s=batch.left_ms / 1000,
        stream=False,
        batch_id=batch.id,
        line=head.line,
        meta=order.metadata or {},
    )


def refusal(error: InvalidRequest) -> dict[str, Any]:
    """The body of a line's 400."""
    body = error.body()
    if error.param is not None:  # of what is not JSON: as the field of a body is called
        body["error"]["param"] = error.param.removeprefix("body.")
    return body
