"""The keys of providers, read here and nowhere else. Never log one, never send one to Redis."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import structlog

from backchannel.errors import ProviderKeyMissing, SetupError
from backchannel.registry import Provider
from backchannel.sealed import unseal
from backchannel.settings import Settings
from backchannel.vault import source_of, variable

log = structlog.get_logger()


class Keys:
    """What one worker process opens its providers with."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stored: dict[str, str] = {}
        self._cannot: dict[str, str] = {}  # why a stored one cannot be opened
        self._files: dict[Path, tuple[int, str]] = {}  # by when the file was changed

    def __repr__(self) -> str:
        return f"<Keys of {len(self._stored)} providers>"

    def take(self, sealed: Mapping[str, bytes]) -> None:
        """Open the stored keys, in place of the ones before; an unreadable one hinders no other."""
        stored: dict[str, str] = {}
        cannot: dict[str, str] = {}
        for provider_id, data in sealed.items():
            try:
                stored[provider_id] = unseal(self._settings, data)
            except SetupError as error:
                cannot[provider_id] = error.message
                log.warning(
                    "A stored key cannot be opened; its provider is not called.",
                    provider=provider_id,
                    why=error.message,
                )
        self._stored, self._cannot = stored, cannot

    def get(self, provider: Provider) -> str | None:
        """A provider's key; None where it needs none and has none.

        Raises:
            ProviderKeyMissing: It needs one, or has one that cannot be read.
        """
        known = {**self._stored, **self._cannot}
        match source_of(provider, self._settings, known):
            case "settings":
                own = self._settings.providers[provider.id].api_key
                return own.get_secret_value() if own else None
            case "file":
                return self._in_file(provider)
            case "environment":
                return os.environ[provider.key_env or ""]
            case "stored":
                if provider.id in self._cannot:
                    raise _missing(provider, f"cannot use its key: {self._cannot[provider.id]}")
                return self._stored[provider.id]
            case None if provider.needs_key:
                name = provider.key_env or variable(provider.id, "API_KEY")
                raise _missing(
                    provider,
                    f"has no key. Set {name} where the workers start, or type: "
                    f"backchannel keys set {provider.id}",
                )
        return None

    def _in_file(self, provider: Provider) -> str:
        file = self._settings.providers[provider.id].api_key_file
        assert file is not None
        try:
            changed = file.stat().st_mtime_ns  # a mounted secret is replaced while we run
            if self._files.get(file, (0, ""))[0] != changed:
                self._files[file] = changed, file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise _missing(provider, f"cannot use its key: {file}: {why}.") from None
        key = self._files[file][1]
        if not key:
            raise _missing(provider, f"cannot use its key: {file} is empty.")
        return key


def _missing(provider: Provider, what: str) -> ProviderKeyMissing:
    return ProviderKeyMissing(f"Provider '{provider.id}' {what}", param="model")
