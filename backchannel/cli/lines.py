"""The lines of an input file: each one a job to send, or a named reason why it is not one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from pydantic import ValidationError

from backchannel.errors import InvalidRequest
from backchannel.parameters import KNOWN, NOT_A_CHAT, OURS
from backchannel.schemas import CreateJob
from backchannel.strict_json import decode, place_of

MAX_LINE_BYTES = 1 << 20
MAX_ID = 512  # as long as a value of a job's metadata
CHAT = "/v1/chat/completions"
BATCH_FIELDS = frozenset({"custom_id", "method", "url", "body"})
OWN_FIELDS = frozenset({"custom_id", "prompt", "messages", "system", "model", "metadata"})


@dataclass(frozen=True, slots=True)
class Line:
    """One chat to send.

    Attributes:
        custom_id: The line's own, or one made of what it asks, so that it stays the same when
            lines are put in before it.
        model: None takes the run's.
        request: Its prompt or messages, system, parameters and metadata.
    """

    number: int
    custom_id: str
    model: str | None
    request: dict[str, Any]

    @property
    def id(self) -> str:
        """The id of the line's result: where it stood, and a digest of all it says."""
        return f"line_{self.number}_{self.digest[:16]}"

    @property
    def digest(self) -> str:
        """Of all it says; a line without a model does not say one."""
        return _digest(self.custom_id, self.model, self.request)

    def batch_line(self, model: str) -> dict[str, Any]:
        """The line of a batch's file that asks for it."""
        asked = self.request
        system = [{"role": "system", "content": asked["system"]}] if asked.get("system") else []
        messages = asked.get("messages") or [{"role": "user", "content": asked["prompt"]}]
        body = {
            "model": self.model or model,
            "messages": [*system, *messages],
            **asked.get("parameters", {}),
            "metadata": asked["metadata"],
        }
        return {"custom_id": self.custom_id, "method": "POST", "url": CHAT, "body": body}


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is not sent, and why."""

    number: int
    custom_id: str | None
    message: str


def same_content(result_id: str, line: Line) -> bool:
    """Whether a result belongs to what the line says now; ids that are not ours belong to it."""
    _, _, digest = result_id.rpartition("_")
    return not result_id.startswith("line_") or digest == line.id.rpartition("_")[2]


def count_lines(file: BinaryIO) -> int:
    """How many lines are not blank; the file is at its start again afterwards."""
    count = sum(1 for line in file if line.strip())
    file.seek(0)
    return count


def read_lines(file: BinaryIO) -> Iterator[Line | BadLine]:
    """Every line that is not blank, in order, good or bad."""
    seen: dict[str, int] = {}
    for number, raw in _raw_lines(file):
        if raw is None:
            yield BadLine(number, None, f"The line is over {MAX_LINE_BYTES:,} bytes.")
            continue
        found = _parse(number, raw, seen)
        if isinstance(found, Line):
            seen[found.custom_id] = number
        yield found


def _raw_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 2):
        number += 1
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")  # a BOM, as Windows editors put it
        whole = raw
        while not whole.endswith(b"\n") and (whole := file.readline(MAX_LINE_BYTES)):
            raw = b""
        if not raw or len(raw.rstrip(b"\r\n")) > MAX_LINE_BYTES:
            yield number, None
        elif raw.strip():
            yield number, raw.strip()


def _parse(number: int, raw: bytes, seen: dict[str, int]) -> Line | BadLine:
    custom_id: str | None = None
    fields: dict[str, Any] = {}
    try:
        value = decode(raw)
        if not isinstance(value, dict):
            raise InvalidRequest("A line is a JSON object.")
        custom_id = _custom_id(value)
        fields = _from_batch(value) if "body" in value or "url" in value else _from_own(value)
        model = fields.pop("model", None)
        CreateJob.model_validate({**fields, "model": model}).chat()
        custom_id = custom_id or _made_id(fields, model, seen)
        if custom_id in seen:
            raise InvalidRequest(f"custom_id '{custom_id}' stands on line {seen[custom_id]} too.")
    except InvalidRequest as error:
        return BadLine(number, custom_id, error.message.replace("The body", "The line"))
    except ValidationError as error:
        return BadLine(number, custom_id, _sentence(error, fields))
    metadata = {**(fields.get("metadata") or {}), "custom_id": custom_id}
    return Line(number, custom_id, model, {**fields, "metadata": metadata})


def _custom_id(value: dict[str, Any]) -> str | None:
    custom_id = value.get("custom_id")
    if custom_id is None:
        return None
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID:
        raise InvalidRequest(f"custom_id must be a string of 1 to {MAX_ID} characters.")
    return custom_id


def _from_batch(value: dict[str, Any]) -> dict[str, Any]:
    """The fields of a job from an OpenAI batch line."""
    _refuse_unknown(value.keys() - BATCH_FIELDS)
    if value.get("method", "POST") != "POST":
        raise InvalidRequest("method must be POST.")
    if value.get("url", CHAT) != CHAT:
        raise InvalidRequest(f"url must be {CHAT}: nothing else is a chat.")
    body = value.get("body")
    if not isinstance(body, dict):
        raise InvalidRequest("body must be an object.")
    if "messages" not in body:
        raise InvalidRequest("body.messages: it is missing.")
    if "prompt" in body or "system" in body:
        raise InvalidRequest("body: a chat has messages, not prompt or system.")
    return _from_own(body)


def _from_own(value: dict[str, Any]) -> dict[str, Any]:
    """The fields of a job from a line with prompt or messages, and parameters beside them."""
    fields = {name: value[name] for name in OWN_FIELDS - {"custom_id"} if name in value}
    parameters = {
        name: each for name, each in value.items() if name not in OWN_FIELDS and each is not None
    }
    if parameters.get("stream") is False:  # what every line here means
        del parameters["stream"]
    if "stream" in parameters:
        raise InvalidRequest("'stream' is refused: the answer to a line comes whole.")
    for name in parameters:
        if why := OURS.get(name) or NOT_A_CHAT.get(name):
            raise InvalidRequest(f"'{name}' is refused: {why}.")
    _refuse_unknown(parameters.keys() - KNOWN)
    return {**fields, "parameters": parameters} if parameters else fields


def _refuse_unknown(names: set[str]) -> None:
    if names:
        raise InvalidRequest(
            f"There is no field '{min(names)}' here; what only your server knows goes into "
            "extra_body."
        )


def _made_id(fields: dict[str, Any], model: str | None, seen: dict[str, int]) -> str:
    made = f"line-{_digest(model, fields)[:12]}"
    again = 1
    while (custom_id := made if again == 1 else f"{made}-{again}") in seen:
        again += 1
    return custom_id


def _sentence(error: ValidationError, value: dict[str, Any]) -> str:
    faults = [
        (place_of(each["loc"], value, missing=each["type"] == "missing"), each["msg"])
        for each in error.errors(include_url=False, include_input=False)
    ]
    # of the branches of a union the one that got furthest is the one that was meant
    place, why = max(faults, key=lambda fault: len(fault[0]))
    return f"{place or 'The line'}: {why[:1].lower()}{why[1:]}."


def _digest(*values: Any) -> str:
    spelled = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(spelled.encode()).hexdigest()
