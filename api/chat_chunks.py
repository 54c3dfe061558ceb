"""A job's events as the chunks of a streamed chat completion."""

from __future__ import annotations

from typing import Any

import msgspec

from backchannel import events
from backchannel.chat_output import PREFIX, chat_usage
from backchannel.errors import BackchannelError, JobFailed, job_failed
from backchannel.events import Event, fields
from backchannel.tables import SUCCEEDED

DONE = b"data: [DONE]\n\n"


def frame(value: dict[str, Any]) -> bytes:
    """One server-sent event without a name."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class Chunks:
    """One stream. Its form cannot take anything back: a second attempt's text ends it instead."""

    def __init__(self, job_id: str, created_s: int, model: str, *, include_usage: bool) -> None:
        self._job_id = job_id
        self._include_usage = include_usage
        self.over = False
        self._begun = False
        self._said = False  # something of the answer has gone out
        self._calls: dict[int, int] = {}  # the provider's number of a tool call → its place
        self._head = {
            "id": PREFIX + job_id.removeprefix("job_"),
            "object": "chat.completion.chunk",
            "created": created_s,
            "model": model,
        }

    def take(self, event: Event | BackchannelError) -> list[bytes]:
        """The chunks of one event of the job."""
        if isinstance(event, BackchannelError):
            return self._break_off(event)
        type_, own = fields(event)
        if type_ == events.RESET:
            self._head["model"] = own["model"]  # it may be another one
        match type_:
            case events.STARTED | events.RESET if not self._begun:
                self._begun = True
                return [self._chunk({"role": "assistant", "content": "", "refusal": None})]
            case events.DELTA:
                return [self._piece({"content": own["text"]})]
            case events.REASONING:
                return [self._piece({"reasoning_content": own["text"]})]
            case events.TOOL_CALL:
                return [self._piece({"tool_calls": [self._tool_call(own)]})]
            case events.RESET if self._said:
                return self._break_off(_restarted(self._job_id))
            case events.END:
                return self._end(own)
            case _:
                return []

    def _piece(self, delta: dict[str, Any]) -> bytes:
        self._said = True
        return self._chunk(delta)

    def _tool_call(self, own: dict[str, Any]) -> dict[str, Any]:
        first = own["index"] not in self._calls
        index = self._calls.setdefault(own["index"], len(self._calls))
        function = {"arguments": own["arguments"]}
        if not first:
            return {"index": index, "function": function}
        named = {"name": own["name"], **function}
        return {"index": index, "id": own["id"], "type": "function", "function": named}

    def _end(self, own: dict[str, Any]) -> list[bytes]:
        if own["state"] != SUCCEEDED:
            return self._break_off(job_failed(self._job_id, own["state"], own["error"]))
        frames = [self._chunk({}, own["finish_reason"] or "stop")]
        if self._include_usage:
            frames.append(frame({**self._head, "choices": [], "usage": chat_usage(own["usage"])}))
        return [*frames, DONE]

    def _break_off(self, error: BackchannelError) -> list[bytes]:
        self.over = True
        return [frame(error.body())]

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return frame({**self._head, "choices": [choice]})


def _restarted(job_id: str) -> JobFailed:
    return JobFailed(
        "The job began anew after part of its answer was sent. Fetch the whole answer by its id.",
        code="attempt_restarted",
        job_id=job_id,
    )
