"""The models a job is asked of: what the name it gives comes to, and whom it falls back to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from backchannel import auto
from backchannel.capabilities import check_capabilities
from backchannel.errors import InvalidRequest, ProviderKeyMissing, UnsupportedParameter
from backchannel.keys import check_model, may_name
from backchannel.parameters import check_parameters
from backchannel.registry import NAMED, Registry, Resolved
from backchannel.tiers import AUTO, NAMES, Tier, tier_of

Message = dict[str, Any]


class Choice(NamedTuple):
    """The first model, those behind it, and what all of them will honour."""

    resolved: Resolved
    parameters: dict[str, Any]
    fallbacks: list[str] | None  # provider:model
    rule: str | None  # the tier, or auto, by which the model was chosen

    def sees(self, registry: Registry) -> bool:
        """Whether all of them take images."""
        others = (registry.place(name, "") for name in self.fallbacks or ())
        return all(each.provider.can(each.model).multimodal for each in (self.resolved, *others))


def choose(
    registry: Registry,
    name: str | None,
    messages: Sequence[Message],
    parameters: dict[str, Any],
    fallbacks: Sequence[str] | None = None,
    *,
    system: str | None = None,
    force: bool = False,
    allowed: Sequence[str] | None = None,
) -> Choice:
    """Choose the models of a request.

    A tier, and `auto`, skips the models that cannot answer it: without a key, without a capability
    or a parameter that it needs. What is left of the tier are the fallbacks, unless others are
    given. Of a model and fallbacks that are named, those without a key are skipped, unless none has
    one; that one cannot honour a parameter is an error.

    Args:
        messages: All that is told, the history of a session included.
        force: Ask models that are not known to be able to answer, too.
        allowed: Patterns of the models that the caller may name; None: all.

    Raises:
        InvalidRequest: ``param`` is ``model``, ``fallbacks`` or a parameter.
    """

    def check(resolved: Resolved) -> None:
        if not force:
            check_capabilities(registry, resolved, messages, parameters)

    asked = name or registry.default_model
    tier = None if asked == AUTO else tier_of(asked)
    if asked == AUTO or tier is not None:
        request, named = auto.features_of(messages, parameters, system), f"'{asked}'"
        if tier is None:
            tier, why = auto.choose(request)
            named = f"auto: {tier}, because {why}"
        found = _of_tier(registry, tier, named, request, parameters, force, allowed)
        kept = check_parameters(parameters, found[0].provider)
        others = (
            found[1:] if fallbacks is None else _named(registry, fallbacks, kept, allowed, check)
        )
        return Choice(found[0], kept, _ids(found[0], others), asked)
    if not fallbacks:
        if allowed is not None:  # said before that it has no key
            check_model(allowed, registry.place(asked, "").id)
        resolved = registry.resolve(name)
        kept = check_parameters(parameters, resolved.provider)
        check(resolved)
        return Choice(resolved, kept, None, None)
    first = registry.place(asked, NAMED if name else "the default model")
    check_model(allowed, first.id)
    kept = check_parameters(parameters, first.provider)
    check(first)
    able = _named(registry, fallbacks, kept, allowed, check)
    if registry.key_present(first.provider):
        return Choice(first, kept, _ids(first, able), None)
    if not able:
        raise registry.key_missing(first.provider)
    reason = f"the first fallback with a key; {first.provider.id} has none"
    return Choice(replace(able[0], reason=reason), kept, _ids(able[0], able[1:]), None)


def _of_tier(
    registry: Registry,
    tier: Tier,
    named: str,
    request: auto.Features,
    parameters: dict[str, Any],
    force: bool,
    allowed: Sequence[str] | None,
) -> list[Resolved]:
    """The tier's models that can answer the request.

    Raises:
        UnsupportedParameter: It is the parameters alone that none of them can honour.
    """
    refused: list[UnsupportedParameter] = []

    def unfit(resolved: Resolved) -> str | None:
        if not may_name(allowed, resolved.id):
            return "not for this key"
        if not force and (lacking := lacks(resolved, request)) is not None:
            return lacking
        try:
            check_parameters(parameters, resolved.provider)
        except UnsupportedParameter as error:
            refused.append(error)
            return f"cannot honour {(error.param or '').removeprefix('parameters.')}"
        return None

    try:
        return registry.of_tier(tier, named, unfit)
    except ProviderKeyMissing:
        if refused:
            raise refused[0] from None
        raise


def lacks(resolved: Resolved, request: auto.Features) -> str | None:
    """What a request needs and a model has not."""
    has = resolved.provider.can(resolved.model)
    if request.images and not has.multimodal:
        return "no images"
    if request.tools and not has.tools:
        return "no tools"
    if request.schema and not has.structured_output:
        return "no JSON schema"
    return None


def _named(
    registry: Registry,
    fallbacks: Sequence[str],
    parameters: dict[str, Any],
    allowed: Sequence[str] | None,
    check: Callable[[Resolved], None],
) -> list[Resolved]:
    """The fallbacks that have a key."""
    found: list[Resolved] = []
    for name in fallbacks:
        try:
            if name in NAMES:
                raise InvalidRequest("only models can be fallbacks, and this is a list of them.")
            resolved = registry.place(name, "")
            check_model(allowed, resolved.id)
            check_parameters(parameters, resolved.provider)
            check(resolved)
        except InvalidRequest as error:
            message = f"Fallback '{name}': {error.message}"
            raise type(error)(message, code=error.code, param="fallbacks") from None
        if registry.key_present(resolved.provider):
            found.append(resolved)
    return found


def _ids(first: Resolved, others: Sequence[Resolved]) -> list[str] | None:
    names = dict.fromkeys(each.id for each in others)
    names.pop(first.id, None)
    return list(names) or None
