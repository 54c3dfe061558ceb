"""A job as OpenAI's response: as it was created, its items, and as it ended.

Source: OpenAI's reference of the Responses API, and the types of its SDK 3.54.
"""

from __future__ import annotations

from typing import Any

from backchannel.pieces import Item
from backchannel.tables import CANCELLED, SUCCEEDED

PREFIX = "resp_"  # of the id, before the digits of the job's

Body = dict[str, Any]

# OpenAI's list of codes is closed; ours stands beside it, as the error's type.
_ERROR_CODES = {
    "rate_limited": "rate_limit_exceeded",
    "context_length": "invalid_prompt",
    "invalid_request": "invalid_prompt",
}
INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
_ITEM_PREFIX = {"text": "msg", "reasoning": "rs", "tool_call": "fc"}


def head(
    job_id: str,
    created_s: int,
    model: str,
    metadata: dict[str, str],
    session: str | None,
    asked: Body,
) -> Body:
    """A response as it was created: all of it that no event changes.

    Args:
        asked: The fields of the request, as they were sent.
    """
    return {
        "id": PREFIX + job_id.removeprefix("job_"),
        "object": "response",
        "created_at": created_s,
        "status": "queued",
        "background": asked.get("background", False),
        "error": None,
        "incomplete_details": None,
        "instructions": asked.get("instructions"),
        "max_output_tokens": asked.get("max_output_tokens"),
        "metadata": metadata,
        "model": model,
        "output": [],
        "parallel_tool_calls": asked.get("parallel_tool_calls", True),
        "previous_response_id": asked.get("previous_response_id"),
        "prompt_cache_key": asked.get("prompt_cache_key"),
        "reasoning": asked.get("reasoning", {"effort": None, "summary": None}),
        "safety_identifier": asked.get("safety_identifier"),
        "service_tier": asked.get("service_tier"),
        "store": asked.get("store", True),
        "temperature": asked.get("temperature"),
        "text": {"format": {"type": "text"}, **asked.get("text", {})},
        "tool_choice": asked.get("tool_choice", "auto"),
        "tools": asked.get("tools", []),
        "top_p": asked.get("top_p"),
        "truncation": asked.get("truncation", "disabled"),
        "usage": None,
        "user": asked.get("user"),
        "x_backchannel": {"job": job_id, "session": session},
    }


def ending(job_id: str, items: list[Item], end: Body) -> Body:
    """What the end of a job changes in its response.

    Args:
        items: Of the last attempt only: what the one before had said is no part of the answer.
        end: The fields of the job's end event.
    """
    state, reason = end["state"], INCOMPLETE.get(end["finish_reason"] or "")
    changes: Body = {"usage": response_usage(end["usage"])}
    if state == SUCCEEDED:
        changes["status"] = last = "completed" if reason is None else "incomplete"
        if reason is not None:
            changes["incomplete_details"] = {"reason": reason}
    else:
        last = "incomplete"
        changes["status"] = "cancelled" if state == CANCELLED else "failed"
        if state != CANCELLED:
            changes["error"] = _error(end["error"])
    changes["output"] = [
        shown(job_id, item, last if item is items[-1] else "completed") for item in items
    ]
    return changes


def _error(error: Body | None) -> Body:
    known = error or {"code": "internal_error", "message": None}
    return {
        "code": _ERROR_CODES.get(known["code"], "server_error"),
        "message": known["message"] or f"The job ended with {known['code']}.",
        "type": known["code"],
    }


# ---------------------------------------------------------------- items


def item_id(job_id: str, item: Item) -> str:
    """The public id of an item."""
    return f"{_ITEM_PREFIX[item.kind]}_{job_id.removeprefix('job_')}_{item.index}"


def shown(job_id: str, item: Item, status: str) -> Body:
    """An item of the output; while it is in progress without its content."""
    begun = status != "in_progress"
    head_: Body = {"id": item_id(job_id, item), "status": status}
    content = [part(item, item.text)] if begun else []
    match item.kind:
        case "text":
            return {**head_, "type": "message", "role": "assistant", "content": content}
        case "reasoning":
            return {**head_, "type": "reasoning", "summary": [], "content": content}
        case "tool_call":
            return {
                **head_,
                "type": "function_call",
                "call_id": item.call_id,
                "name": item.name,
                "arguments": item.text if begun else "",
            }


def part(item: Item, text: str) -> Body:
    """The one part that an item's content has."""
    if item.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def response_usage(usage: Body | None) -> Body | None:
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
