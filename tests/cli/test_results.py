"""Results and errors files: readable while they grow, whole after any end, tidy at the last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backchannel.cli import results
from backchannel.cli.lines import BadLine, Line
from backchannel.cli.records import Records
from backchannel.cli.screen import Failure

LINE = Line(3, "c", None, {"prompt": "Hi", "metadata": {"custom_id": "c"}})
JOB: dict[str, Any] = {
    "id": "job_123",
    "state": "succeeded",
    "model": "openai:gpt-5-mini",
    "created_at": "2026-11-22T03:00:00.250Z",
    "finish_reason": "stop",
    "message": {"role": "assistant", "content": "Hello"},
    "usage": {
        "input_tokens": 5,
        "cached_tokens": 1,
        "cache_write_tokens": 0,
        "output_tokens": 7,
        "reasoning_tokens": 2,
        "cost_usd": 0.0012,
        "cost_nanousd": 1_200_000,
        "price_date": "2026-11-01",
        "source": "final",
    },
    "error": None,
}


def records(path: Path) -> list[dict[str, Any]]:
    """The file's lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def opened(path: Path) -> Records:
    """A file of records with an id and a key."""
    return Records(path, lambda record: record["key"], lambda record: record["n"] > 0)


def test_a_success_is_an_openai_batch_output_line() -> None:
    from openai.types.chat import ChatCompletion

    found = results.success(LINE, JOB)
    assert found["custom_id"] == "c"
    assert found["id"].startswith("line_3_")
    assert found["error"] is None
    assert found["response"]["status_code"] == 200
    assert found["response"]["request_id"] == "job_123"
    answer = ChatCompletion.model_validate(found["response"]["body"], strict=True)
    assert answer.choices[0].message.content == "Hello"
    assert answer.usage is not None
    assert (answer.usage.total_tokens, answer.created) == (12, 1795316400)
    assert found["response"]["body"]["usage"]["cost_usd"] == 0.0012


def test_unknown_usage_is_not_zero() -> None:
    usage = JOB["usage"] | {"input_tokens": None, "output_tokens": None, "source": "unknown"}
    assert results.completion(JOB | {"usage": usage})["usage"] is None


@pytest.mark.parametrize(
    ("state", "code", "status"),
    [("failed", "auth", 401), ("failed", "truncated", 502), ("failed", "context_length", 400)],
)
def test_a_failure_is_an_http_error_with_the_jobs_id(state: str, code: str, status: int) -> None:
    job = JOB | {"state": state, "error": {"code": code, "message": "No."}}
    found = results.failure(LINE, job)
    assert found["error"] is None
    assert found["response"]["status_code"] == status
    assert found["response"]["request_id"] == "job_123"
    assert found["response"]["body"]["error"]["code"] == code


def test_a_job_that_never_answered_has_no_response() -> None:
    error = {"code": "expired", "message": "Its deadline passed."}
    found = results.failure(LINE, JOB | {"state": "expired", "error": error})
    assert found["response"] is None
    assert found["error"] == {
        "code": "job_expired", "message": "Its deadline passed.", "job": "job_123",
    }  # fmt: skip


def test_only_successes_count_as_done(tmp_path: Path) -> None:
    file = results.open_results(tmp_path / "out.jsonl", echo_counts=True)
    file.add("c", results.success(LINE, JOB))
    file.add("d", results.refusal(LINE, 400, {}) | {"custom_id": "d"})
    file.close()
    again = results.open_results(tmp_path / "out.jsonl", echo_counts=True)
    assert again.done == {"c": LINE.id}


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
