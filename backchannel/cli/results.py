"""The output of a run: OpenAI's batch output lines, in a results file and an errors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backchannel.cli.lines import BadLine
from backchannel.cli.records import Records

DONE_STATUS = 200


def open_results(path: Path, *, echo_counts: bool) -> Records:
    """The results file; ``done`` are the lines that need no job any more.

    Args:
        echo_counts: Whether a prompt that the offline model repeated is an answer.
    """

    def is_done(record: dict[str, Any]) -> bool:
        return _succeeded(record) and (echo_counts or not _is_echo(record))

    return Records(path, lambda record: record["custom_id"], is_done)


def open_errors(path: Path) -> Records:
    """The errors file."""
    return Records(path, _error_key)


def _succeeded(record: dict[str, Any]) -> bool:
    answer = record.get("response") or {}
    return record.get("error") is None and answer.get("status_code") == DONE_STATUS


def _is_echo(record: dict[str, Any]) -> bool:
    model = record["response"]["body"].get("model")
    return isinstance(model, str) and model.startswith("echo:")


def _error_key(record: dict[str, Any]) -> str:
    error = record["error"] or {}
    return bad_key(error["line"]) if error.get("code") == "bad_line" else record["custom_id"]


def bad_key(number: int) -> str:
    """The key of a line that has no id of its own, or somebody else's."""
    return f"\0{number}"


def record_of(line_id: str, found: dict[str, Any]) -> dict[str, Any]:
    """A line of a batch's output or errors, under the id that says what it answers."""
    return {
        "id": line_id,
        "custom_id": found["custom_id"],
        "response": found["response"],
        "error": found["error"],
    }


def bad(line: BadLine) -> dict[str, Any]:
    """The errors line of an input line that was not sent."""
    return {
        "id": f"line_{line.number}",
        "custom_id": line.custom_id,
        "response": None,
        "error": {
            "code": "bad_line",
            "message": f"Line {line.number}: {line.message}",
            "line": line.number,
        },
    }
