"""What a running job says: the events of its stream, and the log that replays them byte for byte.

An event is one JSON object on one line, ``{"seq":0,"type":"started",…}``, numbered from 0 without
gaps. The bytes a reader gets live are the bytes that are stored and replayed.

    started    {attempt, model}                 an attempt began
    delta      {text}                           a piece of the answer
    reasoning  {text}                           a piece of the model's visible reasoning
    signature  {signature}                      of the reasoning before it, for its provider
    tool_call  {index, id?, name?, arguments}   a piece of a tool call, as in chat completions
    retrying   {attempt, code, message, delay_ms}  it failed; the next one starts in `delay_ms`
    reset      {attempt, model}                 another attempt began: forget the text so far
    end        {state, finish_reason, usage, error}   exactly once, the last
"""

from __future__ import annotations

import zlib
from typing import Any

import msgspec

STARTED = "started"
DELTA = "delta"
REASONING = "reasoning"
SIGNATURE = "signature"
TOOL_CALL = "tool_call"
RETRYING = "retrying"
RESET = "reset"
END = "end"

_encode = msgspec.json.Encoder().encode


class Event(msgspec.Struct, frozen=True, gc=False):
    """One numbered event, encoded."""

    seq: int
    type: str
    data: bytes


class _Head(msgspec.Struct):
    seq: int
    type: str


_decode_head = msgspec.json.Decoder(_Head).decode


def encode(seq: int, type_: str, own: dict[str, Any]) -> Event:
    """Number and encode one event with its own fields."""
    return Event(seq, type_, _encode({"seq": seq, "type": type_, **own}))


def decode(data: bytes) -> Event:
    """The event of one line of a log."""
    head = _decode_head(data)
    return Event(head.seq, head.type, data)


def end_fields(
    state: str,
    finish_reason: str | None = None,
    usage: dict[str, Any] | None = None,
    error_code: str | None = None,
    error_message: str | None = None,
) -> dict[str, Any]:
    """What the end event says; it must agree with the row of the same transaction."""
    error = None if error_code is None else {"code": error_code, "message": error_message}
    return {"state": state, "finish_reason": finish_reason, "usage": usage, "error": error}


def fields(event: Event) -> tuple[str, dict[str, Any]]:
    """An event's type and its own fields, as `encode` took them."""
    whole: dict[str, Any] = msgspec.json.decode(event.data)
    del whole["seq"]
    return whole.pop("type"), whole


def pack_log(events: list[Event]) -> bytes:
    """The whole stream of a job as it is stored: one event a line, compressed with zlib."""
    return zlib.compress(b"\n".join(event.data for event in events), level=1)


def unpack_log(log: bytes) -> list[Event]:
    """The events of a stored log, in order."""
    return [decode(line) for line in zlib.decompress(log).split(b"\n") if line]


# Of whatever is lost with Redis AND its writer, no reader saw more events than this a second:
# a process flushes a job's deltas at most once per FLUSH_MS, as one event per kind of piece.
FLUSH_MS = 15
_EVENTS_PER_FLUSH = 4


def next_seq_after_loss(elapsed_ms: int) -> int:
    """A sequence number that no reader can have seen, when nobody knows the last one.

    Only for a job whose log vanished from Redis together with the process that held it (see
    docs/decisions/0003-stream-numbers.md). It keeps a resuming reader from skipping into the
    middle of another attempt's text.
    """
    return (max(elapsed_ms, 0) // FLUSH_MS + 1) * _EVENTS_PER_FLUSH
