"""Results and errors files: readable while they grow, whole after any end, tidy at the last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backchannel.cli import results
from backchannel.cli.lines import BadLine
from backchannel.cli.records import Records
from backchannel.cli.screen import Failure

FOUND: dict[str, Any] = {
    "id": "batch_req_1_3",
    "custom_id": "c",
    "response": {
        "status_code": 200,
        "request_id": "job_123",
        "body": {"model": "openai:gpt-5-mini", "choices": []},
    },
    "error": None,
    "seq": 7,
}


def records(path: Path) -> list[dict[str, Any]]:
    """The file's lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def opened(path: Path) -> Records:
    """A file of records with an id and a key."""
    return Records(path, lambda record: record["key"], lambda record: record["n"] > 0)


def test_a_record_is_the_batch_s_under_the_line_s_own_id() -> None:
    assert results.record_of("line_3_x", FOUND) == {
        "id": "line_3_x",
        "custom_id": "c",
        "response": FOUND["response"],
        "error": None,
    }


def test_only_successes_count_as_done(tmp_path: Path) -> None:
    file = results.open_results(tmp_path / "out.jsonl", echo_counts=True)
    file.add("c", results.record_of("line_3_x", FOUND))
    refused = {"custom_id": "d", "response": FOUND["response"] | {"status_code": 400}}
    file.add("d", results.record_of("line_4_x", FOUND | refused))
    file.close()
    again = results.open_results(tmp_path / "out.jsonl", echo_counts=True)
    assert again.done == {"c": "line_3_x"}


def test_bad_lines_are_told_apart_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "err.jsonl"
    file = results.open_errors(path)
    for number in (1, 2):
        file.add(results.bad_key(number), results.bad(BadLine(number, None, "It is not JSON.")))
    file.close()
    assert sorted(results.open_errors(path).keys()) == [results.bad_key(1), results.bad_key(2)]
    assert records(path)[1]["error"]["message"] == "Line 2: It is not JSON."


def test_a_record_can_be_read_as_soon_as_it_is_added(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    file = opened(path)
    assert not path.exists()
    file.add("a", {"key": "a", "n": 1})
    assert records(path) == [{"key": "a", "n": 1}]
    file.close()


def test_a_torn_last_line_is_cut_off_when_writing_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"key":"a","n":1,"id":"x"}\n{"key":"b","n')
    file = opened(path)
    assert file.done == {"a": "x"}
    file.add("c", {"key": "c", "n": 1})
    file.close()
    assert [record["key"] for record in records(path)] == ["a", "c"]


def test_the_last_record_of_a_key_counts_and_the_file_is_tidied(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"key":"a","n":1}\n{"key":"b","n":1}\n')
    file = opened(path)
    file.add("a", {"key": "a", "n": 2})
    assert len(records(path)) == 3
    file.close()
    assert records(path) == [{"key": "b", "n": 1}, {"key": "a", "n": 2}]


def test_the_order_asked_for_is_the_order_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    file = opened(path)
    for key in "dbca":
        file.add(key, {"key": key, "n": 1})
    file.close(order="abcd")
    assert [record["key"] for record in records(path)] == list("abcd")
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_ends_up_empty_goes(tmp_path: Path) -> None:
    path = tmp_path / "err.jsonl"
    path.write_text('{"key":"a","n":1}\n')
    file = opened(path)
    file.drop("a")
    file.close()
    assert not path.exists()


def test_somebody_elses_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("Buy milk\n")
    with pytest.raises(Failure, match=r"notes\.txt is not a file of results: line 1") as failure:
        opened(path)
    assert failure.value.code == 2
    assert path.read_text() == "Buy milk\n"


def test_a_device_is_only_written_to() -> None:
    file = opened(Path("/dev/null"))
    file.add("a", {"key": "a", "n": 1})
    file.add("a", {"key": "a", "n": 2})
    file.close()
    assert Path("/dev/null").is_char_device()
