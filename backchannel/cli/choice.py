"""Which model answers the lines that name none, and why."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2

from backchannel.cli.running import is_loopback
from backchannel.registry import build_registry
from backchannel.settings import Settings

# With a key first; then what runs on this machine; then the one that only repeats.
HOSTED = ("anthropic", "openai", "groq", "gemini")
LOCAL = ("ollama", "lmstudio")
OFFLINE = "echo:echo-1"
PROBE_S = 0.3


class Choice(NamedTuple):
    """A model, and a sentence about it."""

    model: str
    why: str


async def choose_model(
    wanted: str | None, settings: Settings, providers: list[dict[str, Any]], api_url: str
) -> Choice:
    """The model asked for, the configured one, or that of the first provider that is available.

    Args:
        providers: As ``GET /v1/providers`` lists them: the API's keys count, not this shell's.
    """
    if wanted:
        return Choice(wanted, f"Model {wanted}: asked for by --model.")
    if "default_model" in settings.model_fields_set:
        model = settings.default_model
        return Choice(model, f"Model {model}: BACKCHANNEL_DEFAULT_MODEL.")
    known = {each["id"]: each for each in providers}
    for provider in (known.get(name) for name in HOSTED):
        if provider is not None and provider["available"]:
            model = f"{provider['id']}:{provider['default_model']}"
            return Choice(model, f"Model {model}: the first provider whose key is set.")
    for provider in (known.get(name) for name in LOCAL):
        if provider is not None and is_loopback(api_url):
            served = await _served_model(provider)
            if served is not None:
                model = f"{provider['id']}:{served}"
                why = f"no key is set, and {provider['name']} runs at {provider['base_url']}"
                return Choice(model, f"Model {model}: {why}.")
    return Choice(
        OFFLINE,
        f"Model {OFFLINE}: it is offline and only repeats each prompt, because no key is set and "
        "no local server answers. For a real one, type: export OPENAI_API_KEY=…, or run with "
        "--model ollama:llama3.2",
    )


def real_model_is_meant(wanted: str | None, settings: Settings) -> bool:
    """Whether this shell names a model other than echo, or holds a key for one."""
    if wanted is None and "default_model" in settings.model_fields_set:
        wanted = settings.default_model
    if wanted is not None:
        return wanted.partition(":")[0] != "echo"
    registry = build_registry(settings)
    return any(registry.key_present(registry.get(name)) for name in HOSTED)


async def _served_model(provider: dict[str, Any]) -> str | None:
    """The default model if the server has it, else its first; None if it does not answer."""
    base = provider["base_url"].rstrip("/")
    if not await _listens(base):
        return None
    try:
        async with httpx2.AsyncClient(timeout=2.0, trust_env=not is_loopback(base)) as client:
            answer = (await client.get(f"{base}/models")).json()
        names = [each["id"] for each in answer["data"] if "embed" not in each["id"]]
    except (httpx2.HTTPError, ValueError, KeyError, TypeError):
        return None
    default: str = provider["default_model"]
    if {default, f"{default}:latest"} & set(names):
        return default
    return names[0] if names else None


async def _listens(base: str) -> bool:
    """Whether anybody does, quickly: a laptop without Ollama must not wait for it."""
    place = urlsplit(base)
    port = place.port or (443 if place.scheme == "https" else 80)
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(PROBE_S):
            _, writer = await asyncio.open_connection(place.hostname, port)
            writer.close()
            return True
    return False
