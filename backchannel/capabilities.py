"""What a request needs of its model, checked at accept, before money is spent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backchannel.errors import CapabilityMissing
from backchannel.registry import Registry, Resolved

WORDS = {
    "multimodal": "images or files",
    "structured_output": "JSON schemas",
    "tools": "tools",
}
MOST_NAMED = 5


def needs(messages: Sequence[dict[str, Any]], parameters: dict[str, Any]) -> list[str]:
    """The capabilities a chat needs: any part that is not text, a JSON schema, tools."""
    found = []
    if any(
        part.get("type") not in ("text", "refusal")
        for message in messages
        if isinstance(content := message.get("content"), list)
        for part in content
    ):
        found.append("multimodal")
    form = parameters.get("response_format")
    if isinstance(form, dict) and form.get("type") == "json_schema":
        found.append("structured_output")
    if parameters.get("tools"):
        found.append("tools")
    return found


def check_capabilities(
    registry: Registry,
    resolved: Resolved,
    messages: Sequence[dict[str, Any]],
    parameters: dict[str, Any],
) -> None:
    """Refuse what the model is not known to be able to.

    Raises:
        CapabilityMissing: It names the capability, and models that have all that is needed.
    """
    can = resolved.provider.can(resolved.model)
    if can.multimodal and can.structured_output and can.tools:
        return
    needed = needs(messages, parameters)
    missing = [each for each in needed if not getattr(can, each)]
    if missing:
        what = " and ".join(WORDS[each] for each in missing)
        able = _able(registry, needed)
        others = f"Models that can: {', '.join(able)}. Or send" if able else "Send"
        raise CapabilityMissing(
            f"{resolved.id} is not known to take {what} ({', '.join(missing)}). {others} it "
            "all the same with force.",
            param="model",
        )


def _able(registry: Registry, needed: Sequence[str]) -> list[str]:
    """Some models that could be asked now and have all of it: one of each provider first."""
    first, more = [], []
    for provider in registry.providers.values():
        if not registry.key_present(provider) or provider.type == "echo":
            continue
        # what a built-in local server has pulled, nobody here knows
        own = () if provider.builtin else (provider.default_model,)
        models = dict.fromkeys((*own, *provider.models))
        able = [
            f"{provider.id}:{model}"
            for model in models
            if all(getattr(provider.can(model), each) for each in needed)
        ]
        first += able[:1]
        more += able[1:]
    return [*first, *more][:MOST_NAMED]
