"""The lines of a batch's input: what is wrong with their form, and the chat that each asks for."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from backchannel.accept import NewJob
from backchannel.completions import CHAT, RESPONSES, ask
from backchannel.errors import InvalidRequest
from backchannel.files import MAX_LINE_BYTES
from backchannel.parameters import check_parameters
from backchannel.registry import Registry
from backchannel.schemas import decode
from backchannel.tables import BATCH

ENDPOINTS = (CHAT, RESPONSES)
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


def duplicate(number: int, custom_id: str) -> Fault:
    """A custom_id that an earlier line has."""
    why = f"custom_id '{custom_id}' stands on an earlier line too."
    return Fault(number, "duplicate_custom_id", why, "custom_id")


# ---------------------------------------------------------------- a line becomes a job


def job_of_line(batch: Any, raw: bytes, head: Head, registry: Registry) -> NewJob:
    """What a line asks, as the API would have accepted it.

    Args:
        batch: A row of the batches, with ``left_ms`` to its end.

    Raises:
        InvalidRequest: It cannot be a job.
    """
    value = decode(raw.removeprefix(b"\xef\xbb\xbf") if head.line == 1 else raw)
    asked = ask(batch.endpoint, value["body"])
    resolved = registry.resolve(asked.model)
    return NewJob(
        caller=batch.caller,
        kind="batch",
        lane=BATCH,
        provider=resolved.provider.id,
        model=resolved.model,
        requested_model=asked.model,
        model_reason=resolved.reason,
        instructions=asked.instructions,
        messages=asked.messages,
        parameters=check_parameters(asked.parameters, resolved.provider),
        asked=asked.asked,
        request_hash=f"{batch.id}:{head.line}",
        deadline_s=batch.left_ms / 1000,
        stream=False,
        batch_id=batch.id,
        line=head.line,
        meta=asked.metadata,
    )


def refusal(error: InvalidRequest) -> dict[str, Any]:
    """The body of a line's 400."""
    body = error.body()
    if error.param is not None:
        # as the field of a line's body is called, not that of a job
        body["error"]["param"] = error.param.removeprefix("parameters.").removeprefix("body.")
    return body
