"""What becomes of every chat-completions parameter: passed, translated or refused by name.

Source of the names: OpenAI's chat-completions reference (request body); of the translations:
Anthropic's messages reference. Nothing is dropped in silence: a parameter that is not in the table,
or that a provider cannot honour, is an error at accept, before money is spent.
"""

from __future__ import annotations

from typing import Any

from backchannel.errors import InvalidRequest, UnsupportedParameter
from backchannel.registry import Provider
from backchannel.schemas import whole

# Sent by the engine itself, or fields of the job around them.
OURS = {
    "model": "it is a field of the job",
    "messages": "it is a field of the job",
    "stream": "it is a field of the job",
    "stream_options": "usage is always asked for",
    "store": "every job is stored here",
    "metadata": "it is a field of the job, kept here and not sent on",
}

# Refused by every provider, with the reason.
NOT_A_CHAT = {
    "audio": "audio output is not supported",
    "modalities": "only text output is supported",
    "functions": "it is deprecated: use tools",
    "function_call": "it is deprecated: use tool_choice",
    "web_search_options": "search is the provider's tool; pass it in tools where it has one",
    "background": "every job runs in the background",
}

# Passed to OpenAI-compatible servers as they are, unless named by SHAPES below.
OPENAI_COMPATIBLE = frozenset(
    {
        "extra_body",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "n",
        "parallel_tool_calls",
        "prediction",
        "presence_penalty",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "seed",
        "service_tier",
        "stop",
        "temperature",
        "tool_choice",
        "tools",
        "top_k",
        "top_logprobs",
        "top_p",
        "user",
        "verbosity",
    }
)

# Passed or translated by the anthropic adapter.
ANTHROPIC = frozenset(
    {
        "extra_body",
        "max_completion_tokens",
        "max_tokens",
        "n",
        "parallel_tool_calls",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "service_tier",
        "stop",
        "temperature",
        "thinking",
        "tool_choice",
        "tools",
        "top_k",
        "top_p",
        "user",
    }
)

# The echo provider takes whatever a chat may carry, and answers with the last user message.
BY_TYPE: dict[str, frozenset[str]] = {
    "openai-compatible": OPENAI_COMPATIBLE,
    "anthropic": ANTHROPIC,
    "echo": OPENAI_COMPATIBLE | ANTHROPIC,
}

KNOWN = OPENAI_COMPATIBLE | ANTHROPIC

# Values of OpenAI's that Anthropic has a word for; the adapter translates them.
ANTHROPIC_VALUES: dict[str, frozenset[str]] = {
    "reasoning_effort": frozenset({"none", "minimal", "low", "medium", "high", "xhigh", "max"}),
    "service_tier": frozenset({"auto", "default", "standard_only"}),
}
ANTHROPIC_FORMATS = frozenset({"text", "json_schema"})
ANTHROPIC_CHOICES = frozenset({"auto", "none", "required"})

# Only what would otherwise fail late, in a worker; the provider judges the rest.
SHAPES: dict[str, tuple[type, ...]] = {
    "extra_body": (dict,),
    "frequency_penalty": (int, float),
    "logit_bias": (dict,),
    "logprobs": (bool,),
    "max_completion_tokens": (int,),
    "max_tokens": (int,),
    "n": (int,),
    "parallel_tool_calls": (bool,),
    "presence_penalty": (int, float),
    "reasoning_effort": (str,),
    "response_format": (dict,),
    "safety_identifier": (str,),
    "seed": (int,),
    "service_tier": (str,),
    "stop": (str, list),
    "temperature": (int, float),
    "thinking": (dict,),
    "tool_choice": (str, dict),
    "tools": (list,),
    "top_k": (int,),
    "top_logprobs": (int,),
    "top_p": (int, float),
    "user": (str,),
}


def check_parameters(parameters: dict[str, Any], provider: Provider) -> dict[str, Any]:
    """The parameters a provider will honour, or an error that names the first it will not.

    Explicit nulls mean "not given", as in OpenAI's API, and are left out.

    Raises:
        UnsupportedParameter: Unknown, or not for this type of provider.
        InvalidRequest: The wrong JSON type, or a value that cannot be served (``n`` > 1).
    """
    if not parameters:
        return {}
    kept = {name: value for name, value in parameters.items() if value is not None}
    taken = BY_TYPE[provider.type]
    for name, value in kept.items():
        param = f"parameters.{name}"
        if name in OURS:
            raise InvalidRequest(f"'{name}' is not a parameter here: {OURS[name]}.", param=param)
        if name in NOT_A_CHAT:
            raise UnsupportedParameter(f"'{name}' is refused: {NOT_A_CHAT[name]}.", param=param)
        if name not in taken:
            why = (
                f"provider '{provider.id}' (type {provider.type}) cannot honour it"
                if name in KNOWN
                else "no such parameter; what only your server knows goes into extra_body"
            )
            raise UnsupportedParameter(f"'{name}' is refused: {why}.", param=param)
        shape = SHAPES.get(name)
        if shape == (int,):
            value = kept[name] = whole(value)
        # bool is an int in Python, not in JSON
        if shape and (
            not isinstance(value, shape) or (isinstance(value, bool) and bool not in shape)
        ):
            wanted = " or ".join(_JSON_NAMES[each] for each in shape)
            raise InvalidRequest(f"'{name}' must be {wanted}.", param=param)
    _check_inside(kept)
    if provider.type == "anthropic":
        _check_anthropic(kept, provider)
    if kept.get("n", 1) != 1:
        raise UnsupportedParameter(
            "'n' is refused above 1: send one job per answer.", param="parameters.n"
        )
    if "max_tokens" in kept and "max_completion_tokens" in kept:
        raise InvalidRequest(
            "Give max_tokens or max_completion_tokens, not both.", param="parameters.max_tokens"
        )
    return kept


def _check_inside(kept: dict[str, Any]) -> None:
    """What lies one level down and would otherwise fail, or cost, unseen."""
    for name in kept.get("extra_body", {}):
        if name in OURS or name == "n":
            why = OURS.get(name, "send one job per answer")
            raise InvalidRequest(
                f"'{name}' cannot be sent in extra_body: {why}.", param="parameters.extra_body"
            )
    stop = kept.get("stop")
    if isinstance(stop, list) and not all(isinstance(each, str) for each in stop):
        raise InvalidRequest(
            "'stop' must be a string or an array of strings.", param="parameters.stop"
        )
    for number, tool in enumerate(kept.get("tools", ())):
        param = f"parameters.tools[{number}]"
        if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
            raise InvalidRequest("A tool is an object with a type.", param=param)
        if tool["type"] == "function" and not _named_function(tool):
            raise InvalidRequest("A function tool needs function.name.", param=param)
    form = kept.get("response_format")
    if form is not None and not isinstance(form.get("type"), str):
        raise InvalidRequest(
            "'response_format' needs a type: text, json_object or json_schema.",
            param="parameters.response_format",
        )


def _check_anthropic(kept: dict[str, Any], provider: Provider) -> None:
    """Values that have no counterpart in Anthropic's API: refused, since nothing is dropped."""

    def refuse(name: str, why: str) -> UnsupportedParameter:
        return UnsupportedParameter(
            f"Provider '{provider.id}' (type anthropic) cannot honour '{name}': {why}.",
            param=f"parameters.{name}",
        )

    for name, values in ANTHROPIC_VALUES.items():
        if name in kept and kept[name] not in values:
            raise refuse(name, f"it takes {', '.join(sorted(values))}")
    form = kept.get("response_format", {"type": "text"})
    if form["type"] not in ANTHROPIC_FORMATS:
        raise refuse("response_format", "it has no such mode; give a json_schema")
    if form["type"] == "json_schema":
        given = form.get("json_schema")
        if not isinstance(given, dict) or not isinstance(given.get("schema"), dict):
            raise InvalidRequest(
                "A json_schema response_format needs json_schema.schema, an object.",
                param="parameters.response_format",
            )
    choice = kept.get("tool_choice", "auto")
    if isinstance(choice, str):
        if choice not in ANTHROPIC_CHOICES:
            raise refuse("tool_choice", "it takes auto, none, required or a function")
    elif choice.get("type") != "function" or not _named_function(choice):
        raise refuse(
            "tool_choice", 'an object must be {"type": "function", "function": {"name": …}}'
        )


def _named_function(value: dict[str, Any]) -> bool:
    function = value.get("function")
    return isinstance(function, dict) and isinstance(function.get("name"), str)


_JSON_NAMES: dict[type, str] = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    list: "an array",
    str: "a string",
}
