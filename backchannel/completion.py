"""A finished job as OpenAI's chat completion, and its tokens as OpenAI counts them."""

from __future__ import annotations

from typing import Any

Usage = dict[str, Any]


def completion(
    job_id: str,
    created_s: int,
    model: str,
    message: dict[str, Any] | None,
    finish_reason: str | None,
    usage: Usage | None,
) -> dict[str, Any]:
    """The object ``chat.completion``.

    Args:
        message: The answer as the job has it.
        usage: As in the job; None where no provider was called.
    """
    return {
        "id": f"chatcmpl-{job_id.removeprefix('job_')}",
        "object": "chat.completion",
        "created": created_s,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": answer(job_id, message),
                "finish_reason": finish_reason or "stop",
                "logprobs": None,
            }
        ],
        "usage": chat_usage(usage),
    }


def answer(job_id: str, message: dict[str, Any] | None) -> dict[str, Any]:
    """A job's message as that of a chat completion."""
    said = message or {}
    shown: dict[str, Any] = {
        "role": "assistant",
        "content": said.get("content"),
        "refusal": None,
    }
    if "reasoning" in said:
        shown["reasoning_content"] = said["reasoning"]
    if "tool_calls" in said:
        shown["tool_calls"] = [
            {
                "id": call_id(job_id, index, call["id"]),
                "type": "function",
                "function": {
                    "name": call["function"]["name"] or "",
                    "arguments": call["function"]["arguments"],
                },
            }
            for index, call in enumerate(said["tool_calls"])
        ]
    return shown


def call_id(job_id: str, index: int, given: str | None) -> str:
    """The id of a tool call; some servers give none, and clients cannot do without."""
    return given or f"call_{job_id.removeprefix('job_')}_{index}"


def chat_usage(usage: Usage | None) -> Usage | None:
    """Tokens as in chat completions; None: unknown, which is not zero."""
    if usage is None or usage["input_tokens"] is None or usage["output_tokens"] is None:
        return None
    return {
        "prompt_tokens": usage["input_tokens"],
        "completion_tokens": usage["output_tokens"],
        "total_tokens": usage["input_tokens"] + usage["output_tokens"],
        "prompt_tokens_details": {"cached_tokens": usage["cached_tokens"] or 0},
        "completion_tokens_details": {"reasoning_tokens": usage["reasoning_tokens"] or 0},
        "cost_usd": usage["cost_usd"],
    }


def response_usage(usage: Usage | None) -> Usage | None:
    """Tokens as in responses; None: unknown, which is not zero."""
    if usage is None or usage["input_tokens"] is None or usage["output_tokens"] is None:
        return None
    return {
        "input_tokens": usage["input_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["cached_tokens"] or 0,
            "cache_write_tokens": usage["cache_write_tokens"] or 0,
        },
        "output_tokens": usage["output_tokens"],
        "output_tokens_details": {"reasoning_tokens": usage["reasoning_tokens"] or 0},
        "total_tokens": usage["input_tokens"] + usage["output_tokens"],
        "cost_usd": usage["cost_usd"],
    }
