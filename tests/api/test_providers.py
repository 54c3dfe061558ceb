"""Providers over HTTP: who is available and why, and never a key."""

from __future__ import annotations

import httpx2
import pytest

from api.main import create_app
from backchannel.settings import Settings

SECRET = "sk-secret-0123456789"


async def test_the_list_says_who_is_available_and_why_and_shows_no_key(
    sqlite_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("BACKCHANNEL_PROVIDERS__GROQ__API_KEY", SECRET)
    monkeypatch.setenv("BACKCHANNEL_PROVIDERS__OLLAMA__BASE_URL", "http://box:11434/v1")
    app = create_app(Settings(database_url=sqlite_url, redis_url=redis_url))
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://api") as client,
    ):
        answer = await client.get("/v1/providers")
        assert SECRET not in answer.text
        listed = {each["id"]: each for each in answer.json()["data"]}
        ollama = await client.get("/v1/providers/ollama")
    assert ollama.json() == listed["ollama"]
    assert {name: each["available"] for name, each in listed.items()} == {
        "anthropic": False,
        "openai": True,
        "groq": True,
        "gemini": False,
        "ollama": True,
        "lmstudio": True,
        "echo": True,
    }
    assert listed["anthropic"]["reason"] == "no key: set ANTHROPIC_API_KEY"
    assert listed["openai"]["reason"] == "its key is set"
    assert listed["ollama"]["reason"] == "needs no key"
    assert listed["ollama"]["base_url"] == "http://box:11434/v1"
    assert listed["echo"] == {
        "id": "echo",
        "object": "provider",
        "name": "Echo (offline)",
        "type": "echo",
        "base_url": "",
        "default_model": "echo-1",
        "models": ["echo-1"],
        "capabilities": {"structured_output": True, "multimodal": True, "tools": True},
        "available": True,
        "reason": "needs no key",
        "builtin": True,
    }


async def test_an_unknown_provider_is_not_found(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/v1/providers/nobody")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"
