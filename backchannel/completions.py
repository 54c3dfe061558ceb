"""Chats in OpenAI's words: the body of a request becomes a chat, a finished job an answer.

Pure translation for both endpoints a batch may name. Sources: OpenAI's references of chat
completions and of responses (request and object).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from pydantic import ValidationError

from backchannel.errors import InvalidRequest, UnsupportedParameter
from backchannel.schemas import CreateJob, place_of

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"


class Asked(NamedTuple):
    """A chat as a body asks for it; the provider has not judged the parameters yet."""

    model: str | None
    messages: list[dict[str, Any]]
    instructions: str | None
    parameters: dict[str, Any]
    metadata: dict[str, str]
    asked: dict[str, Any] | None = None  # what the answer repeats


def ask(endpoint: str, body: dict[str, Any]) -> Asked:
    """The chat that the body of an endpoint asks for.

    Raises:
        InvalidRequest: It is none; ``param`` is the field.
    """
    given = {name: value for name, value in body.items() if value is not None}
    if given.pop("stream", False) is not False:
        raise InvalidRequest(
            "The answer to a line comes whole: leave out 'stream'.", param="stream"
        )
    given.pop("store", None)  # every job is stored here
    return _ASK[endpoint](given)


def _ask_chat(given: dict[str, Any]) -> Asked:
    job = _checked({name: given.pop(name, None) for name in ("messages", "model", "metadata")})
    return Asked(job.model, job.chat(), None, given, job.metadata or {})


def _checked(fields: dict[str, Any]) -> CreateJob:
    if fields["messages"] is None:
        raise InvalidRequest("messages: it is missing.", param="messages")
    try:
        return CreateJob.model_validate(fields)
    except ValidationError as error:
        faults = [
            (place_of(each["loc"], fields, missing=each["type"] == "missing"), each["msg"])
            for each in error.errors(include_url=False, include_input=False)
        ]
        # of the branches of a union the one that got furthest is the one that was meant
        place, why = max(faults, key=lambda fault: len(fault[0]))
        raise InvalidRequest(f"{place}: {why[:1].lower()}{why[1:]}.", param=place) from None


# ---------------------------------------------------------------- responses

_SAME_NAME = frozenset(
    {
        "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier",
        "temperature", "top_logprobs", "top_p", "user", "extra_body",
    }
)  # fmt: skip
_REPEATED = (
    "instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "reasoning",
    "temperature", "text", "tool_choice", "tools", "top_p", "user",
)  # fmt: skip


def _ask_response(given: dict[str, Any]) -> Asked:
    asked = {name: given[name] for name in _REPEATED if name in given}
    if given.pop("background", False) is not False:
        raise InvalidRequest("A line of a batch is no background response.", param="background")
    instructions = given.pop("instructions", None)
    if instructions is not None and not isinstance(instructions, str):
        _refuse("instructions", "it must be a string")
    fields = {
        "messages": _messages(given.pop("input", None)),
        "model": given.pop("model", None),
        "metadata": given.pop("metadata", None),
    }
    job = _checked(fields)
    parameters: dict[str, Any] = {}
    for name, value in given.items():
        if name in _SAME_NAME:
            parameters[name] = value
        elif name in _TRANSLATED:
            parameters |= _TRANSLATED[name](value)
        else:
            raise UnsupportedParameter(f"'{name}' is refused in a batch.", param=name)
    return Asked(job.model, job.chat(), instructions, parameters, job.metadata or {}, asked)


def _refuse(param: str, why: str) -> NoReturn:
    raise InvalidRequest(f"{param}: {why}.", param=param)


def _messages(given: Any) -> list[Any] | None:
    if given is None or isinstance(given, str):
        return None if given is None else [{"role": "user", "content": given}]
    if not isinstance(given, list):
        _refuse("input", "it must be a string or an array of items")
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(given):
        place = f"input[{number}]"
        if not isinstance(item, dict):
            _refuse(place, "it must be an object")
        match item.get("type", "message"):
            case "message":
                content = item.get("content")
                if isinstance(content, list):
                    content = [
                        _part(part, f"{place}.content[{n}]") for n, part in enumerate(content)
                    ]
                messages.append({"role": item.get("role"), "content": content})
            case "function_call":
                messages.append(
                    {"role": "assistant", "content": None, "tool_calls": [_tool_call(item, place)]}
                )
            case "function_call_output":
                messages.append(
                    {
                        "role": "tool",
                        "tool_call_id": item.get("call_id"),
                        "content": item.get("output"),
                    }
                )
            case "reasoning":
                pass  # the provider's own notes to itself, which another one cannot read
            case other:
                _refuse(f"{place}.type", f"items of type {other!r} are not supported in a batch")
    return messages


def _part(part: Any, place: str) -> Any:
    match part:
        case {"type": "input_text" | "output_text", "text": text}:
            return {"type": "text", "text": text}
        case {"type": "input_image", "image_url": str(url)}:
            image = {"url": url} | ({"detail": part["detail"]} if part.get("detail") else {})
            return {"type": "image_url", "image_url": image}
    _refuse(place, "only input_text, output_text and input_image with an image_url are supported")


def _tool_call(item: dict[str, Any], place: str) -> dict[str, Any]:
    match item:
        case {"call_id": str(call_id), "name": str(name), "arguments": str(arguments)}:
            function = {"name": name, "arguments": arguments}
            return {"id": call_id, "type": "function", "function": function}
    _refuse(place, "a function_call has call_id, name and arguments, all strings")


def _tools(tools: Any) -> dict[str, Any]:
    if not isinstance(tools, list):
        _refuse("tools", "it must be an array")
    translated = []
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            _refuse(f"tools[{number}]", "only tools of type function are supported in a batch")
        function = {name: value for name, value in tool.items() if name != "type"}
        translated.append({"type": "function", "function": function})
    return {"tools": translated} if translated else {}


def _tool_choice(choice: Any) -> dict[str, Any]:
    match choice:
        case {"type": "function", "name": str(name)}:
            choice = {"type": "function", "function": {"name": name}}
    return {"tool_choice": choice}


def _text(text: Any) -> dict[str, Any]:
    if not isinstance(text, dict):
        _refuse("text", "it must be an object")
    translated: dict[str, Any] = {}
    if text.get("verbosity") is not None:
        translated["verbosity"] = text["verbosity"]
    match text.get("format"):
        case None | {"type": "text"}:
            pass
        case {"type": "json_schema", **schema}:
            translated["response_format"] = {"type": "json_schema", "json_schema": schema}
        case form:
            translated["response_format"] = form
    return translated


def _reasoning(reasoning: Any) -> dict[str, Any]:
    match reasoning:
        case {"effort": str(effort), **rest} if not any(rest.values()):
            return {"reasoning_effort": effort}
        case {} if not any(reasoning.values()):
            return {}
    _refuse("reasoning", "only its effort is supported in a batch")


_TRANSLATED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "max_output_tokens": lambda value: {"max_completion_tokens": value},
    "reasoning": _reasoning,
    "text": _text,
    "tool_choice": _tool_choice,
    "tools": _tools,
}
_ASK: dict[str, Callable[[dict[str, Any]], Asked]] = {CHAT: _ask_chat, RESPONSES: _ask_response}


# ---------------------------------------------------------------- answers

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


def answer(endpoint: str, row: Any) -> dict[str, Any]:
    """The body that answers a request: of a job that succeeded, with its message and usage."""
    return response_of(row) if endpoint == RESPONSES else completion_of(row)


def failure(row: Any) -> tuple[int, dict[str, Any]]:
    """The HTTP status and body that stand for a job that failed."""
    error = {
        "message": row.error_message,
        "type": "provider_error",
        "code": row.error_code,
        "param": None,
    }
    body: dict[str, Any] = {"error": error}
    if row.source is not None:  # it was called, and may have to be paid
        body["usage"] = _completion_usage(row)
    return STATUS.get(row.error_code, 502), body


def completion_of(row: Any) -> dict[str, Any]:
    """A job as a chat completion."""
    return {
        "id": f"chatcmpl-{_bare(row.job_id)}",
        "object": "chat.completion",
        "created": row.created_ms // 1000,
        "model": f"{row.provider}:{row.model}",
        "choices": [
            {
                "index": 0,
                "message": row.message,
                "finish_reason": row.finish_reason,
                "logprobs": None,
            }
        ],
        "usage": _completion_usage(row),
    }


def _bare(job_id: str) -> str:
    return job_id.partition("_")[2]


def _cost(row: Any) -> float | None:
    return None if row.cost_nanousd is None else row.cost_nanousd / 1e9


def _completion_usage(row: Any) -> dict[str, Any] | None:
    if row.input_tokens is None or row.output_tokens is None:
        return None  # unknown is not zero
    return {
        "prompt_tokens": row.input_tokens,
        "completion_tokens": row.output_tokens,
        "total_tokens": row.input_tokens + row.output_tokens,
        "prompt_tokens_details": {"cached_tokens": row.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": row.reasoning_tokens},
        "cost_usd": _cost(row),
    }


_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


def response_of(row: Any) -> dict[str, Any]:
    """A job as a response; it needs ``asked`` beside the message."""
    asked = row.asked or {}
    incomplete = _INCOMPLETE.get(row.finish_reason)
    return {
        "id": f"resp_{_bare(row.job_id)}",
        "object": "response",
        "created_at": row.created_ms // 1000,
        "status": "incomplete" if incomplete else "completed",
        "error": None,
        "incomplete_details": {"reason": incomplete} if incomplete else None,
        "model": f"{row.provider}:{row.model}",
        "output": list(_items(row)),
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "temperature": None,
        "top_p": None,
        "instructions": None,
        "metadata": {},
        **asked,
        "usage": _response_usage(row),
    }


def _items(row: Any) -> list[dict[str, Any]]:
    message, bare = row.message or {}, _bare(row.job_id)
    items: list[dict[str, Any]] = []
    if message.get("reasoning"):
        summary = [{"type": "summary_text", "text": message["reasoning"]}]
        items.append({"type": "reasoning", "id": f"rs_{bare}", "summary": summary})
    content: list[dict[str, Any]] = []
    if message.get("content"):
        text = {"type": "output_text", "text": message["content"]}
        content.append({**text, "annotations": [], "logprobs": []})
    if message.get("refusal"):
        content.append({"type": "refusal", "refusal": message["refusal"]})
    if content or not message.get("tool_calls"):
        items.append(
            {
                "type": "message",
                "id": f"msg_{bare}",
                "role": "assistant",
                "status": "incomplete" if row.finish_reason in _INCOMPLETE else "completed",
                "content": content,
            }
        )
    items.extend(
        {
            "type": "function_call",
            "id": f"fc_{bare}_{number}",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": call["function"]["arguments"],
            "status": "completed",
        }
        for number, call in enumerate(message.get("tool_calls") or ())
    )
    return items


def _response_usage(row: Any) -> dict[str, Any] | None:
    if row.input_tokens is None or row.output_tokens is None:
        return None
    return {
        "input_tokens": row.input_tokens,
        "input_tokens_details": {
            "cached_tokens": row.cached_tokens,
            "cache_write_tokens": row.cache_write_tokens,
        },
        "output_tokens": row.output_tokens,
        "output_tokens_details": {"reasoning_tokens": row.reasoning_tokens},
        "total_tokens": row.input_tokens + row.output_tokens,
        "cost_usd": _cost(row),
    }
