"""Models in OpenAI's form: what the available providers offer, each by its full name."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from api.deps import Shared, StrictRoute
from backchannel.errors import InvalidRequest, NotFound
from backchannel.registry import Registry
from backchannel.tiers import NAMES

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=StrictRoute)


@router.get("")
async def list_models(its: Shared) -> dict[str, Any]:
    """The models of every provider that could be asked now, and the tiers that lead to one."""
    await its.roster.refresh()
    return {"object": "list", "data": _offered(its.registry)}


# a path: Groq's names have slashes, and the SDKs send them encoded
@router.get("/{model:path}")
async def get_model(model: str, its: Shared) -> dict[str, Any]:
    """A model that a request may name; whether the provider has it only the provider knows."""
    try:
        resolved = await its.roster.resolve(model)
    except InvalidRequest as error:
        raise NotFound(error.message, code="model_not_found", param="model") from None
    return _shown(model, resolved.provider.id)


def _offered(registry: Registry) -> list[dict[str, Any]]:
    found = [
        _shown(f"{provider.id}:{model}", provider.id)
        for provider in registry.providers.values()
        if registry.key_present(provider)
        for model in provider.models or (provider.default_model,)
    ]
    for alias in NAMES:
        try:
            found.append(_shown(alias, registry.resolve(alias).provider.id))
        except InvalidRequest:
            continue  # no provider of its list has a key
    return found


def _shown(name: str, provider_id: str) -> dict[str, Any]:
    # nobody tells when a model was made
    return {"id": name, "object": "model", "created": 0, "owned_by": provider_id}
