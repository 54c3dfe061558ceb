"""Providers: who could answer, with which models, and whether a key is there. Never the key."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from api.deps import Shared, StrictRoute
from backchannel.errors import NotFound
from backchannel.registry import Provider, Registry

router = APIRouter(prefix="/v1/providers", tags=["providers"], route_class=StrictRoute)


@router.get("")
async def list_providers(its: Shared) -> dict[str, Any]:
    """Every provider, available or not."""
    found = its.registry.providers.values()
    return {"object": "list", "data": [_shown(each, its.registry) for each in found]}


@router.get("/{provider_id}")
async def get_provider(provider_id: str, its: Shared) -> dict[str, Any]:
    """One provider."""
    if provider_id not in its.registry.providers:
        raise NotFound(f"There is no provider '{provider_id}'.")
    return _shown(its.registry.providers[provider_id], its.registry)


def _shown(provider: Provider, registry: Registry) -> dict[str, Any]:
    available = registry.key_present(provider)
    if not provider.needs_key:
        reason = "needs no key"
    elif available:
        reason = "its key is set"
    else:
        reason = f"no key: set {provider.key_env}"
    return {
        "id": provider.id,
        "object": "provider",
        "name": provider.name,
        "type": provider.type,
        "base_url": provider.base_url,
        "default_model": provider.default_model,
        "models": list(provider.models),
        "capabilities": asdict(provider.capabilities),
        "available": available,
        "reason": reason,
        "builtin": provider.builtin,
    }
