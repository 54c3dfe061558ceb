"""Callers' keys: made and shown once, found again by their hash, each good for some things."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, exists, insert, or_, select, update

from backchannel.db import NOW
from backchannel.errors import ModelNotAllowed
from backchannel.ids import new_id
from backchannel.tables import caller_keys

# What was asked while nobody had a key is this caller's; so is whoever comes in without one.
LOCAL = "local"

JOBS_WRITE = "jobs:write"
JOBS_READ = "jobs:read"
BATCHES = "batches"
USAGE_READ = "usage:read"
ADMIN = "admin"
SCOPES: dict[str, str] = {
    JOBS_WRITE: "order, cancel and delete jobs, in every form, and change sessions",
    JOBS_READ: "read jobs, streams, sessions and models",
    BATCHES: "all about files and batches",
    USAGE_READ: "read the caller's usage",
    ADMIN: "everything, and to change what all callers share",
}
USUAL = (JOBS_WRITE, JOBS_READ, BATCHES, USAGE_READ)

PREFIX = "bk_"
SHOWN_CHARS = 9  # of a key, to tell it from others: the prefix, and 36 of its 256 bits


class Caller(str):
    """The name of who asks, as it stands on every row that is theirs; and the models they may name.

    It is the name itself, so that what a query is scoped by can be nothing else.

    Attributes:
        models: Patterns of ``provider:model`` with ``*`` and ``?``; None: all models.
    """

    __slots__ = ("models",)
    models: tuple[str, ...] | None

    def __new__(cls, name: str, models: Sequence[str] | None = None) -> Caller:
        made = super().__new__(cls, name)
        made.models = None if models is None else tuple(models)
        return made

    def may_name(self, model_id: str) -> bool:
        """Whether a ``provider:model`` is one of theirs."""
        return may_name(self.models, model_id)

    def check_model(self, model_id: str) -> None:
        """`check_model` with their models."""
        check_model(self.models, model_id)


def may_name(models: Sequence[str] | None, model_id: str) -> bool:
    """Whether a ``provider:model`` is like one of these patterns; None allows all."""
    return models is None or any(fnmatchcase(model_id, each) for each in models)


def check_model(models: Sequence[str] | None, model_id: str) -> None:
    """Refuse a model that is not among those allowed.

    Raises:
        ModelNotAllowed: It is like none of these patterns.
    """
    if not may_name(models, model_id):
        raise ModelNotAllowed(
            f"This key is not for the model '{model_id}', but for {', '.join(models or ())}.",
            param="model",
        )


# ---------------------------------------------------------------- make, list, revoke


@dataclass(frozen=True, slots=True)
class NewKey:
    """What a key is to be good for."""

    name: str
    scopes: Sequence[str] = USUAL
    models: Sequence[str] | None = None
    expires_in_s: int | None = None
    tags: dict[str, str] = field(default_factory=dict)


def add(connection: Connection, new: NewKey) -> tuple[str, str]:
    """Make a key; its id, and the key itself, which nobody can find out a second time."""
    key_id, key = new_id("caller"), PREFIX + secrets.token_urlsafe(32)
    values = {
        "id": key_id,
        "name": new.name,
        "hash": hash_of(key.encode()),
        "prefix": key[:SHOWN_CHARS],
        "scopes": list(new.scopes),
        "models": None if new.models is None else list(new.models),
        "tags": new.tags,
        "created_ms": NOW,
        "expires_ms": None if new.expires_in_s is None else NOW + new.expires_in_s * 1000,
    }
    connection.execute(insert(caller_keys).values(values))
    return key_id, key


def hash_of(key: bytes) -> str:
    """What is kept of a key.

    SHA-256 as it is: slow hashes make guessing dear, and 256 random bits are not guessed at any
    price; with one, every request would pay.
    """
    return hashlib.sha256(key).hexdigest()


_ACTIVE = caller_keys.c.revoked_ms.is_(None) & or_(
    caller_keys.c.expires_ms.is_(None), caller_keys.c.expires_ms > NOW
)


def listed(connection: Connection) -> list[Any]:
    """Every key that was ever made, the newest first, with ``active``."""
    every = select(caller_keys, _ACTIVE.label("active")).order_by(caller_keys.c.id.desc())
    return list(connection.execute(every))


def revoke(connection: Connection, name_or_id: str) -> list[str]:
    """End a key, or all keys of a caller; the ids of those that were good until now."""
    meant = or_(caller_keys.c.id == name_or_id, caller_keys.c.name == name_or_id)
    ended = update(caller_keys).where(meant, _ACTIVE).values(revoked_ms=NOW)
    return list(connection.execute(ended.returning(caller_keys.c.id)).scalars())


# ---------------------------------------------------------------- find


class Known(NamedTuple):
    """A good key, as the API remembers it for a while."""

    id: str
    caller: Caller
    scopes: frozenset[str]
    left_ms: int | None  # until it expires
    unused_ms: int | None  # since its last use on record


_ANY = select(exists(select(caller_keys.c.id)))
_ANY_ACTIVE = select(exists(select(caller_keys.c.id).where(_ACTIVE)))
_GOOD = select(
    caller_keys,
    (caller_keys.c.expires_ms - NOW).label("left_ms"),
    (NOW - caller_keys.c.used_ms).label("unused_ms"),
).where(caller_keys.c.hash == bindparam("its_hash"), _ACTIVE)


def any_made(connection: Connection) -> bool:
    """Whether there ever was a key, good or not."""
    return bool(connection.execute(_ANY).scalar())


def any_active(connection: Connection) -> bool:
    """Whether somebody could come in."""
    return bool(connection.execute(_ANY_ACTIVE).scalar())


def find(connection: Connection, its_hash: str) -> Known | None:
    """The good key with this hash."""
    row = connection.execute(_GOOD, {"its_hash": its_hash}).first()
    if row is None:
        return None
    scopes = frozenset(SCOPES if ADMIN in row.scopes else row.scopes)
    return Known(row.id, Caller(row.name, row.models), scopes, row.left_ms, row.unused_ms)


def touch(connection: Connection, key_id: str) -> None:
    """Put a use on record."""
    connection.execute(update(caller_keys).where(caller_keys.c.id == key_id).values(used_ms=NOW))
