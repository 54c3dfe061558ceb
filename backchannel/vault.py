"""Where a provider's key is: settings, a mounted file, the environment, else a sealed row.

Never the key itself: that is read in `workers/keys.py`, and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Container
from typing import TYPE_CHECKING, Literal

from backchannel.settings import Settings

if TYPE_CHECKING:
    from backchannel.registry import Provider

Source = Literal["settings", "file", "environment", "stored"]


def source_of(provider: Provider, settings: Settings, stored: Container[str]) -> Source | None:
    """Which place a provider's key is taken from; None if it is in none of them.

    Args:
        stored: The ids that have a sealed row.
    """
    own = settings.providers.get(provider.id)
    if own is not None and own.api_key is not None and own.api_key.get_secret_value():
        return "settings"
    if own is not None and own.api_key_file is not None and own.api_key_file.is_file():
        return "file"
    if provider.key_env and os.environ.get(provider.key_env):
        return "environment"
    return "stored" if provider.id in stored else None


def variable(provider_id: str, field: str) -> str:
    """The setting of one provider, as it stands in the environment."""
    return f"BACKCHANNEL_PROVIDERS__{provider_id.upper().replace('-', '_')}__{field}"
