"""Provider keys: the operator's settings first, then the well-known environment variables."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from backchannel.settings import Settings

if TYPE_CHECKING:
    from backchannel.registry import Provider


def provider_key(provider: Provider, settings: Settings) -> str | None:
    """The key for a provider, or None. Never log it, never send it to Redis or Celery."""
    own = settings.providers.get(provider.id)
    if own is not None and own.api_key is not None:
        return own.api_key.get_secret_value()
    return (provider.key_env and os.environ.get(provider.key_env)) or None
