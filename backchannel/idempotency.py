"""Idempotency-Keys of what has none in its own row: the thing that each was first used for.

A key is settled in the transaction that makes its thing, so that there are both or neither, and it
lives as long as that. Jobs and batches have theirs in a column, for they are never removed.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, exists
from sqlalchemy.dialects import postgresql, sqlite

from backchannel.db import NOW
from backchannel.errors import key_mismatch
from backchannel.tables import files, providers, sessions, used_keys, webhooks

# What keys are used for. The same key may stand for one of each.
FILE = "file"
SESSION = "session"
WEBHOOK = "webhook"
SECRET = "secret"  # of a webhook: its rotation
PROVIDER = "provider"


class Use(NamedTuple):
    """Whose key is used for what, and a digest of all that was sent with it."""

    noun: str
    caller: str
    key: str
    digest: str


class Settled(NamedTuple):
    """What a key stands for, and whether that is being made just now."""

    subject: str
    mark: str
    first: bool


_its = used_keys.c.subject
_THERE: dict[str, ColumnElement[bool]] = {
    FILE: exists().where(
        files.c.id == _its, files.c.expires_ms.is_(None) | (files.c.expires_ms > NOW)
    ),
    SESSION: exists().where(sessions.c.id == _its),
    WEBHOOK: exists().where(webhooks.c.id == _its),
    SECRET: exists().where(webhooks.c.id == _its),
    PROVIDER: exists().where(providers.c.id == _its),
}
_FREE = {
    noun: delete(used_keys).where(used_keys.c.noun == noun, ~there)
    for noun, there in _THERE.items()
}
_names = ("id", "noun", "caller", "subject", "mark", "digest")
_row = {**{name: bindparam(f"new_{name}") for name in _names}, "created_ms": NOW}
# a known key is left as it is, but locked: whoever comes second waits for the first one's commit
_TAKE = {
    dialect: make(used_keys)
    .values(_row)
    .on_conflict_do_update(index_elements=["id"], set_={"noun": bindparam("new_noun")})
    .returning(used_keys.c.subject, used_keys.c.mark, used_keys.c.digest)
    for dialect, make in (("sqlite", sqlite.insert), ("postgresql", postgresql.insert))
}


def settle(connection: Connection, use: Use | None, subject: str, mark: str = "") -> Settled:
    """What a key stands for: this thing, which its transaction makes, or the one that is there.

    Args:
        use: None if there is no key; everything is made then.
        mark: Where the subject's id does not tell one making of it from another, what does.

    Raises:
        Conflict: The key was used for something else.
    """
    mark = mark or subject
    if use is None:
        return Settled(subject, mark, first=True)
    key_id = _id(use)
    connection.execute(_FREE[use.noun].where(used_keys.c.id == key_id))
    values = {
        "new_id": key_id,
        "new_noun": use.noun,
        "new_caller": use.caller,
        "new_subject": subject,
        "new_mark": mark,
        "new_digest": use.digest,
    }
    known = connection.execute(_TAKE[connection.dialect.name], values).one()
    if known.digest != use.digest:
        raise key_mismatch()
    return Settled(known.subject, known.mark, first=known.mark == mark)


def _id(use: Use) -> str:
    whose = f"{len(use.caller)} {use.caller} {use.key}"
    return f"{use.noun}-{hashlib.sha256(whose.encode()).hexdigest()}"


def forget(connection: Connection, noun: str, subject: str) -> None:
    """Free the keys of a thing that is removed and may be made again under the same id."""
    mine = and_(used_keys.c.noun == noun, used_keys.c.subject == subject)
    connection.execute(delete(used_keys).where(mine))


def forget_free(connection: Connection) -> None:
    """Remove the keys whose things are gone."""
    for statement in _FREE.values():
        connection.execute(statement)
