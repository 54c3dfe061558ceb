"""A finished job as OpenAI's chat completion, and its tokens as that counts them."""

from __future__ import annotations

from typing import Any

PREFIX = "chatcmpl-"  # of the id, before the digits of the job's

Usage = dict[str, Any]


def completion(
    job_id: str,
    created_s: int,
    model: str,
    message: dict[str, Any] | None,
    finish_reason: str | None,
    usage: Usage | None,
    metadata: dict[str, str],
) -> dict[str, Any]:
    """The object ``chat.completion``.

    Args:
        message: The answer as the job has it.
        usage: As in the job; None where no provider was called.
    """
    return {
        "id": PREFIX + job_id.removeprefix("job_"),
        "object": "chat.completion",
        "created": created_s,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": _answer(message),
                "finish_reason": finish_reason or "stop",
                "logprobs": None,
            }
        ],
        "usage": chat_usage(usage),
        "metadata": metadata,
    }


def _answer(message: dict[str, Any] | None) -> dict[str, Any]:
    said = message or {}
    shown = {"role": "assistant", "content": said.get("content"), "refusal": None}
    if "reasoning" in said:
        shown["reasoning_content"] = said["reasoning"]
    if "tool_calls" in said:
        shown["tool_calls"] = said["tool_calls"]
    return shown


def stored_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message that was asked, as the SDK reads stored ones: its parts stand beside the text."""
    content = message.get("content")
    parts = content if isinstance(content, list) else None
    text = content if parts is None else None
    return {"refusal": None, **message, "content": text, "content_parts": parts}


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
