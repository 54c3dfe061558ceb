"""A job's events as those of a streamed response: the same events in, the same bytes out.

A pure function of the response's head and the job's log, so that a stream which is resumed,
replayed from the database or followed through another API process is the one that was live.
Source: OpenAI's reference of the Responses API's streaming events, and the types of its SDK 3.54.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from backchannel import events
from backchannel.errors import BackchannelError
from backchannel.events import Event, fields
from backchannel.pieces import Item, Pieces, Step
from backchannel.response_output import ending, item_id, part, shown
from backchannel.tables import SUCCEEDED

Body = dict[str, Any]


class ResponseEvents:
    """One stream, from `response.created` to its end, numbered from 0 without gaps.

    Args:
        head: The response as it was created: queued, without output.
        after: The last number the reader has; what it has is not said again.
    """

    def __init__(self, job_id: str, head: Body, after: int = -1) -> None:
        self.over = False
        self.response = head  # as the last event that carried it said it
        self._job_id = job_id
        self._pieces = Pieces()
        self._after = after
        self._number = 0

    def first(self) -> list[bytes]:
        """What is said before the job says anything."""
        return self._frames([self._told("response.created")])

    def take(self, event: Event | BackchannelError) -> list[bytes]:
        """The frames of one event of the job."""
        if isinstance(event, BackchannelError):
            self.over = True
            # without a number: it is of this connection, not of the response
            return [_frame({"type": "error", **event.body()["error"], **event.body()})]
        return self._frames(self._events(*fields(event)))

    def _frames(self, said: Iterable[Body]) -> list[bytes]:
        frames = []
        for event in said:
            if self._number > self._after:
                frames.append(_frame({**event, "sequence_number": self._number}))
            self._number += 1
        return frames

    def _events(self, type_: str, own: Body) -> Iterator[Body]:
        match type_:
            case events.STARTED:
                yield self._told("response.in_progress", status="in_progress")
            case events.RESET:
                # what the lost attempt said stays incomplete, and the next one opens new items
                yield from self._abandon()
                self._pieces.restart()
                self.response = {**self.response, "model": own["model"]}  # it may be another one
                if self.response["status"] == "queued":
                    yield self._told("response.in_progress", status="in_progress")
            case events.END:
                yield from self._end(own)
                self.over = True
            case _:
                for step in self._pieces.take(type_, own):
                    yield from self._step(step)

    # ------------------------------------------------------------ items

    def _step(self, step: Step, *, status: str = "completed") -> Iterator[Body]:
        item = step.item
        match step.what:
            case "open":
                begun = shown(self._job_id, item, "in_progress")
                yield {**self._place(item, "response.output_item.added"), "item": begun}
                if item.kind != "tool_call":
                    yield {**self._part(item, "added"), "part": part(item, "")}
            case "piece":
                yield {**self._named(item, "delta"), "delta": step.piece, **_logprobs(item)}
            case "close":
                whole = "arguments" if item.kind == "tool_call" else "text"
                yield {**self._named(item, "done"), whole: item.text, **_logprobs(item)}
                if item.kind != "tool_call":
                    yield {**self._part(item, "done"), "part": part(item, item.text)}
                yield self._done(item, status)

    def _abandon(self) -> Iterator[Body]:
        """Close what is open, without saying of a torn text that it is whole."""
        for step in self._pieces.close():
            yield self._done(step.item, "incomplete")

    def _done(self, item: Item, status: str) -> Body:
        place = self._place(item, "response.output_item.done")
        return {**place, "item": shown(self._job_id, item, status)}

    def _place(self, item: Item, type_: str) -> Body:
        return {"type": type_, "output_index": item.index}

    def _part(self, item: Item, what: str) -> Body:
        place = self._place(item, f"response.content_part.{what}")
        return {**place, "item_id": item_id(self._job_id, item), "content_index": 0}

    def _named(self, item: Item, what: str) -> Body:
        more: Body
        match item.kind:
            case "text":
                type_, more = "response.output_text", {"content_index": 0}
            case "reasoning":
                type_, more = "response.reasoning_text", {"content_index": 0}
            case _:
                type_, more = "response.function_call_arguments", {}
                if what == "done":
                    more = {"name": item.name}
        return {
            **self._place(item, f"{type_}.{what}"),
            "item_id": item_id(self._job_id, item),
            **more,
        }

    # ------------------------------------------------------------ the response itself

    def _end(self, own: Body) -> Iterator[Body]:
        changes = ending(self._job_id, self._pieces.items, own)
        if own["state"] == SUCCEEDED:
            for step in self._pieces.close():
                yield from self._step(step, status=changes["status"])
        else:
            yield from self._abandon()
        # there is no event for "cancelled"
        name = "incomplete" if changes["status"] == "cancelled" else changes["status"]
        yield self._told(f"response.{name}", **changes)

    def _told(self, type_: str, **changes: Any) -> Body:
        self.response = {**self.response, **changes}
        return {"type": type_, "response": self.response}


def finished_response(job_id: str, head: Body, log: Iterable[Event]) -> Body:
    """The response at the end of its stream."""
    said = ResponseEvents(job_id, head)
    for event in log:
        said.take(event)
    return said.response


def _logprobs(item: Item) -> Body:
    return {"logprobs": []} if item.kind == "text" else {}


def _frame(event: Body) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), msgspec.json.encode(event))
