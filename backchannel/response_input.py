"""What a response asks, as a job: the body of a POST, or of a line of a batch.

What has no counterpart in chat completions is refused by name.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from backchannel.errors import InvalidRequest, UnsupportedParameter
from backchannel.schemas import CreateJob, Metadata, Name, NullsAreNotGiven, Ours, Whole, as_text

Item = dict[str, Any]


class Reasoning(NullsAreNotGiven):
    """How much the model should think; its visible reasoning is always shown."""

    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class Text(NullsAreNotGiven):
    """The form of the answer."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class StreamOptions(NullsAreNotGiven):
    """Accepted, and without effect."""

    include_obfuscation: bool | None = None


class CreateResponse(NullsAreNotGiven):
    """A response to be made."""

    # what a field of the job is called here
    NAMES: ClassVar[dict[str, str]] = {
        "max_completion_tokens": "max_output_tokens",
        "reasoning_effort": "reasoning.effort",
        "response_format": "text.format",
        "verbosity": "text.verbosity",
        "session": "x_backchannel.session",
        "deadline_s": "x_backchannel.deadline_s",
        "fallbacks": "x_backchannel.fallbacks",
    }

    input: str | list[Item] = Field(min_length=1)
    model: Name | None = None
    instructions: str | None = Field(None, description="Of this response; not inherited.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    background: bool = False
    store: bool = Field(True, description="False: no response can follow this one.")
    previous_response_id: str | None = None
    metadata: Metadata | None = None
    tools: list[Item] | None = None
    tool_choice: str | Item | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    max_output_tokens: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    truncation: Literal["auto", "disabled"] = "disabled"
    include: list[str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    x_backchannel: Ours = Ours()

    def chat(self) -> list[dict[str, Any]]:
        """The input as chat messages."""
        return _messages_of(self.input)

    def order(self) -> CreateJob:
        """The job around them."""
        ours = self.x_backchannel
        return CreateJob.model_construct(
            model=self.model,
            session=ours.session,
            system=self.instructions or None,
            lane=ours.lane,
            deadline_s=ours.deadline_s,
            fallbacks=ours.fallbacks,
            force=ours.force,
            metadata=self.metadata,
            parameters=_parameters_of(self),
        )


# ---------------------------------------------------------------- parameters

_SAME = (
    "parallel_tool_calls", "temperature", "top_p", "user", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "service_tier",
)  # fmt: skip


def _parameters_of(asked: CreateResponse) -> dict[str, Any]:
    """The parameters of chat completions that mean the same.

    Raises:
        UnsupportedParameter: It names the field.
    """
    if "message.output_text.logprobs" in (asked.include or ()):
        raise _refused("include", "log probabilities are not kept")
    parameters = {
        **{name: getattr(asked, name) for name in _SAME},
        "max_completion_tokens": asked.max_output_tokens,
        "tools": None if asked.tools is None else [*map(_tool, range(10**6), asked.tools)],
        "tool_choice": _tool_choice(asked.tool_choice),
    }
    if asked.text is not None:
        parameters["verbosity"] = asked.text.verbosity
        parameters["response_format"] = _format(asked.text.format or {"type": "text"})
    if asked.reasoning is not None:
        parameters["reasoning_effort"] = asked.reasoning.effort
    return {name: value for name, value in parameters.items() if value not in (None, [])}


def _tool(number: int, tool: Item) -> Item:
    if tool.get("type") != "function":
        raise _refused(f"tools[{number}].type", "only function tools are run, and by you")
    wanted = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in wanted if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: str | Item | None) -> str | Item | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        raise _refused("tool_choice", 'an object must be {"type": "function", "name": …}')
    return {"type": "function", "function": {"name": choice["name"]}}


def _format(form: Item) -> Item | None:
    match form.get("type"):
        case "text":
            return None
        case "json_object":
            return {"type": "json_object"}
        case "json_schema":
            wanted = ("name", "description", "schema", "strict")
            schema = {name: form[name] for name in wanted if form.get(name) is not None}
            return {"type": "json_schema", "json_schema": schema}
        case _:
            raise InvalidRequest(
                "text.format.type: text, json_object or json_schema.", param="text.format"
            )


# ---------------------------------------------------------------- messages


def _messages_of(given: str | list[Item]) -> list[dict[str, Any]]:
    """The items of an input as chat messages.

    Raises:
        InvalidRequest: It names the item.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(given):
        place = f"input[{number}]"
        try:
            _add(messages, item, place)
        except (KeyError, TypeError, AttributeError):
            raise InvalidRequest(f"{place}: it lacks what its type needs.", param=place) from None
    if not messages:
        raise InvalidRequest("input: there is nothing to answer.", param="input")
    return messages


def _add(messages: list[dict[str, Any]], item: Item, place: str) -> None:
    match item.get("type") or "message":
        case "message":
            messages.append(_message(item, place))
        case "function_call":
            # the calls of one turn are one message, together with the text before them
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(_call(item))
        case "function_call_output":
            output = item["output"]
            content = output if isinstance(output, str) else _parts(output, f"{place}.output")
            messages.append(
                {"role": "tool", "tool_call_id": as_text(item["call_id"]), "content": content}
            )
        case "reasoning":
            pass  # no provider takes another one's
        case other:
            raise _refused(f"{place}.type", f"items of type '{other}' are not taken")


def _message(item: Item, place: str) -> dict[str, Any]:
    role, content = item["role"], item["content"]
    if role not in ("user", "system", "developer", "assistant"):
        raise _refused(f"{place}.role", "user, system, developer or assistant")
    if not isinstance(content, str):
        content = _parts(content, f"{place}.content")
        texts = [part.get("text", part.get("refusal")) for part in content]
        # many a compatible server takes parts from a user only, and some from nobody
        if None not in texts and (role == "assistant" or len(texts) == 1):
            content = "".join(map(str, texts))
    return {"role": role, "content": content}


def _call(item: Item) -> Item:
    function = {"name": as_text(item["name"]), "arguments": as_text(item["arguments"])}
    return {"id": as_text(item["call_id"]), "type": "function", "function": function}


def _parts(parts: list[Item], place: str) -> list[Item]:
    return [_part_of(part, f"{place}[{number}]") for number, part in enumerate(parts)]


def _part_of(part: Item, place: str) -> Item:
    match part["type"]:
        case "input_text" | "output_text" | "text":
            return {"type": "text", "text": as_text(part["text"])}
        case "refusal":
            return {"type": "refusal", "refusal": as_text(part["refusal"])}
        case "input_image" if part.get("image_url"):
            image = {"url": as_text(part["image_url"])}
            if part.get("detail"):
                image["detail"] = as_text(part["detail"])
            return {"type": "image_url", "image_url": image}
        case "input_file" if part.get("file_data"):
            given = [name for name in ("file_data", "filename") if part.get(name) is not None]
            return {"type": "file", "file": {name: as_text(part[name]) for name in given}}
        case "input_image" | "input_file":
            raise _refused(place, "send the data itself: files here are those of batches")
        case other:
            raise _refused(f"{place}.type", f"parts of type '{other}' are not taken")


def _refused(param: str, why: str) -> UnsupportedParameter:
    return UnsupportedParameter(f"{param} is refused: {why}.", param=param)


# ---------------------------------------------------------------- given back


def items_of(given: str | list[Item], digits: str) -> list[Item]:
    """The input's items, each complete and with an id made of its place."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return [_shown(item, f"{digits}_in{number}") for number, item in enumerate(given)]


def _shown(item: Item, place: str) -> Item:
    kind = item.get("type") or "message"
    shown = {"status": "completed", **item, "type": kind}
    prefix = {"message": "msg", "function_call": "fc", "reasoning": "rs"}.get(kind, "fco")
    shown["id"] = item.get("id") or f"{prefix}_{place}"
    if kind == "message":
        shown["content"] = _complete(item["content"], item["role"])
    elif kind == "reasoning":
        shown.setdefault("summary", [])
    return shown


def _complete(content: str | list[Item], role: str) -> list[Item]:
    kind = "output_text" if role == "assistant" else "input_text"
    parts = [{"type": kind, "text": content}] if isinstance(content, str) else content
    usual: dict[str, Item] = {
        "output_text": {"annotations": [], "logprobs": []},
        "input_image": {"detail": "auto"},
    }
    named = [{**part, "type": kind} if part["type"] == "text" else part for part in parts]
    return [{**usual.get(part["type"], {}), **part} for part in named]
