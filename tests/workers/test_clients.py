"""One client per (provider, key, base URL): what it sends, how long it lives."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from backchannel.errors import ProviderKeyMissing
from backchannel.registry import BUILT_IN, Provider
from backchannel.settings import ProviderSettings, Settings
from tests.fake_provider import FakeProvider
from tests.workers.providers.asking import Asker
from workers.clients import NO_KEY, ClientCache

OPENAI = next(provider for provider in BUILT_IN if provider.id == "openai")


def settings(**keys: str) -> Settings:
    return Settings(providers={name: ProviderSettings(api_key=key) for name, key in keys.items()})


@pytest.fixture
async def cache() -> AsyncIterator[ClientCache]:
    cache = ClientCache(settings(openai="sk-one"), max_clients=2)
    yield cache
    await cache.aclose()


@pytest.fixture
async def fake() -> AsyncIterator[FakeProvider]:
    async with FakeProvider() as fake:
        yield fake


def custom(number: int) -> Provider:
    return replace(OPENAI, id=f"own-{number}", needs_key=False, key_env=None)


async def test_the_same_provider_has_the_same_client(cache: ClientCache) -> None:
    assert cache.get(OPENAI) is cache.get(OPENAI)
    assert cache.get(OPENAI) is not cache.get(replace(OPENAI, base_url="http://127.0.0.1:1/v1"))


async def test_echo_needs_none(cache: ClientCache) -> None:
    echo = next(provider for provider in BUILT_IN if provider.id == "echo")
    assert cache.get(echo) is None
    async with cache.use(echo) as client:
        assert client is None
    assert len(cache) == 0


async def test_all_jobs_wait_for_one_import_and_the_loop_waits_for_none(
    cache: ClientCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()
    asked: list[str] = []

    def half_imported(module: str) -> None:  # it stands in sys.modules already
        asked.append(module)
        done.wait(30)

    monkeypatch.setattr("workers.clients.importlib.import_module", half_imported)

    async def first_call() -> None:
        async with cache.use(OPENAI):
            pass

    calls = [asyncio.create_task(first_call()) for _ in range(5)]
    await asyncio.sleep(0.2)
    assert not any(call.done() for call in calls)
    done.set()
    await asyncio.gather(*calls)
    assert asked.count("openai") == 1


async def test_a_missing_key_is_an_error_not_another_provider(cache: ClientCache) -> None:
    groq = next(provider for provider in BUILT_IN if provider.id == "groq")
    with pytest.raises(ProviderKeyMissing, match="GROQ_API_KEY"):
        cache.get(groq)
    with pytest.raises(ProviderKeyMissing):
        async with cache.use(groq):
            pass


async def test_a_new_key_is_a_new_client(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ClientCache(Settings())
    monkeypatch.setenv("OPENAI_API_KEY", "sk-one")
    one = cache.get(OPENAI)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-two")
    two = cache.get(OPENAI)
    assert one is not two
    assert "sk-" not in repr(list(cache._entries))
    await cache.aclose()


async def test_the_least_used_is_evicted_and_closed(cache: ClientCache) -> None:
    clients = []
    for number in (0, 1, 0, 2):
        async with cache.use(custom(number)) as client:
            clients.append(client)
    assert [client.is_closed() for client in clients if client] == [False, True, False, False]
    assert clients[0] is clients[2]
    assert len(cache) == 2


async def test_a_client_in_use_is_closed_only_afterwards(cache: ClientCache) -> None:
    async with cache.use(custom(0)) as outer:
        assert outer
        async with cache.use(custom(0)) as inner:
            assert inner is outer
            await cache.reset("own-0")
            assert cache.get(custom(0)) is not outer
        assert not outer.is_closed()
    assert outer.is_closed()


async def test_reset_takes_one_provider_only(cache: ClientCache) -> None:
    gone, stays = cache.get(custom(0)), cache.get(custom(1))
    await cache.reset("own-0")
    assert gone
    assert gone.is_closed()
    assert cache.get(custom(1)) is stays


async def test_a_running_stream_finishes_on_the_old_client(fake: FakeProvider) -> None:
    cache = ClientCache(Settings())
    ask = Asker(fake, cache)
    request = ask.request("openai", "ok-t20-d10")
    from workers.providers.openai_compatible import chat

    async with cache.use(request.provider) as client:
        events = []
        async for event in chat(client, request):
            if not events:
                await cache.reset(request.provider.id)
            events.append(event)
    assert len(events) == 22
    await cache.aclose()


ENVIRONMENT = {
    "OPENAI_API_KEY": "leak-1",
    "OPENAI_ADMIN_KEY": "leak-2",
    "OPENAI_ORG_ID": "leak-3",
    "OPENAI_PROJECT_ID": "leak-4",
    "OPENAI_BASE_URL": "http://127.0.0.1:1/leak-5",
    "OPENAI_CUSTOM_HEADERS": "X-Custom: leak-6\nAuthorization: Bearer leak-7",
    "ANTHROPIC_API_KEY": "leak-8",
    "ANTHROPIC_AUTH_TOKEN": "leak-9",
    "ANTHROPIC_BASE_URL": "http://127.0.0.1:1/leak-10",
    "ANTHROPIC_CUSTOM_HEADERS": "X-Custom: leak-11\nX-Api-Key: leak-12",
    "ANTHROPIC_ORGANIZATION_ID": "leak-13",
    "HTTP_PROXY": "http://127.0.0.1:1",
    "http_proxy": "http://127.0.0.1:1",
    "ALL_PROXY": "http://127.0.0.1:1",
}


@pytest.mark.parametrize("flavour", ["openai", "anthropic"])
@pytest.mark.parametrize("key", [None, "sk-right"])
async def test_nothing_of_the_environment_goes_to_another_server(
    fake: FakeProvider, flavour: str, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    cache = ClientCache(settings(**({f"my-{flavour}": key} if key else {})))
    heard = await Asker(fake, cache)(flavour, "echo")
    await cache.aclose()
    assert heard.error is None
    arrived: dict[str, Any] = json.loads(heard.text)
    headers = {name.lower(): value for name, value in arrived["headers"].items()}
    assert "leak" not in json.dumps(headers)
    assert not {"openai-organization", "openai-project", "x-custom"} & set(headers)
    sent_keys = [value for name, value in headers.items() if name in ("authorization", "x-api-key")]
    assert sent_keys == [f"Bearer {key or NO_KEY}"]
