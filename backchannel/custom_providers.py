"""Providers that somebody added: the changes of their rows, and the registry with them all.

Each change is one transaction that also counts the version up, so that every process finds out. A
row that cannot be used any more is set aside with its reason, and hinders no other.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from pydantic import ConfigDict, ValidationError
from sqlalchemy import Connection, Integer, Text, cast, delete, select, type_coerce, update
from sqlalchemy.dialects import postgresql, sqlite

from backchannel import idempotency, stored_keys
from backchannel.db import NOW
from backchannel.egress import AllowedHosts, check_url
from backchannel.errors import Conflict, InvalidRequest, NotFound
from backchannel.idempotency import Use, settle
from backchannel.ids import new_id
from backchannel.provider_input import EditProvider, NewProvider, slug
from backchannel.registry import BUILT_IN, PROVIDER_ID, Capabilities, Limits, Provider, Registry
from backchannel.registry import built_in as built_in_providers
from backchannel.settings import PriceSettings, Settings
from backchannel.stored_keys import PROVIDERS_VERSION, bump
from backchannel.strict_json import not_valid, place_of
from backchannel.tables import providers, secrets
from backchannel.tiers import NAMES
from backchannel.waiting import recall

BUILT_IN_IDS = frozenset(provider.id for provider in BUILT_IN)
# A name of these would mean something else in the place of a model.
RESERVED = frozenset(NAMES) | {"tier"}


# ---------------------------------------------------------------- changes


class Added(NamedTuple):
    """A provider's id, and whether this call added it, or one before with the same key."""

    id: str
    first: bool


def add(
    connection: Connection, new: NewProvider, settings: Settings, use: Use | None = None
) -> Added:
    """Add a provider.

    Raises:
        Conflict: The id is taken, also by somebody who adds it at the same moment; or the
            idempotency key was used for another one.
        InvalidRequest: Its address is refused.
    """
    provider_id = slug(new.name)
    if not settle(connection, use, provider_id, new_id("making")).first:
        return Added(provider_id, first=False)
    _refuse_built_in(provider_id, "Choose another name")
    if provider_id in RESERVED:
        raise Conflict(
            f"'{provider_id}' means a choice of models. Choose another name.",
            code="provider_exists", param="name",
        )  # fmt: skip
    _check_address(new.base_url, settings, loopback=new.allow_loopback)
    bump(connection)
    values = {"id": provider_id, **new.model_dump(), "created_ms": NOW, "updated_ms": NOW}
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    row = insert(providers).values(values).on_conflict_do_nothing().returning(providers.c.id)
    if connection.execute(row).first() is None:
        raise Conflict(
            f"There is a provider '{provider_id}' already. Choose another name, or type: "
            f"backchannel providers edit {provider_id}",
            code="provider_exists",
            param="name",
        )
    return Added(provider_id, first=True)


def edit(
    connection: Connection, provider_id: str, changes: EditProvider, settings: Settings
) -> None:
    """Change a provider; running answers finish as they began.

    Raises:
        NotFound: There is none.
        Conflict: It is built in.
        InvalidRequest: What it would become cannot be used.
    """
    _refuse_built_in(provider_id, "Another address of it is a setting")
    said = changes.model_dump(exclude_unset=True)
    if said:
        bump(connection)
    found = connection.execute(_ROWS.where(providers.c.id == provider_id)).first()
    if found is None:
        raise _missing(provider_id)
    before = _decoded(found._asdict())
    for name in ("capabilities", "limits"):
        if name in said and isinstance(before[name], dict):
            said[name] = {**before[name], **said[name]}
    whole, why = _provider({**before, **said}, settings)
    if whole is None:
        raise InvalidRequest(f"It would be set aside. {why}", code="invalid_provider")
    connection.execute(
        update(providers).where(providers.c.id == provider_id).values(**said, updated_ms=NOW)
    )
    if "limits" in said:
        recall(connection, provider_id)


def remove(connection: Connection, provider_id: str) -> None:
    """Remove a provider and its stored key.

    Raises:
        NotFound: There is none.
        Conflict: It is built in.
    """
    _refuse_built_in(provider_id, "It can only be left without a key")
    bump(connection)
    gone = connection.execute(delete(providers).where(providers.c.id == provider_id))
    if not gone.rowcount:
        raise _missing(provider_id)
    _forget_all_of(connection, provider_id)


def reset(connection: Connection) -> list[str]:
    """Remove every custom provider with its stored key; returns their ids."""
    bump(connection)
    gone = sorted(connection.execute(delete(providers).returning(providers.c.id)).scalars())
    for provider_id in gone:
        _forget_all_of(connection, provider_id)
    return gone


def _forget_all_of(connection: Connection, provider_id: str) -> None:
    name = stored_keys.PREFIX + provider_id
    connection.execute(delete(secrets).where(secrets.c.name == name))
    idempotency.forget(connection, idempotency.PROVIDER, provider_id)


def _refuse_built_in(provider_id: str, instead: str) -> None:
    if provider_id in BUILT_IN_IDS:
        raise Conflict(
            f"Provider '{provider_id}' is built in and stays as it is. {instead}.",
            code="provider_built_in",
        )


def _missing(provider_id: str) -> NotFound:
    return NotFound(f"There is no provider '{provider_id}'.", param="id")


def _check_address(url: str, settings: Settings, *, loopback: bool) -> None:
    try:
        check_url(url, AllowedHosts.parse(settings.egress_allow), loopback=loopback)
    except InvalidRequest as error:
        error.param = "base_url"
        raise


# ---------------------------------------------------------------- the table as a registry


class _Row(NewProvider):
    id: str
    model_config = ConfigDict(extra="ignore", strict=False)


class Loaded(NamedTuple):
    """The table at one version, as it lies there."""

    version: int
    rows: list[dict[str, Any]]
    stored: dict[str, int]


_FIELDS = tuple(name for name in NewProvider.model_fields)
_JSON = ("models", "capabilities", "prices", "limits")
_FLAGS = ("needs_key", "allow_loopback", "reports_stream_usage")
# As text and numbers: one row that is damaged must not spoil the reading of the others.
_ROWS = select(
    *(
        cast(providers.c[name], Text).label(name)
        if name in _JSON
        else type_coerce(providers.c[name], Integer).label(name)
        if name in _FLAGS
        else providers.c[name]
        for name in ("id", *_FIELDS)
    )
).order_by(providers.c.created_ms, providers.c.id)
_VERSION = select(PROVIDERS_VERSION)


def version(connection: Connection) -> int:
    """How often the providers and their keys have changed."""
    return int(connection.execute(_VERSION).scalar_one())


def load(connection: Connection) -> Loaded:
    """The whole table; at least as new as its version, which is read first."""
    number = version(connection)
    rows = [row._asdict() for row in connection.execute(_ROWS)]
    return Loaded(number, rows, stored_keys.versions_of(connection))


def registry_of(loaded: Loaded, settings: Settings) -> Registry:
    """The built-in providers, and those of the table that can be used."""
    good, set_aside = built_in_providers(settings), {}
    for row in loaded.rows:
        provider, why = _provider(row, settings)
        if provider is None:
            set_aside[str(row["id"])] = why
        else:
            good.append(provider)
    return Registry(
        good, settings, version=loaded.version, stored=loaded.stored, set_aside=set_aside
    )


def _decoded(row: Mapping[str, Any]) -> dict[str, Any]:
    whole = dict(row)
    whole["limits"] = row["limits"] or {}  # of before there were any
    for name in _JSON:
        if isinstance(row[name], str):
            with contextlib.suppress(ValueError):  # as it lies there: the check will say so
                whole[name] = json.loads(row[name])
    return whole


def _provider(row: Mapping[str, Any], settings: Settings) -> tuple[Provider | None, str]:
    """A row as a provider, or None and what is wrong with it."""
    whole = _decoded(row)
    try:
        said = _Row.model_validate(whole)
        if said.id in BUILT_IN_IDS or said.id in RESERVED or not PROVIDER_ID.match(said.id):
            return None, f"'{said.id}' cannot be its id: it means something else."
        _check_address(said.base_url, settings, loopback=said.allow_loopback)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        return None, not_valid([(place_of(each["loc"], whole), each) for each in faults]).message
    except InvalidRequest as error:
        return None, error.message
    prices = {
        model: PriceSettings(**{k: Decimal(str(v)) for k, v in each if v is not None})
        for model, each in said.prices.items()
    }
    return Provider(
        id=said.id,
        name=said.name,
        type=said.type,
        base_url=said.base_url,
        default_model=said.default_model,
        models=tuple(said.models),
        needs_key=said.needs_key,
        capabilities=Capabilities(**said.capabilities.model_dump()),
        max_tokens_field=said.max_tokens_field,
        reports_stream_usage=said.reports_stream_usage,
        colons_in_models=True,  # it may be another Ollama
        prices=prices,
        allow_loopback=said.allow_loopback,
        builtin=False,
        limits=Limits(**said.limits.model_dump()),
    ), ""


def changed(old: Registry, new: Registry) -> set[str]:
    """The ids whose entry or stored key differs between two registries."""
    ids = old.providers.keys() | new.providers.keys() | old.stored.keys() | new.stored.keys()
    return {
        each
        for each in ids
        if old.providers.get(each) != new.providers.get(each)
        or old.stored.get(each) != new.stored.get(each)
    }
