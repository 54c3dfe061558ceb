"""A chat-completions request as the body of Anthropic's Messages API.

Source: Anthropic's Messages reference and the parameter types of its SDK 2.12. What has no
counterpart is refused here or, where it can be seen at accept, in `backchannel.parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from backchannel.errors import ProviderError
from workers.providers import ChatRequest
from workers.providers.failures import failure

# Anthropic insists on a cap; this is the most that every Claude model accepts.
DEFAULT_MAX_TOKENS = 4096

Block = dict[str, Any]

EFFORT = {"minimal": "low"}
SERVICE_TIER = {"default": "standard_only"}
TOOL_CHOICE = {"auto": "auto", "none": "none", "required": "any"}
SAME = ("temperature", "thinking", "top_k", "top_p")


class _Untranslatable(Exception):
    """A message that Anthropic's API has no form for."""


def messages_body(request: ChatRequest) -> dict[str, Any]:
    """The body; ``extra_body`` wins over the parameters.

    Raises:
        ProviderError: ``invalid_request``, naming the message that cannot be translated.
    """
    try:
        system, messages = _turns(request.messages)
    except _Untranslatable as error:
        raise _refused(request, str(error)) from None
    body: dict[str, Any] = {
        **_options(request.parameters),
        **request.parameters.get("extra_body", {}),
    }
    # last: what the books depend on is not the caller's to change
    body |= {"model": request.model, "messages": messages, "stream": request.stream}
    if system:
        body["system"] = system
    if "max_tokens" not in body:
        budget = (body.get("thinking") or {}).get("budget_tokens", 0)
        body["max_tokens"] = DEFAULT_MAX_TOKENS + budget  # the budget must be below the cap
    return body


def _refused(request: ChatRequest, why: str) -> ProviderError:
    return failure(request.provider.id, "invalid_request", f"cannot take the request: {why}")


def _options(parameters: dict[str, Any]) -> dict[str, Any]:
    body = {name: parameters[name] for name in SAME if name in parameters}
    for name, (target, translate) in _TRANSLATED.items():
        if name in parameters:
            body[target] = translate(parameters[name])
    effort = parameters.get("reasoning_effort")
    if effort == "none":
        body.setdefault("thinking", {"type": "disabled"})
    elif effort is not None:
        body["output_config"] = {"effort": EFFORT.get(effort, effort)}
    form = parameters.get("response_format")
    if form and form["type"] == "json_schema":
        body.setdefault("output_config", {})["format"] = {
            "type": "json_schema",
            "schema": form["json_schema"]["schema"],
        }
    if parameters.get("parallel_tool_calls") is False and "tools" in body:
        choice = body.setdefault("tool_choice", {"type": "auto"})
        if choice["type"] != "none":
            choice["disable_parallel_tool_use"] = True
    return body


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A function; any other type is a tool of Anthropic's own and passes as it is."""
    if tool.get("type") != "function":
        return tool
    function = tool["function"]
    translated = {
        "name": function["name"],
        "input_schema": function.get("parameters") or {"type": "object", "properties": {}},
    }
    return translated | {
        key: function[key] for key in ("description", "strict") if function.get(key)
    }


def _tool_choice(choice: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(choice, str):
        return {"type": TOOL_CHOICE[choice]}
    return {"type": "tool", "name": choice["function"]["name"]}


def _turns(messages: Iterable[dict[str, Any]]) -> tuple[list[Block], list[dict[str, Any]]]:
    """System blocks, and turns that alternate: neighbours of one role become one turn."""
    system: list[Block] = []
    turns: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        role = message.get("role")
        try:
            target, blocks = _ROLES[str(role)](message)
        except _Untranslatable as error:
            raise _Untranslatable(f"messages[{number}] {error}") from None
        except (KeyError, TypeError, AttributeError):
            raise _Untranslatable(
                f"messages[{number}] of role '{role}' has no form in Anthropic's API"
            ) from None
        if target == "system":
            system += blocks
        elif turns and turns[-1]["role"] == target:
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": target, "content": blocks})
    return system, turns


def _system(message: dict[str, Any]) -> tuple[str, list[Block]]:
    return "system", _blocks(message["content"])


def _user(message: dict[str, Any]) -> tuple[str, list[Block]]:
    return "user", _blocks(message["content"])


def _assistant(message: dict[str, Any]) -> tuple[str, list[Block]]:
    # first, and as they came: what is signed is refused when it is changed
    blocks = [block for block in message.get("thinking_blocks", ()) if block.get("signature") != ""]
    blocks += _blocks(message.get("content") or message.get("refusal") or "")
    for call in message.get("tool_calls") or ():
        function = call["function"]
        try:
            arguments = msgspec.json.decode(function.get("arguments") or "{}")
        except ValueError:
            raise _Untranslatable("has a tool call whose arguments are not JSON") from None
        blocks.append(
            {"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments}
        )
    return "assistant", blocks


def _tool_result(message: dict[str, Any]) -> tuple[str, list[Block]]:
    result = {"type": "tool_result", "tool_use_id": message["tool_call_id"]}
    return "user", [{**result, "content": _blocks(message["content"])}]


def _blocks(content: str | list[dict[str, Any]]) -> list[Block]:
    """Content as blocks; empty texts are left out, which Anthropic refuses."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    blocks = []
    for part in content:
        kind = part["type"]
        if kind not in _PARTS:
            raise _Untranslatable(
                f"has a part of type '{kind}', which Anthropic's API does not take"
            )
        block = _PARTS[kind](part)
        if "cache_control" in part:
            block["cache_control"] = part["cache_control"]
        if block.get("text") != "":
            blocks.append(block)
    return blocks


def _text(part: dict[str, Any]) -> Block:
    return {"type": "text", "text": part["text"]}


def _refusal(part: dict[str, Any]) -> Block:
    return {"type": "text", "text": part["refusal"]}


def _image(part: dict[str, Any]) -> Block:
    return {"type": "image", "source": _source(part["image_url"]["url"])}


def _file(part: dict[str, Any]) -> Block:
    file = part["file"]
    block: Block = {"type": "document", "source": _source(file["file_data"])}
    return block | ({"title": file["filename"]} if file.get("filename") else {})


def _source(url: str) -> Block:
    """``data:image/png;base64,…`` as its bytes, anything else as an address to fetch."""
    if not url.startswith("data:"):
        return {"type": "url", "url": url}
    media_type, comma, data = url.removeprefix("data:").partition(";base64,")
    if not comma:
        raise _Untranslatable("has a data: URL that is not base64")
    return {"type": "base64", "media_type": media_type, "data": data}


def _user_id(value: str) -> dict[str, str]:
    return {"user_id": value}


# Later rows win: safety_identifier is what OpenAI replaced user with.
_TRANSLATED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "max_tokens": ("max_tokens", lambda value: value),
    "max_completion_tokens": ("max_tokens", lambda value: value),
    "service_tier": ("service_tier", lambda value: SERVICE_TIER.get(value, value)),
    "stop": ("stop_sequences", lambda value: [value] if isinstance(value, str) else value),
    "tool_choice": ("tool_choice", _tool_choice),
    "tools": ("tools", lambda value: [_tool(each) for each in value]),
    "user": ("metadata", _user_id),
    "safety_identifier": ("metadata", _user_id),
}

_ROLES: dict[str, Callable[[dict[str, Any]], tuple[str, list[Block]]]] = {
    "system": _system,
    "developer": _system,
    "user": _user,
    "assistant": _assistant,
    "tool": _tool_result,
}

_PARTS: dict[str, Callable[[dict[str, Any]], Block]] = {
    "text": _text,
    "refusal": _refusal,
    "image_url": _image,
    "file": _file,
}
