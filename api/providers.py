"""Providers: who could answer, with which models; adding and changing one's own. Never a key."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Connection, select

from api.deps import Caller, IdempotencyKey, Resources, Shared, StrictRoute
from api.repeats import say_whether, use_of
from backchannel import custom_providers, roster
from backchannel.db import now_ms
from backchannel.errors import Conflict, InvalidRequest, NotFound
from backchannel.idempotency import PROVIDER
from backchannel.limits import account_of, holds
from backchannel.provider_input import EditProvider, NewProvider
from backchannel.pubsub import OUTAGE
from backchannel.registry import Provider, Registry
from backchannel.schemas import rfc3339
from backchannel.tables import workers

router = APIRouter(prefix="/v1/providers", tags=["providers"], route_class=StrictRoute)

T = TypeVar("T")


# ---------------------------------------------------------------- look


@router.get("")
async def list_providers(its: Shared) -> dict[str, Any]:
    """Every provider, available or not, and which process runs with which version of the list."""
    await its.roster.refresh()
    registry = its.registry
    held = await _holds(its, registry.providers.values())
    return {
        "object": "list",
        "data": [_shown(each, registry, held) for each in registry.providers.values()]
        + [_set_aside(each, why) for each, why in registry.set_aside.items()],
        "version": registry.version,
        "processes": [
            _itself(registry),
            *await its.db.read(lambda c: live_workers(c, its.settings.lease_s)),
        ],
    }


@router.get("/{provider_id}")
async def get_provider(provider_id: str, its: Shared) -> dict[str, Any]:
    """One provider."""
    await its.roster.refresh()
    return await _find(its, provider_id)


async def _find(its: Resources, provider_id: str) -> dict[str, Any]:
    registry = its.registry
    if provider_id in registry.set_aside.keys() - registry.providers.keys():
        return _set_aside(provider_id, registry.set_aside[provider_id])
    found = known(registry, provider_id)
    return _shown(found, registry, await _holds(its, [found]))


async def _holds(its: Resources, providers: Iterable[Provider]) -> dict[str, str]:
    """Until when each of the accounts is left alone that asked for it, as far as Redis says it."""
    accounts = [account_of(each, its.registry.stored) for each in providers]
    now = int(time.time() * 1000)
    with contextlib.suppress(*OUTAGE):
        return {
            hold.account: rfc3339(now + hold.ms)
            for hold in await holds(its.redis, its.prefix, accounts)
        }
    return {}


def known(registry: Registry, provider_id: str) -> Provider:
    """The provider with this id.

    Raises:
        NotFound: There is none.
        Conflict: Its row cannot be used.
    """
    if provider_id in registry.set_aside.keys() - registry.providers.keys():
        raise Conflict(
            f"Provider '{provider_id}' is set aside: {registry.set_aside[provider_id]} "
            f"Correct it: backchannel providers edit {provider_id}",
            code="provider_set_aside",
        )
    if provider_id not in registry.providers:
        raise NotFound(f"There is no provider '{provider_id}'.")
    return registry.providers[provider_id]


_REASONS = {
    "settings": "its key is set",
    "environment": "its key is set",
    "file": "its key is in a file",
    "stored": "its key is stored",
}


def _shown(provider: Provider, registry: Registry, held: Mapping[str, str]) -> dict[str, Any]:
    source = registry.key_source(provider)
    if source is not None:
        reason = _REASONS[source]
    elif not provider.needs_key:
        reason = "needs no key"
    elif provider.key_env:
        reason = f"no key: set {provider.key_env}"
    else:
        reason = f"no key: type backchannel keys set {provider.id}"
    return {
        "id": provider.id,
        "object": "provider",
        "name": provider.name,
        "type": provider.type,
        "base_url": provider.base_url,
        "default_model": provider.default_model,
        "models": list(provider.models),
        "capabilities": asdict(provider.capabilities),
        "prices": {
            model: {k: None if v is None else float(v) for k, v in each}
            for model, each in provider.prices.items()
        },
        "limits": asdict(provider.limits),
        "held_until": held.get(account_of(provider, registry.stored)),
        "needs_key": provider.needs_key,
        "key": source,
        "allow_loopback": provider.allow_loopback,
        "max_tokens_field": provider.max_tokens_field,
        "reports_stream_usage": provider.reports_stream_usage,
        "available": registry.key_present(provider),
        "reason": reason,
        "builtin": provider.builtin,
    }


def _set_aside(provider_id: str, why: str) -> dict[str, Any]:
    return {
        "id": provider_id,
        "object": "provider",
        "available": False,
        "reason": f"set aside: {why}",
        "builtin": False,
    }


def _itself(registry: Registry) -> dict[str, Any]:
    return {
        "kind": "api",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "version": registry.version,
    }


def live_workers(connection: Connection, lease_s: float) -> list[dict[str, Any]]:
    """The worker processes that had a heartbeat lately, and the version each runs with."""
    alive = workers.c.seen_ms > now_ms() - int(lease_s * 1000)
    rows = connection.execute(select(workers).where(alive).order_by(workers.c.started_ms))
    return [
        {"kind": "worker", "host": row.host, "pid": row.pid, "version": row.registry_version}
        for row in rows
    ]


# ---------------------------------------------------------------- change


@router.post("", status_code=201)
async def add_provider(
    asked: NewProvider,
    request: Request,
    its: Shared,
    caller: Caller,
    response: Response,
    key: IdempotencyKey = None,
) -> dict[str, Any]:
    """Add a provider; every process knows it before its next job."""
    _check_loopback(asked.allow_loopback, request)
    use = use_of(PROVIDER, caller, key, asked)
    added = await _change(its, lambda c: custom_providers.add(c, asked, its.settings, use))
    say_whether(added.first, response)
    return await _find(its, added.id)


@router.patch("/{provider_id}")
async def edit_provider(
    provider_id: str, asked: EditProvider, request: Request, its: Shared
) -> dict[str, Any]:
    """Change a provider; what is left out stays, and running answers finish as they began."""
    _check_loopback(asked.allow_loopback, request)
    await _change(its, lambda c: custom_providers.edit(c, provider_id, asked, its.settings))
    return await _find(its, provider_id)


@router.delete("/{provider_id}")
async def remove_provider(provider_id: str, its: Shared) -> dict[str, Any]:
    """Remove a provider and its stored key."""
    await _change(its, lambda c: custom_providers.remove(c, provider_id))
    return {"id": provider_id, "object": "provider.deleted", "deleted": True}


@router.delete("")
async def reset_providers(
    confirm: Annotated[Literal["true"], Query()], its: Shared
) -> dict[str, Any]:
    """Remove every provider that was added, with its stored key; the built-in ones stay."""
    removed = await _change(its, custom_providers.reset)
    return {"object": "provider.reset", "removed": removed}


async def _change(its: Resources, work: Callable[[Connection], T]) -> T:
    done = await its.db.write(work)
    await its.roster.refresh()
    await roster.hint(its.redis, its.prefix)
    return done


def _check_loopback(wanted: bool | None, request: Request) -> None:
    """The one rule of who may point this machine at itself: who is on it already."""
    if wanted and not _is_here(request):
        raise InvalidRequest(
            "allow_loopback is only for who asks from the same machine.", param="allow_loopback"
        )


def _is_here(request: Request) -> bool:
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False
