"""A fake provider, and the real adapters to ask it with."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from backchannel.settings import Settings
from tests.fake_provider import FakeProvider
from tests.workers.providers.asking import Asker
from workers.clients import ClientCache


@pytest.fixture
async def ask() -> AsyncIterator[Asker]:
    """``await ask("openai", "ok-t5")``."""
    cache = ClientCache(Settings())
    async with FakeProvider() as fake:
        yield Asker(fake, cache)
        await cache.aclose()
