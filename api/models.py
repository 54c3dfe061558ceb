"""Models in OpenAI's form: what the available providers offer, each by its full name."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from api.deps import Caller, Shared, StrictRoute
from backchannel import keys
from backchannel.errors import InvalidRequest, NotFound
from backchannel.registry import Registry
from backchannel.tiers import NAMES

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=StrictRoute)


@router.get("")
async def list_models(its: Shared, caller: Caller) -> dict[str, Any]:
    """The models of every provider that could be asked now, and the tiers that lead to one."""
    await its.roster.refresh()
    return {"object": "list", "data": _offered(its.registry, caller)}


# a path: Groq's names have slashes, and the SDKs send them encoded
@router.get("/{model:path}")
async def get_model(model: str, its: Shared, caller: Caller) -> dict[str, Any]:
    """A model that a request may name; whether the provider has it only the provider knows."""
    try:
        resolved = await its.roster.resolve(model)
        caller.check_model(resolved.id)
    except InvalidRequest as error:
        raise NotFound(error.message, code="model_not_found", param="model") from None
    return _shown(model, resolved.provider.id)


def _offered(registry: Registry, caller: keys.Caller) -> list[dict[str, Any]]:
    found = [
        _shown(f"{provider.id}:{model}", provider.id)
        for provider in registry.providers.values()
        if registry.key_present(provider)
        for model in provider.models or (provider.default_model,)
        if caller.may_name(f"{provider.id}:{model}")
    ]
    for alias in NAMES:
        try:
            resolved = registry.resolve(alias)
        except InvalidRequest:
            continue  # no provider of its list has a key
        if caller.may_name(resolved.id):
            found.append(_shown(alias, resolved.provider.id))
    return found


def _shown(name: str, provider_id: str) -> dict[str, Any]:
    # nobody tells when a model was made
    return {"id": name, "object": "model", "created": 0, "owned_by": provider_id}
