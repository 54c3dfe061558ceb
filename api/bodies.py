"""What the bodies of requests hold, for the OpenAPI document, where the checks are code.

Each entry of `BODIES` goes into the schema of that name, over what pydantic knows of it.
"""

from __future__ import annotations

from typing import Any

from backchannel.notices import EVENT_TYPES
from backchannel.parameters import KNOWN, OURS, SHAPES

Schema = dict[str, Any]

# A string holds no NUL, an integer fits 64 bits, and so on down: see schemas.decode.
TEXT: Schema = {"type": "string", "pattern": "^[^\\x00]*$"}
INTEGER: Schema = {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}
ANY: Schema = {"$ref": "#/components/schemas/Json"}
FREE: Schema = {"type": "object", "propertyNames": TEXT, "additionalProperties": ANY}
SOME_TEXT: Schema = {**TEXT, "minLength": 1}
NULL: Schema = {"type": "null"}

JSON: Schema = {
    "title": "Json",
    "description": "Any JSON value, without NUL characters and numbers beyond 64 bits.",
    "anyOf": [
        NULL,
        {"type": "boolean"},
        INTEGER,
        {**INTEGER, "type": "number"},
        TEXT,
        {"type": "array", "items": ANY},
        FREE,
    ],
}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


def _with(required: dict[str, Schema], **optional: Schema) -> Schema:
    """An object with these fields, and any others."""
    return {**FREE, "required": [*required], "properties": {**required, **optional}}


def _just(required: dict[str, Schema], **optional: Schema) -> Schema:
    """An object with these fields only."""
    return {**_with(required, **optional), "additionalProperties": False}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _const(*values: str) -> Schema:
    return {"const": values[0]} if len(values) == 1 else {"enum": list(values)}


def _not_both(first: Schema, second: Schema) -> Schema:
    return {"not": {"allOf": [first, second]}}


def _given(name: str, kind: str) -> Schema:
    return {"required": [name], "properties": {name: {"type": kind}}}


# ---------------------------------------------------------------- addresses

_SCHEME = "[hH][tT][tT][pP][sS]?://"
_HOST = r'[!-"$-.0-9;->A-Z^-~]+'  # what can be in one; whether it is one, is looked at later: 403
_PORT = "0*([0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
BASE_URL: Schema = {
    "type": "string",
    "maxLength": 2048,
    "pattern": rf'^{_SCHEME}{_HOST}(:({_PORT})?)?(/[!-"$->@-[\]-~]*)?$',
    "examples": ["https://llm.example.com/v1"],
}
WEB_URL: Schema = {
    "type": "string",
    "maxLength": 2048,
    "pattern": f"^{_SCHEME}[!-~]*$",
    "examples": ["https://example.com/hooks"],
}
MODEL: Schema = {"type": "string", "pattern": "^[!-~]{1,256}$"}
EVENTS: Schema = {
    "type": "array",
    "items": {"enum": list(EVENT_TYPES)},
    "minItems": 1,
    "maxItems": 2 * len(EVENT_TYPES),
}

# ---------------------------------------------------------------- parameters

_TYPES: dict[type, Schema] = {
    bool: {"type": "boolean"},
    dict: FREE,
    float: {"type": "number"},
    int: INTEGER,
    list: {"type": "array", "items": ANY},
    str: TEXT,
}
_FUNCTION = _with({"name": TEXT})
TOOLS = _list(
    {
        "anyOf": [
            _with({"type": _const("function"), "function": _FUNCTION}),
            _with({"type": {**TEXT, "not": _const("function")}}),
        ]
    }
)
_EXTRA = {**FREE, "propertyNames": {**TEXT, "not": {"enum": [*sorted(OURS), "n"]}}}
_PARAMETERS: dict[str, Schema] = {
    **dict.fromkeys(sorted(KNOWN), ANY),
    **{name: {"anyOf": [_TYPES[each] for each in shape]} for name, shape in SHAPES.items()},
    "extra_body": _EXTRA,
    "n": {"const": 1},
    "response_format": _with({"type": TEXT}),
    "stop": {"anyOf": [TEXT, _list(TEXT)]},
    "tools": TOOLS,
}
PARAMETERS: dict[str, Schema] = {name: _or_null(each) for name, each in _PARAMETERS.items()}
ONE_CAP = _not_both(_given("max_tokens", "integer"), _given("max_completion_tokens", "integer"))

# ---------------------------------------------------------------- chat messages


def _messages(calls: str, **more: Schema) -> Schema:
    """The kinds of message: each role has what it needs."""
    content = {"anyOf": [TEXT, _list(_with({"type": TEXT}))]}
    common = {"name": _or_null(TEXT), "refusal": _or_null(TEXT), **more}
    some_calls = _list({"$ref": f"#/components/schemas/{calls}"}, minItems=1)
    no_calls = {"anyOf": [NULL, {"type": "array", "maxItems": 0}]}
    no_tool = {"tool_call_id": NULL}
    answer = {
        **common,
        **no_tool,
        "content": _or_null(content),
        "tool_calls": {"anyOf": [NULL, some_calls, {"type": "array", "maxItems": 0}]},
    }
    role = _const("assistant")
    return {
        "anyOf": [
            _just(
                {"role": _const("system", "developer", "user"), "content": content},
                **common, **no_tool, tool_calls=no_calls,
            ),
            _just(
                {"role": _const("tool"), "content": content, "tool_call_id": TEXT},
                **common, tool_calls=no_calls,
            ),
            _just({"role": role, "content": content}, **{**answer, "content": content}),
            _just({"role": role, "tool_calls": some_calls}, **{**answer, "tool_calls": some_calls}),
            _just({"role": role, "refusal": SOME_TEXT}, **{**answer, "refusal": SOME_TEXT}),
        ]
    }  # fmt: skip


# ---------------------------------------------------------------- items of a response

_PARTS = _list(
    {
        "anyOf": [
            _with({"type": _const("input_text", "output_text", "text"), "text": TEXT}),
            _with({"type": _const("refusal"), "refusal": TEXT}),
            _with({"type": _const("input_image"), "image_url": SOME_TEXT}, detail=_or_null(TEXT)),
            _with({"type": _const("input_file"), "file_data": SOME_TEXT}, filename=_or_null(TEXT)),
        ]
    }
)
_SAID = {"anyOf": [TEXT, _PARTS]}
_MESSAGE = _with(
    {"role": _const("user", "system", "developer", "assistant"), "content": _SAID},
    type=_const("message"), id=_or_null(TEXT),
)  # fmt: skip
_CALL = _with(
    {"type": _const("function_call"), "call_id": TEXT, "name": TEXT, "arguments": TEXT},
    id=_or_null(TEXT),
)
_OUTPUT = _with(
    {"type": _const("function_call_output"), "call_id": TEXT, "output": _SAID}, id=_or_null(TEXT)
)
_THOUGHT = _with({"type": _const("reasoning")}, id=_or_null(TEXT))
INPUT: Schema = {
    "anyOf": [
        SOME_TEXT,
        _list({"anyOf": [_MESSAGE, _CALL, _OUTPUT, _THOUGHT]}, contains=_MESSAGE, minItems=1),
    ]
}
_FORMAT = {
    "anyOf": [
        _with({"type": _const("text", "json_object")}),
        _with({"type": _const("json_schema")}, name=TEXT, schema=FREE),
    ]
}
_RESPONSE_TOOL = _with({"type": _const("function"), "name": TEXT})
_FOLLOWS_OR_IN = _not_both(
    _given("previous_response_id", "string"),
    {"required": ["x_backchannel"], "properties": {"x_backchannel": _given("session", "string")}},
)

# ---------------------------------------------------------------- blocks of a message

_SOURCE_DATA = _with({"type": _const("base64"), "media_type": TEXT, "data": TEXT})
_SOURCE_URL = _with({"type": _const("url"), "url": TEXT})
_SOURCE_TEXT = _with({"type": _const("text"), "data": TEXT})
_PLAIN_BLOCKS = [
    _with({"type": _const("text"), "text": TEXT}),
    _with({"type": _const("image"), "source": {"anyOf": [_SOURCE_DATA, _SOURCE_URL]}}),
    _with(
        {
            "type": _const("document"),
            "source": {"anyOf": [_SOURCE_DATA, _SOURCE_URL, _SOURCE_TEXT]},
        },
        title=_or_null(TEXT),
    ),
]
_PLAIN = _list({"anyOf": _PLAIN_BLOCKS})
_RESULT = _with(
    {"type": _const("tool_result"), "tool_use_id": TEXT},
    content=_or_null({"anyOf": [TEXT, _PLAIN]}),
)
_USE = _with({"type": _const("tool_use"), "id": TEXT, "name": TEXT, "input": FREE})
_THINKING = _with({"type": _const("thinking", "redacted_thinking")})
_TURNS = {
    "anyOf": [
        _just(
            {
                "role": _const("user"),
                "content": {"anyOf": [TEXT, _list({"anyOf": [*_PLAIN_BLOCKS, _RESULT]})]},
            }
        ),
        _just(
            {
                "role": _const("assistant"),
                "content": {"anyOf": [TEXT, _list({"anyOf": [*_PLAIN_BLOCKS, _USE, _THINKING]})]},
            }
        ),
        _just({"role": _const("system"), "content": {"anyOf": [TEXT, _PLAIN]}}),
    ]
}
_MESSAGE_TOOL = {
    "anyOf": [
        _with({"name": TEXT}, type=_const("custom"), description=_or_null(TEXT)),
        _with({"type": {**TEXT, "not": _const("custom", "function")}}),
    ]
}
_MESSAGE_CHOICE = {
    "anyOf": [
        _with({"type": _const("auto", "any", "none")}),
        _with({"type": _const("tool"), "name": TEXT}),
    ]
}

# ---------------------------------------------------------------- together

_MESSAGE_BODY: Schema = {
    "properties": {
        "messages": _list(_TURNS, minItems=1),
        "system": {"anyOf": [TEXT, _PLAIN, NULL]},
        "tools": _or_null(_list(_MESSAGE_TOOL)),
        "tool_choice": _or_null(_MESSAGE_CHOICE),
        "thinking": _or_null(FREE),
    }
}
BODIES: dict[str, Schema] = {
    "CreateJob": {
        "properties": {"parameters": _or_null({**_just({}, **PARAMETERS), **ONE_CAP})},
        # either a prompt or messages
        "oneOf": [_given("prompt", "string"), _given("messages", "array")],
    },
    "Message": _messages("ToolCall"),
    "CreateChat": {"properties": PARAMETERS, "additionalProperties": False, **ONE_CAP},
    "ChatMessage": _messages(
        "_Called",
        annotations=ANY, audio=NULL, function_call=NULL, parsed=ANY,
        reasoning=_or_null(TEXT), reasoning_content=_or_null(TEXT),
    ),
    "CreateResponse": {
        "properties": {
            "input": INPUT,
            "tools": _or_null(_list(_RESPONSE_TOOL)),
            "tool_choice": {"anyOf": [TEXT, _RESPONSE_TOOL, NULL]},
            "include": _or_null(_list({**TEXT, "not": _const("message.output_text.logprobs")})),
        },
        **_FOLLOWS_OR_IN,
    },
    "Text": {"properties": {"format": _or_null(_FORMAT)}},
    "CreateMessage": _MESSAGE_BODY,
    "CountTokens": _MESSAGE_BODY,
    "NewProvider": {
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9 ._()-]{0,49}$"},
            "base_url": BASE_URL,
            "default_model": MODEL,
            "models": _list(MODEL, maxItems=1000),
        }
    },
    "EditProvider": {
        "properties": {
            "base_url": _or_null(BASE_URL),
            "default_model": _or_null(MODEL),
            "models": _or_null(_list(MODEL, maxItems=1000)),
        }
    },
    "CreateWebhook": {"properties": {"url": WEB_URL, "event_types": EVENTS}},
    "ChangeWebhook": {
        "properties": {"url": _or_null(WEB_URL), "event_types": _or_null(EVENTS)}
    },
    "TestWebhook": {"properties": {"event_type": _or_null(_const(*EVENT_TYPES))}},
    "OutputConfig": {
        "properties": {"format": _or_null(_with({"type": _const("json_schema")}, schema=FREE))}
    },
}  # fmt: skip
