"""Stored keys as rows: sealed before they are written, one namespace ``provider:<id>``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from backchannel.db import NOW
from backchannel.tables import secrets, versions

PREFIX = "provider:"
MAX_KEY_CHARS = 4096

PROVIDERS_VERSION = (
    select(versions.c.version).where(versions.c.name == "providers").scalar_subquery()
)
_BUMP = (
    update(versions)
    .where(versions.c.name == "providers")
    .values(version=versions.c.version + 1)
    .returning(versions.c.version)
)
_OURS = secrets.c.name.startswith(PREFIX, autoescape=True)


def bump(connection: Connection) -> int:
    """Say that a provider or a key has changed; in the transaction that changes it.

    The first statement of such a transaction: two that change at once wait for each other here, so
    whoever sees a version sees all that belongs to it.
    """
    return int(connection.execute(_BUMP).scalar_one())


def put(connection: Connection, provider_id: str, sealed: bytes) -> bool:
    """Store a provider's key; tells whether it is in place of another one."""
    version = bump(connection)
    values = {"sealed": sealed, "version": version, "updated_ms": NOW}
    name = PREFIX + provider_id
    replaced = connection.execute(
        update(secrets).where(secrets.c.name == name).values(values)
    ).rowcount
    if not replaced:
        connection.execute(insert(secrets).values(name=name, created_ms=NOW, **values))
    return bool(replaced)


def remove(connection: Connection, provider_id: str) -> bool:
    """Forget a provider's key; tells whether there was one."""
    bump(connection)
    gone = connection.execute(delete(secrets).where(secrets.c.name == PREFIX + provider_id))
    return gone.rowcount > 0


def listed(connection: Connection) -> list[Any]:
    """The stored keys' names and times, without the keys."""
    rows = connection.execute(
        select(secrets.c.name, secrets.c.version, secrets.c.created_ms, secrets.c.updated_ms)
        .where(_OURS)
        .order_by(secrets.c.name)
    )
    return list(rows)


def versions_of(connection: Connection) -> dict[str, int]:
    """The ids of providers with a stored key, and the version each was set with."""
    return {row.name.removeprefix(PREFIX): row.version for row in listed(connection)}


def sealed(connection: Connection) -> Mapping[str, bytes]:
    """The stored keys by provider, as they lie there."""
    rows = connection.execute(select(secrets.c.name, secrets.c.sealed).where(_OURS))
    return {row.name.removeprefix(PREFIX): bytes(row.sealed) for row in rows}


def seal_again(connection: Connection, again: Mapping[str, bytes]) -> None:
    """Put the same keys, sealed anew, in place of the old ones: no process need look at them."""
    for provider_id, data in again.items():
        connection.execute(
            update(secrets).where(secrets.c.name == PREFIX + provider_id).values(sealed=data)
        )
