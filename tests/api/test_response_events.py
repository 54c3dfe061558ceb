"""A response's stream is a function of the job's log: dense, and the same from anywhere."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from api.chat_chunks import Chunks
from api.message_events import MessageEvents
from api.response_events import ResponseEvents, finished_response
from backchannel.errors import Unavailable
from backchannel.events import Event, encode, end_fields

HEAD: dict[str, Any] = {
    "id": "resp_1",
    "status": "queued",
    "output": [],
    "usage": None,
    "model": "m",
}
USAGE = {
    "input_tokens": 9, "cached_tokens": 4, "cache_write_tokens": 2, "output_tokens": 3,
    "reasoning_tokens": 1, "cost_usd": 0.5,
}  # fmt: skip

Said = tuple[str, dict[str, Any]]
STARTED: Said = ("started", {"attempt": 1, "model": "m"})
RESET: Said = ("reset", {"attempt": 2, "model": "m"})
FALLBACK: Said = ("reset", {"attempt": 2, "model": "other"})


def delta(text: str) -> Said:
    return ("delta", {"text": text})


def reasoning(text: str) -> Said:
    return ("reasoning", {"text": text})


def call(index: int, arguments: str, **named: str) -> Said:
    return ("tool_call", {"index": index, "arguments": arguments, "id": "c", "name": "", **named})


def end(state: str = "succeeded", reason: str | None = "stop", code: str | None = None) -> Said:
    return ("end", end_fields(state, reason, USAGE, code, code and "It broke."))


def log(*said: Said) -> list[Event]:
    return [encode(seq, type_, own) for seq, (type_, own) in enumerate(said)]


def frames(events: list[Event], after: int = -1) -> list[bytes]:
    told = ResponseEvents("job_1", dict(HEAD), after)
    out = told.first()
    for event in events:
        out += told.take(event)
    return out


def data(frame: bytes) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(frame.partition(b"data: ")[2])
    return value


def told(*said: Said) -> list[dict[str, Any]]:
    return [data(frame) for frame in frames(log(*said))]


pieces = st.one_of(
    st.text(max_size=3).map(delta),
    st.text(max_size=3).map(reasoning),
    st.builds(call, st.integers(0, 2), st.text(max_size=3)),
    st.just(RESET),
    st.just(("retrying", {"attempt": 1})),
)
ends = st.sampled_from(
    [end(), end(reason="length"), end("failed", None, "auth"), end("cancelled", None)]
)


@given(st.lists(pieces), ends, st.integers(-1, 40))
def test_any_stream_is_dense_and_its_rest_is_its_end(
    said: list[Said], last: Said, after: int
) -> None:
    events = log(STARTED, *said, last)
    whole = frames(events)
    assert [data(frame)["sequence_number"] for frame in whole] == [*range(len(whole))]
    assert frames(events, after) == whole[after + 1 :]
    assert data(whole[-1])["response"] == finished_response("job_1", dict(HEAD), events)


@given(st.lists(pieces), ends)
def test_every_item_opens_once_closes_once_and_nothing_is_said_outside(
    said: list[Said], last: Said
) -> None:
    open_: set[int] = set()
    indexes = []
    for event in told(STARTED, *said, last):
        index = event.get("output_index")
        if event["type"] == "response.output_item.added":
            indexes.append(index)
            open_.add(index)
        elif index is not None:
            assert index in open_
        if event["type"] == "response.output_item.done":
            open_.remove(index)
    assert open_ == set()
    assert indexes == [*range(len(indexes))]


def test_a_restart_closes_the_item_as_incomplete_and_is_no_part_of_the_answer() -> None:
    events = told(STARTED, delta("half"), RESET, delta("whole"), end())
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert [(item["status"], item["content"][0]["text"]) for item in done] == [
        ("incomplete", "half"),
        ("completed", "whole"),
    ]
    # nobody may take the torn text for a whole one
    texts = [e["text"] for e in events if e["type"] == "response.output_text.done"]
    assert texts == ["whole"]
    assert events[-1]["response"]["output"] == [done[1]]


def test_a_fallback_answers_under_its_own_name() -> None:
    heard = told(STARTED, FALLBACK, delta("a"), end())
    models = [event["response"]["model"] for event in heard if "response" in event]
    assert models == ["m", "m", "other"]


def test_a_restart_before_the_first_piece_is_silent() -> None:
    assert told(STARTED, RESET, delta("a"), end()) == told(STARTED, delta("a"), end())


def test_interleaved_calls_stay_apart() -> None:
    events = told(
        STARTED, call(3, "{", id="a", name="f"), call(5, "[", id="b", name="g"),
        call(3, "}"), call(5, "]"), end(reason="tool_calls"),
    )  # fmt: skip
    shown = [(c["call_id"], c["arguments"]) for c in events[-1]["response"]["output"]]
    assert shown == [("a", "{}"), ("b", "[]")]


def test_codes_outside_of_openais_list_stand_beside_it() -> None:
    failed = told(STARTED, end("failed", None, "malformed"))[-1]
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"] == {
        "code": "server_error", "message": "It broke.", "type": "malformed",
    }  # fmt: skip


# ---------------------------------------------------------------- the other faces' streams


def chunks(*said: Said) -> list[Any]:
    translator = Chunks("job_1", 1, "m", include_usage=False)
    out: list[Any] = []
    for event in log(*said):
        out += [frame.removeprefix(b"data: ").strip() for frame in translator.take(event)]
        if translator.over:
            break
    return [json.loads(frame) if frame != b"[DONE]" else None for frame in out]


def test_a_chat_breaks_off_only_when_something_was_said_before_the_restart() -> None:
    silent = chunks(STARTED, RESET, delta("a"), end())
    assert silent == chunks(STARTED, delta("a"), end())
    *_, last = chunks(STARTED, delta("a"), RESET, delta("b"), end())
    assert last["error"]["code"] == "attempt_restarted"


def test_a_chat_whose_first_attempt_nobody_remembers_begins_like_any_other() -> None:
    assert chunks(RESET, delta("a"), end()) == chunks(STARTED, delta("a"), end())


def test_tool_calls_of_a_chat_are_counted_from_0() -> None:
    calls = [
        piece
        for chunk in chunks(STARTED, call(4, "{", name="f"), call(4, "}"), end())[:-1]
        for piece in chunk["choices"][0]["delta"].get("tool_calls", ())
    ]
    assert [each["index"] for each in calls] == [0, 0]
    assert (calls[0]["id"], calls[0]["function"]["name"]) == ("c", "f")


def test_a_message_counts_its_input_without_what_was_cached() -> None:
    translator = MessageEvents("job_1", "m")
    out = [data(frame) for event in log(STARTED, end()) for frame in translator.take(event)]
    usage = out[-2]["usage"]
    names = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    assert [usage[name] for name in names] == [3, 4, 2]


def test_every_stream_says_why_it_ends_when_the_process_stops() -> None:
    for translator in (
        Chunks("job_1", 1, "m", include_usage=False),
        ResponseEvents("job_1", dict(HEAD)),
        MessageEvents("job_1", "m"),
    ):
        [frame] = translator.take(Unavailable("It stops.", code="api_stopping"))
        assert data(frame)["error"]["code"] == "api_stopping"
        assert translator.over
