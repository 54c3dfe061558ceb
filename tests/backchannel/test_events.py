"""Events and their log: the bytes that were sent are the bytes that are replayed."""

from __future__ import annotations

import json
import zlib

from hypothesis import given
from hypothesis import strategies as st

from backchannel.events import (
    DELTA,
    END,
    FLUSH_MS,
    STARTED,
    decode,
    encode,
    next_seq_after_loss,
    pack_log,
    unpack_log,
)

text = st.text(st.characters(exclude_categories=["Cs"]))


def test_an_event_is_one_object_on_one_line() -> None:
    event = encode(3, DELTA, {"text": "a\nb\u2028c"})
    assert b"\n" not in event.data
    assert json.loads(event.data) == {"seq": 3, "type": "delta", "text": "a\nb\u2028c"}


@given(st.lists(text, min_size=1))
def test_a_log_gives_back_every_byte(pieces: list[str]) -> None:
    events = [encode(0, STARTED, {"attempt": 1, "model": "echo:echo-1"})]
    events += [encode(seq, DELTA, {"text": piece}) for seq, piece in enumerate(pieces, 1)]
    events.append(encode(len(events), END, {"state": "succeeded", "usage": None}))
    assert unpack_log(pack_log(events)) == events


@given(st.integers(min_value=0), text)
def test_a_line_knows_its_number_and_type(seq: int, piece: str) -> None:
    seq %= 2**63
    event = encode(seq, DELTA, {"text": piece})
    assert decode(event.data) == event


def test_a_long_answer_is_stored_small() -> None:
    events = [encode(seq, DELTA, {"text": "the same words "}) for seq in range(1000)]
    assert len(pack_log(events)) < sum(len(event.data) for event in events) / 5


def test_a_log_is_plain_lines_under_zlib() -> None:
    events = [encode(seq, DELTA, {"text": str(seq)}) for seq in range(3)]
    assert zlib.decompress(pack_log(events)).split(b"\n") == [event.data for event in events]


def test_a_number_after_a_loss_is_beyond_what_anybody_saw() -> None:
    # four events a flush, one flush a FLUSH_MS, the first at once
    for elapsed_ms in (0, 1, FLUSH_MS, 1_000, 3_600_000):
        seen = (elapsed_ms // FLUSH_MS + 1) * 4
        assert next_seq_after_loss(elapsed_ms) >= seen
    assert next_seq_after_loss(-5) > 0
