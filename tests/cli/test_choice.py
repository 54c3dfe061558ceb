"""The model of lines that name none: the first provider that could really answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from backchannel.cli.choice import choose_model
from backchannel.registry import BUILT_IN
from backchannel.settings import Settings
from tests.fake_provider import FakeProvider

HERE = "http://127.0.0.1:8000"
NOBODY = "http://127.0.0.1:1/v1"


def providers(*available: str, **base_urls: str) -> list[dict[str, Any]]:
    """As the API lists them; local servers are at ports where nobody listens unless given."""
    return [
        {
            "id": each.id,
            "name": each.name,
            "default_model": each.default_model,
            "available": not each.needs_key or each.id in available,
            "base_url": base_urls.get(each.id, NOBODY if not each.needs_key else each.base_url),
        }
        for each in BUILT_IN
    ]


async def chosen(*available: str, wanted: str | None = None, **base_urls: str) -> tuple[str, str]:
    return await choose_model(wanted, Settings(), providers(*available, **base_urls), HERE)


async def test_what_is_asked_for_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCHANNEL_DEFAULT_MODEL", "groq:x")
    assert (await chosen("openai", wanted="ollama:llama3.2"))[0] == "ollama:llama3.2"


async def test_then_the_configured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCHANNEL_DEFAULT_MODEL", "groq:x")
    model, why = await chosen("openai")
    assert model == "groq:x"
    assert "BACKCHANNEL_DEFAULT_MODEL" in why


@pytest.mark.parametrize(
    ("available", "model"),
    [
        (("gemini", "anthropic", "openai"), "anthropic:claude-sonnet-4-5-20250929"),
        (("gemini", "groq"), "groq:llama-3.3-70b-versatile"),
        (("gemini",), "gemini:gemini-2.5-flash"),
    ],
)
async def test_then_the_first_with_a_key(available: tuple[str, ...], model: str) -> None:
    assert (await chosen(*available))[0] == model


async def test_then_a_server_on_this_machine_with_a_model_it_really_has() -> None:
    async with FakeProvider() as fake:
        model, why = await chosen(ollama=f"{fake.url}/v1")
        assert model == "ollama:ok"
        assert fake.url in why
        remote = await choose_model(
            None, Settings(), providers(ollama=f"{fake.url}/v1"), "https://queue.example.com"
        )
        assert remote.model == "echo:echo-1"  # the API's machine is not this one


async def test_a_server_that_does_not_answer_is_not_waited_for() -> None:
    silent = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    async with asyncio.timeout(5):
        model, why = await chosen(lmstudio=f"http://127.0.0.1:{port}/v1")
    assert model == "echo:echo-1"
    assert "export OPENAI_API_KEY=…" in why
    assert "--model ollama:llama3.2" in why
    silent.close()
    await silent.wait_closed()
