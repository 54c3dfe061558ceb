"""An Idempotency-Key on a POST that makes something: sent again, it finds what was made."""

from __future__ import annotations

from typing import Any

from fastapi import Response
from pydantic import BaseModel

from api.requests import request_hash
from backchannel.idempotency import Use


def use_of(
    noun: str, caller: str, key: str | None, asked: BaseModel | None, **more: Any
) -> Use | None:
    """What the key is used for, or None without one; `more` is what the address says."""
    if key is None:
        return None
    sent = {} if asked is None else asked.model_dump(exclude_unset=True)
    return Use(noun, caller, key, request_hash({"sent": sent, **more}))


def say_whether(first: bool, response: Response) -> None:
    """Say so if the answer was given before."""
    if not first:
        response.headers["Idempotent-Replay"] = "true"
