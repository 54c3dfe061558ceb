"""Strict JSON: what a database or a provider would choke on later is refused, with its place."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from backchannel.errors import InvalidRequest

MAX_DEPTH = 100


def decode(body: bytes) -> Any:
    """The value of a JSON body, refusing what a database or a provider would choke on later.

    Raises:
        InvalidRequest: Not JSON, or with a key given twice, NaN or Infinity, a number beyond 64
            bits, a NUL character or half a surrogate pair; the message and ``param`` say where.
    """
    try:
        value = json.loads(body.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        _not_json(f"byte {error.start} is not UTF-8")
    except json.JSONDecodeError as error:
        _not_json(f"{error.msg} at line {error.lineno} column {error.colno}")
    except RecursionError:
        _not_json("it is nested too deeply")
    except ValueError:
        _not_json("it holds a number of more than 4,300 digits")
    _check(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known = dict(pairs)
    if len(known) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                _not_json(f"the key {json.dumps(key)} is given twice in one object", key)
            seen.add(key)
    return known


def _not_json(why: str, param: str | None = None) -> NoReturn:
    raise InvalidRequest(f"The body is not valid JSON: {why}.", code="invalid_json", param=param)


def _check(value: Any) -> None:
    ahead: list[tuple[Any, str, int]] = [(value, "", 0)]
    while ahead:
        here, place, depth = ahead.pop()
        match here:
            case str():
                _check_text(here, place)
            case float() if not math.isfinite(here):
                _not_json(f"{place or 'it'} is not a finite number", place or None)
            case int() | float() if not -(2**63) <= here < 2**64:  # 1e30 is whole, too
                raise InvalidRequest(f"{place or 'The body'}: beyond 64 bits.", param=place or None)
            case dict() | list() if depth == MAX_DEPTH:
                _not_json(f"it is nested more than {MAX_DEPTH} deep", place)
            case dict():
                for key, item in here.items():
                    _check_text(key, place, "a key")
                    ahead.append((item, f"{place}.{key}" if place else key, depth + 1))
            case list():
                ahead += [(item, f"{place}[{i}]", depth + 1) for i, item in enumerate(here)]


def _check_text(text: str, place: str, what: str = "the text") -> None:
    if "\0" in text:
        fault = "contains a NUL character"
    elif not text.isascii() and any("\ud800" <= each <= "\udfff" for each in text):
        fault = "contains half a surrogate pair"
    else:
        return
    raise InvalidRequest(f"{place or 'The body'}: {what} {fault}.", param=place or None)


def place_of(loc: Sequence[int | str], value: Any, *, missing: bool = False) -> str:
    """A pydantic location as a path in the value, as ``messages[0].content``.

    A location also names the branches of unions; what cannot be followed in the value is one.
    """
    place = ""
    for step in loc:
        if isinstance(value, dict) and isinstance(step, str) and (step in value or missing):
            place += f".{step}" if place else step
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int):
            place += f"[{step}]"
            value = value[step]
    return place


def not_valid(faults: list[tuple[str, Mapping[str, Any]]]) -> InvalidRequest:
    """The errors that pydantic found, each with its place, as one sentence."""
    # of the branches of a union the one that got furthest is the one that was meant
    place, each = max(faults, key=lambda fault: len(fault[0]))
    match each["type"]:
        case "extra_forbidden":
            why = "there is no such field."
        case "missing":
            why = "it is missing." if place else "the request needs a JSON body."
        case _:
            said = each["msg"].removeprefix("Value error, ")  # of a check of ours
            why = f"{said[:1].lower()}{said[1:]}."
    return InvalidRequest(f"{place or 'The body'}: {why}", param=place or None)


Form = TypeVar("Form", bound=BaseModel)


def validated(form: type[Form], value: dict[str, Any]) -> Form:
    """A value as a request, as if it had been the body of one.

    Raises:
        InvalidRequest: It names the field.
    """
    try:
        return form.model_validate(value)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
    raise not_valid(
        [(place_of(each["loc"], value, missing=each["type"] == "missing"), each) for each in faults]
    )
