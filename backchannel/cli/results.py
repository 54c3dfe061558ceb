"""The output of a run: OpenAI's batch output lines, in a results file and an errors file."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from backchannel.cli.lines import BadLine, Line
from backchannel.cli.records import Records

# The HTTP status that stands for an error of a job; anything else is the provider's failure.
STATUS = {
    "rate_limited": 429,
    "auth": 401,
    "billing": 402,
    "context_length": 400,
    "invalid_request": 400,
    "content_filter": 400,
    "provider_not_found": 400,
    "provider_key_missing": 400,
    "unsupported_parameter": 400,
    "overloaded": 503,
}
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


def success(line: Line, job: dict[str, Any]) -> dict[str, Any]:
    """The output line of a job that succeeded."""
    return {
        "id": line.id,
        "custom_id": line.custom_id,
        "response": {
            "status_code": DONE_STATUS,
            "request_id": job["id"],
            "body": completion(job),
        },
        "error": None,
    }


def completion(job: dict[str, Any]) -> dict[str, Any]:
    """A job's answer as a chat completion."""
    return {
        "id": f"chatcmpl-{job['id'].partition('_')[2]}",
        "object": "chat.completion",
        "created": int(datetime.fromisoformat(job["created_at"]).timestamp()),
        "model": job["model"],
        "choices": [
            {
                "index": 0,
                "message": job["message"],
                "finish_reason": job["finish_reason"],
                "logprobs": None,
            }
        ],
        "usage": _usage(job["usage"]),
    }


def _usage(usage: dict[str, Any] | None) -> dict[str, Any] | None:
    if usage is None or usage["input_tokens"] is None or usage["output_tokens"] is None:
        return None  # unknown is not zero
    return {
        "prompt_tokens": usage["input_tokens"],
        "completion_tokens": usage["output_tokens"],
        "total_tokens": usage["input_tokens"] + usage["output_tokens"],
        "prompt_tokens_details": {"cached_tokens": usage["cached_tokens"]},
        "completion_tokens_details": {"reasoning_tokens": usage["reasoning_tokens"]},
        "cost_usd": usage["cost_usd"],
    }


def failure(line: Line, job: dict[str, Any]) -> dict[str, Any]:
    """The errors line of a job that failed, was cancelled or expired."""
    error = job["error"] or {"code": job["state"], "message": f"The job is {job['state']}."}
    if job["state"] != "failed":
        named = {"code": f"job_{job['state']}", "message": error["message"], "job": job["id"]}
        return {"id": line.id, "custom_id": line.custom_id, "response": None, "error": named}
    body = {
        "message": error["message"], "type": "provider_error", "code": error["code"], "param": None,
    }  # fmt: skip
    return refusal(line, STATUS.get(error["code"], 502), {"error": body}, job["id"])


def refusal(line: Line, status: int, body: Any, job_id: str | None = None) -> dict[str, Any]:
    """The errors line of an answer that is an HTTP error."""
    return {
        "id": line.id,
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": job_id, "body": body},
        "error": None,
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
