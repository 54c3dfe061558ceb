"""Anthropic's form of what a job says: its events as a streamed message, its answer as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from backchannel import events
from backchannel.errors import BackchannelError, JobFailed, job_failed
from backchannel.events import Event, fields
from backchannel.pieces import Item, Pieces, Step, items_of_message
from backchannel.tables import SUCCEEDED

Body = dict[str, Any]

STOP = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}


def error_body(error: BackchannelError) -> Body:
    """An error in Anthropic's form; our code and the field stand beside it."""
    kind = ERROR_TYPES.get(error.status, "api_error")
    if error.status in (405, 409):
        kind = "invalid_request_error"
    if error.code == "overloaded":
        kind = "overloaded_error"
    told = {"type": kind, "message": error.message, "code": error.code, "param": error.param}
    return {"type": "error", "error": told}


def message(
    job_id: str, model: str, said: Body | None, finish_reason: str | None, usage: Body | None
) -> Body:
    """A job's answer as a message."""
    return {
        "id": f"msg_{job_id.removeprefix('job_')}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [*map(_block, items_of_message(said))],
        "stop_reason": STOP.get(finish_reason or "stop", "end_turn"),
        "stop_sequence": None,
        "usage": _usage(usage),
    }


def _block(item: Item) -> Body:
    match item.kind:
        case "text":
            return {"type": "text", "text": item.text}
        case "reasoning":
            return {"type": "thinking", "thinking": item.text, "signature": item.signature}
        case "tool_call":
            return {**_empty(item), "input": _arguments(item.text)}


def _arguments(text: str) -> Body:
    """Anthropic's form has an object; what the model wrote may have been cut off."""
    try:
        arguments = msgspec.json.decode(text or "{}")
    except ValueError:
        arguments = None
    return arguments if isinstance(arguments, dict) else {"": text}


def _usage(usage: Body | None) -> Body:
    """Tokens as Anthropic counts them: the input without what was cached; 0 where unknown."""
    known = {name: value or 0 for name, value in (usage or {}).items()}
    cached, written = known.get("cached_tokens", 0), known.get("cache_write_tokens", 0)
    return {
        "input_tokens": known.get("input_tokens", 0) - cached - written,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": written,
        "output_tokens": known.get("output_tokens", 0),
        "cost_usd": None if usage is None else usage["cost_usd"],
    }


class MessageEvents:
    """One stream. Its form cannot take anything back: a second attempt's text ends it instead."""

    def __init__(self, job_id: str, model: str) -> None:
        self.over = False
        self._job_id = job_id
        self._model = model
        self._begun = False
        self._pieces = Pieces()

    def take(self, event: Event | BackchannelError) -> list[bytes]:
        """The frames of one event of the job."""
        if isinstance(event, BackchannelError):
            return [*map(_frame, self._break_off(event))]
        return [*map(_frame, self._events(*fields(event)))]

    def _events(self, type_: str, own: Body) -> Iterator[Body]:
        match type_:
            case events.STARTED | events.RESET if not self._begun:
                self._begun = True
                first = message(self._job_id, own["model"], None, None, None)
                yield {"type": "message_start", "message": {**first, "stop_reason": None}}
            case events.RESET if self._pieces.begun:
                yield from self._break_off(_restarted(self._job_id))
            case events.END:
                yield from self._end(own)
            case _:
                for step in self._pieces.take(type_, own):
                    yield _step(step)

    def _end(self, own: Body) -> Iterator[Body]:
        if own["state"] != SUCCEEDED:
            yield from self._break_off(job_failed(self._job_id, own["state"], own["error"]))
            return
        yield from map(_step, self._pieces.close())
        reason = STOP.get(own["finish_reason"] or "stop", "end_turn")
        delta = {"stop_reason": reason, "stop_sequence": None}
        yield {"type": "message_delta", "delta": delta, "usage": _usage(own["usage"])}
        yield {"type": "message_stop"}

    def _break_off(self, error: BackchannelError) -> Iterator[Body]:
        self.over = True
        yield error_body(error)


def _step(step: Step) -> Body:
    place = {"type": f"content_block_{_STEPS[step.what]}", "index": step.item.index}
    match step.what:
        case "open":
            return {**place, "content_block": _empty(step.item)}
        case "piece":
            return {**place, "delta": _delta(step.item, step.piece)}
        case "signed":
            signed = {"type": "signature_delta", "signature": step.piece}
            return {**place, "delta": signed}
        case "close":
            return place


_STEPS = {"open": "start", "piece": "delta", "signed": "delta", "close": "stop"}


def _empty(item: Item) -> Body:
    if item.kind == "tool_call":
        return {"type": "tool_use", "id": item.call_id, "name": item.name, "input": {}}
    return _block(Item(item.index, item.kind))


def _delta(item: Item, piece: str) -> Body:
    match item.kind:
        case "text":
            return {"type": "text_delta", "text": piece}
        case "reasoning":
            return {"type": "thinking_delta", "thinking": piece}
        case "tool_call":
            return {"type": "input_json_delta", "partial_json": piece}


def _restarted(job_id: str) -> JobFailed:
    return JobFailed(
        "The job began anew after part of its answer was sent. Its whole answer is on the job.",
        code="attempt_restarted",
        job_id=job_id,
    )


def _frame(event: Body) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), msgspec.json.encode(event))
