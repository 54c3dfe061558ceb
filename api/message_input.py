"""What a message in Anthropic's form asks, as the messages and parameters of a job."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from pydantic import Field

from backchannel.errors import InvalidRequest, UnsupportedParameter
from backchannel.schemas import Name, NullsAreNotGiven, Whole, as_object, as_text

Block = dict[str, Any]


class Said(NullsAreNotGiven):
    """One message."""

    role: str = Field(pattern="^(user|assistant|system)$")
    content: str | list[Block]


class OutputConfig(NullsAreNotGiven):
    """How much effort, and which form."""

    effort: str | None = None
    format: Block | None = None


class UserId(NullsAreNotGiven):
    """Whom the answer is for."""

    user_id: str | None = None


class CreateMessage(NullsAreNotGiven):
    """A message to be answered."""

    model: Name | None = None
    max_tokens: Whole = Field(gt=0)
    messages: Annotated[list[Said], Field(min_length=1)]
    system: str | list[Block] | None = None
    stream: bool = False
    metadata: UserId | None = None
    output_config: OutputConfig | None = None
    service_tier: str | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    thinking: Block | None = None
    tool_choice: Block | None = None
    tools: list[Block] | None = None
    top_k: Whole | None = None
    top_p: float | None = None


class CountTokens(CreateMessage):
    """A message whose input is to be counted."""

    max_tokens: Whole = Field(1, gt=0)


# ---------------------------------------------------------------- parameters

_SAME = ("max_tokens", "service_tier", "temperature", "thinking", "top_k", "top_p")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}

# What a parameter is called in Anthropic's form.
NAMES = {
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
    "user": "metadata.user_id",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}


def parameters_of(asked: CreateMessage) -> dict[str, Any]:
    """The parameters of chat completions that mean the same.

    Raises:
        InvalidRequest: It names the field.
    """
    parameters: dict[str, Any] = {name: getattr(asked, name) for name in _SAME}
    parameters["stop"] = asked.stop_sequences or None
    if asked.metadata is not None:
        parameters["user"] = asked.metadata.user_id
    if asked.output_config is not None:
        parameters["reasoning_effort"] = asked.output_config.effort
        if asked.output_config.format is not None:
            parameters["response_format"] = _format(asked.output_config.format)
    if asked.tools:
        parameters["tools"] = [_tool(each, f"tools[{n}]") for n, each in enumerate(asked.tools)]
    if asked.tool_choice is not None:
        parameters["tool_choice"] = _tool_choice(asked.tool_choice)
        if asked.tool_choice.get("disable_parallel_tool_use"):
            parameters["parallel_tool_calls"] = False
    return {name: value for name, value in parameters.items() if value is not None}


def _format(form: Block) -> Block:
    if form.get("type") != "json_schema":
        raise InvalidRequest("output_config.format.type: json_schema.", param="output_config")
    schema = {"name": "answer", "schema": form.get("schema"), "strict": True}
    return {"type": "json_schema", "json_schema": schema}


def _tool(tool: Block, place: str) -> Block:
    """A tool of the client's; one of Anthropic's own passes as it is, to those who know it."""
    if tool.get("type", "custom") != "custom":
        return tool
    if not isinstance(tool.get("name"), str):
        raise InvalidRequest(f"{place}.name: it is missing.", param=f"{place}.name")
    function = {"name": tool["name"], "parameters": tool.get("input_schema")}
    function |= {name: tool[name] for name in ("description", "strict") if tool.get(name)}
    return {"type": "function", "function": function}


def _tool_choice(choice: Block) -> str | Block:
    kind = choice.get("type")
    if kind == "tool" and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise InvalidRequest(
            "tool_choice.type: auto, any, none, or tool with its name.", param="tool_choice"
        )
    return _CHOICES[kind]


# ---------------------------------------------------------------- messages


def messages_of(asked: CreateMessage) -> list[dict[str, Any]]:
    """The system prompt and the turns as chat messages.

    Raises:
        InvalidRequest: It names the block.
    """
    messages: list[dict[str, Any]] = []
    if asked.system:
        with _complete("system"):
            messages.append({"role": "system", "content": _content(asked.system, "system")})
    for number, said in enumerate(asked.messages):
        place = f"messages[{number}].content"
        with _complete(place):
            messages += _turn(said, place)
    return messages


@contextlib.contextmanager
def _complete(place: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError):
        raise InvalidRequest(f"{place}: a block lacks what its type needs.", param=place) from None


def _turn(said: Said, place: str) -> list[dict[str, Any]]:
    if isinstance(said.content, str):
        return [{"role": said.role, "content": said.content}]
    if said.role == "assistant":
        return [_assistant(said.content, place)]
    # results stand before what the user says about them
    results = [_result(b, place) for b in said.content if b["type"] == "tool_result"]
    rest = [block for block in said.content if block["type"] != "tool_result"]
    if rest or not results:
        results.append({"role": said.role, "content": _content(rest, place)})
    return results


_THOUGHTS = ("thinking", "redacted_thinking")


def _assistant(blocks: list[Block], place: str) -> dict[str, Any]:
    thought = [b for b in blocks if b["type"] in _THOUGHTS]
    told = [b for b in blocks if b["type"] != "tool_use" and b["type"] not in _THOUGHTS]
    calls = [
        {
            "id": as_text(block["id"]),
            "type": "function",
            "function": {
                "name": as_text(block["name"]),
                "arguments": msgspec.json.encode(as_object(block["input"])).decode(),
            },
        }
        for block in blocks
        if block["type"] == "tool_use"
    ]
    message = {"role": "assistant", "content": _content(told, place) or (None if calls else "")}
    if thought:  # goes to a provider of Anthropic's type only: who signed it wants it back
        message["thinking_blocks"] = thought
    return {**message, "tool_calls": calls} if calls else message


def _result(block: Block, place: str) -> dict[str, Any]:
    content = _content(block.get("content") or "", f"{place}.content")
    if block.get("is_error"):
        # chat completions have no flag for it, and the model should know
        content = f"Error: {content}" if isinstance(content, str) else [_text("Error:"), *content]
    return {"role": "tool", "tool_call_id": as_text(block["tool_use_id"]), "content": content}


def _content(content: str | list[Block], place: str) -> str | list[Block]:
    """Parts; a lone text without more to it is just that."""
    if isinstance(content, str):
        return content
    parts = [_part(block, place) for block in content]
    if len(parts) == 1 and parts[0].keys() == {"type", "text"}:
        text: str = parts[0]["text"]
        return text
    return parts


def _part(block: Block, place: str) -> Block:
    match block["type"]:
        case "text":
            part = _text(as_text(block["text"]))
        case "image":
            part = {"type": "image_url", "image_url": {"url": _url(block["source"], place)}}
        case "document" if block["source"]["type"] == "text":
            part = _text(as_text(block["source"]["data"]))
        case "document":
            file = {"file_data": _url(block["source"], place)}
            title = {"filename": as_text(block["title"])} if block.get("title") else {}
            part = {"type": "file", "file": {**file, **title}}
        case other:
            raise UnsupportedParameter(
                f"{place} is refused: blocks of type '{other}' are not taken.", param=place
            )
    kept = {"cache_control": block["cache_control"]} if block.get("cache_control") else {}
    return {**part, **kept}


def _text(text: str) -> Block:
    return {"type": "text", "text": text}


def _url(source: Block, place: str) -> str:
    match source["type"]:
        case "base64":
            return f"data:{as_text(source['media_type'])};base64,{as_text(source['data'])}"
        case "url":
            return as_text(source["url"])
        case other:
            raise UnsupportedParameter(
                f"{place} is refused: sources of type '{other}' are not taken.", param=place
            )
