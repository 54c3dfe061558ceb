"""The OpenAPI document: what FastAPI reads from the routes, and what it cannot know of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.auth import SCOPES, scope_of
from api.bodies import ANY, BODIES, INTEGER, JSON, TEXT
from backchannel.registry import Registry
from backchannel.settings import Settings
from backchannel.tiers import NAMES

Schema = dict[str, Any]

_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_TOLD = {"message": _TEXT, "type": _TEXT, "code": _TEXT, "param": _TEXT_OR_NULL}
ERROR: Schema = {
    "title": "Error",
    "description": "The message is for a person, the code for a program; param is the field.",
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": [*_TOLD], "properties": _TOLD}},
}
MESSAGES_ERROR: Schema = {
    **ERROR,
    "title": "MessagesError",
    "required": ["type", "error"],
    "properties": {"type": {"const": "error"}, **ERROR["properties"]},
}
# One server-sent event; a stream is read as many of them.
EVENT: Schema = {"type": "object", "properties": dict.fromkeys(("id", "event", "data"), _TEXT)}
SECURITY: dict[str, Schema] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A caller's key: bk_…"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}

# Of every route that callers use; each may also fail in a way of its own: `default`.
REFUSALS = {
    "400": "What was sent cannot be done.",
    "401": "No caller's key, or one that is not good.",
    "403": "The key is not good for this.",
    "404": "There is no such thing, or it is somebody else's.",
    "409": "The state of things does not allow it.",
    "413": "Too large.",
    "503": "The database does not answer; try again.",
    "default": "Any other failure.",
}


def document(app: FastAPI, settings: Settings) -> Schema:
    """The document of an application; of the providers it knows, once it runs."""
    its = getattr(app.state, "resources", None)
    registry = None if its is None else its.registry
    known = getattr(app.state, "document", None)
    if known is None or known[0] is not registry:  # to make it takes as long as 200 POSTs
        app.state.document = known = (registry, _document(app, settings, registry))
    made: Schema = known[1]
    return made


def _document(app: FastAPI, settings: Settings, registry: Registry | None) -> Schema:
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = made.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for name, more in BODIES.items():
        schemas[name] = _over(schemas[name], copy.deepcopy(more))
    schemas |= {"Error": ERROR, "MessagesError": MESSAGES_ERROR, "Json": JSON}
    components["securitySchemes"] = SECURITY
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            operation["responses"].pop("422", None)  # invalid requests are a 400 here
            if _noun(path) in SCOPES:
                _guard(operation, scope_of(path, [method.upper()]), _noun(path))
            for response in operation["responses"].values():
                if "text/event-stream" in response.get("content", {}):
                    response["content"]["text/event-stream"] = {"schema": EVENT}
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = _without_null(parameter["schema"])
                _bound(parameter["schema"], numbers=False)
    for name in ("CreateJob", "Ours"):
        for kind in schemas[name]["properties"]["deadline_s"]["anyOf"]:
            if kind["type"] == "number":
                kind["maximum"] = settings.job_deadline_s
    if registry is not None:
        for schema in schemas.values():
            if _asks_for_model(schema):
                schema["properties"]["model"]["anyOf"][0]["pattern"] = _models(registry)
            for kind in schema.get("properties", {}).get("fallbacks", {}).get("anyOf", ()):
                if "items" in kind:  # models, and no choice of them
                    choices = {"enum": sorted(NAMES)}
                    kind["items"] |= {"pattern": _models(registry), "not": choices}
    for asked in _asked(made):
        _bound(asked)
    return made


def _asks_for_model(schema: Schema) -> bool:
    """Whether it is a request, not an answer, that names a model."""
    kinds = schema.get("properties", {}).get("model", {}).get("anyOf", [{}])
    return "maxLength" in kinds[0]


def _models(registry: Registry) -> str:
    """The names that can be placed: before a colon stands a provider, around them no space."""
    known = "|".join(sorted(registry.providers))
    space = r"\s\x1c-\x1f\x85"  # what Python takes for one, and other readers of patterns do not
    whole = rf"[^:\x00{space}](?:[^:\x00]*[^:\x00{space}])?"
    return rf"^(?:(?:{known}):(?:[^\x00]*[^\x00{space}])?|{whole})$"


def _over(schema: Schema, more: Schema) -> Schema:
    """A schema with more said about it; one that is a choice speaks for itself."""
    if "anyOf" in more:
        return {name: schema[name] for name in ("title", "description") if name in schema} | more
    properties = {**schema.get("properties", {}), **more.get("properties", {})}
    return {**schema, **more, "properties": properties}


def _without_null(schema: Schema) -> Schema:
    """What a header or a query can hold: a null is not sent."""
    kinds = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    if len(kinds) != 1:
        return schema
    rest = {name: value for name, value in schema.items() if name not in ("anyOf", "default")}
    return {**rest, **kinds[0]}


def _asked(made: Schema) -> Iterator[Schema]:
    """The schemas of JSON bodies, with all they refer to."""
    ahead = [
        body["content"]["application/json"]["schema"]
        for operations in made["paths"].values()
        for operation in operations.values()
        if "application/json" in (body := operation.get("requestBody", {})).get("content", {})
    ]
    seen: set[str] = set()
    while ahead:
        here = ahead.pop()
        yield here
        for name in _references(here):
            if name not in seen:
                seen.add(name)
                ahead.append(made["components"]["schemas"][name])


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2]
        schema = list(schema.values())
    if isinstance(schema, list):
        for each in schema:
            yield from _references(each)


def _bound(schema: Any, *, numbers: bool = True) -> None:
    """Say of all that can be sent what its reading refuses: `schemas.decode`."""
    if isinstance(schema, dict):
        match schema.get("type"):
            case "string" if not {"enum", "const", "format"} & schema.keys():
                schema.setdefault("pattern", TEXT["pattern"])
            case "integer" | "number" if numbers:
                schema.setdefault("maximum", INTEGER["maximum"])
                if "exclusiveMinimum" not in schema:
                    schema.setdefault("minimum", INTEGER["minimum"])
            case "object":
                _bound_object(schema)
        schema = list(schema.values())
    if isinstance(schema, list):
        for each in schema:
            _bound(each, numbers=numbers)


def _bound_object(schema: Schema) -> None:
    if schema.get("additionalProperties", True) is True:
        schema["additionalProperties"] = ANY
    schema["propertyNames"] = TEXT | schema.get("propertyNames", {})
    for each in schema.get("properties", {}).values():
        if not {"type", "anyOf", "$ref", "enum", "const"} & each.keys():
            each.update(ANY)


def _noun(path: str) -> str:
    return path.removeprefix("/v1/").partition("/")[0]


def _guard(operation: Schema, scope: str, noun: str) -> None:
    """Say who may call, and how it is refused."""
    operation["security"] = [{name: [scope]} for name in SECURITY]
    form = "MessagesError" if noun == "messages" else "Error"
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{form}"}}}
    for status, why in REFUSALS.items():
        operation["responses"].setdefault(status, {"description": why, "content": content})
