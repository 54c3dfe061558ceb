"""Images, schemas and tools at every face: refused with a 400 that helps, unless forced."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest

from backchannel.batch_input import CHAT, ask
from backchannel.errors import CapabilityMissing

PICTURE = "https://example.com/cat.png"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PICTURE}}]}]
SAY = [{"role": "user", "content": "Hi"}]
MODEL = "plain:m"
ALL = {"tools": True, "multimodal": True, "structured_output": True}

FACES: dict[str, tuple[str, dict[str, Any]]] = {
    "job with an image": ("/v1/jobs", {"messages": IMAGE}),
    "job with a schema": ("/v1/jobs", {"messages": SAY, "parameters": {"response_format": SCHEMA}}),
    "job with tools": ("/v1/jobs", {"messages": SAY, "parameters": {"tools": [TOOL]}}),
    "chat": ("/v1/chat/completions", {"messages": IMAGE}),
    "response": (
        "/v1/responses",
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": PICTURE}]}]},
    ),
    "message": (
        "/v1/messages",
        {
            "max_tokens": 9,
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "source": {"type": "url", "url": PICTURE}}],
                }
            ],
        },
    ),
}


@pytest.fixture
async def plain(client: httpx2.AsyncClient) -> httpx2.AsyncClient:
    """The API, with a provider that can do nothing but text, and one that can do all."""
    own = {"base_url": "https://llm.example.com/v1", "default_model": "m"}
    for name, able in (("plain", {"tools": False}), ("seeing", ALL)):
        body = {"name": name, "capabilities": able, **own}
        assert (await client.post("/v1/providers", json=body)).status_code == 201
    return client


@pytest.mark.parametrize("face", FACES)
async def test_each_face_refuses_by_name(plain: httpx2.AsyncClient, face: str) -> None:
    path, body = FACES[face]
    answer = await plain.post(path, json=body | {"model": MODEL})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert "is not known to take" in error["message"]
    assert "Models that can: seeing:m." in error["message"]
    assert "with force" in error["message"]
    assert (await plain.get("/v1/jobs")).json()["data"] == []


async def test_force_sends_it_all_the_same(plain: httpx2.AsyncClient) -> None:
    background = {"background": True}
    for face, extra in {
        "job with an image": {"force": True},
        "job with tools": {"force": True},
        "response": background | {"x_backchannel": {"force": True}},
    }.items():
        path, body = FACES[face]
        answer = await plain.post(path, json=body | extra | {"model": MODEL})
        assert answer.is_success, answer.text
    kinds = [each["model"] for each in (await plain.get("/v1/jobs")).json()["data"]]
    assert kinds == [MODEL] * 3


@pytest.mark.parametrize(
    ("face", "extra", "headers"),
    [
        ("chat", {"x_backchannel": {"force": True}}, {}),
        ("message", {}, {"x-backchannel-force": "true"}),
    ],
)
async def test_force_on_the_faces_that_wait(
    plain: httpx2.AsyncClient, face: str, extra: dict[str, Any], headers: dict[str, str]
) -> None:
    path, body = FACES[face]
    asking = asyncio.create_task(
        plain.post(path, json=body | extra | {"model": MODEL}, headers=headers)
    )
    for _ in range(200):  # it is accepted, and waits for an answer
        if (await plain.get("/v1/jobs")).json()["data"]:
            break
        await asyncio.sleep(0.05)
    else:
        pytest.fail("it was not accepted")
    asking.cancel()


async def test_a_line_of_a_batch_is_refused_alone_and_may_be_forced(
    plain: httpx2.AsyncClient,
) -> None:
    registry = plain._transport.app.state.resources.registry  # type: ignore[attr-defined]

    def line(**extra: Any) -> bytes:
        return json.dumps({"body": {"model": MODEL, "messages": IMAGE, **extra}}).encode()

    with pytest.raises(CapabilityMissing):
        ask(CHAT, line(), registry)
    assert ask(CHAT, line(x_backchannel={"force": True}), registry).resolved.id == MODEL


# ---------------------------------------------------------------- what a session said before


async def session_with_an_image(plain: httpx2.AsyncClient, **asked: Any) -> tuple[str, str]:
    session = (await plain.post("/v1/sessions", json={"model": "seeing:m", **asked})).json()["id"]
    job = await plain.post("/v1/jobs", json={"session": session, "messages": IMAGE})
    assert job.status_code == 202
    return session, job.json()["id"]


async def test_an_image_of_an_earlier_turn_counts(plain: httpx2.AsyncClient) -> None:
    session, _ = await session_with_an_image(plain)
    turn = {"session": session, "prompt": "And now?"}
    for model in ({"model": MODEL}, {"model": "seeing:m", "fallbacks": [MODEL]}):
        answer = await plain.post("/v1/jobs", json=turn | model)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "capability_missing")
        assert "The session's earlier turns need it." in error["message"]
    assert (await plain.get(f"/v1/sessions/{session}")).json()["model"] == "seeing:m"
    assert (await plain.post("/v1/jobs", json=turn)).status_code == 202
    forced = await plain.post("/v1/jobs", json=turn | {"model": MODEL, "force": True})
    assert forced.status_code == 202


async def test_an_image_that_is_not_told_does_not_count(plain: httpx2.AsyncClient) -> None:
    cancelled, job = await session_with_an_image(plain)
    await plain.post(f"/v1/jobs/{job}/cancel")
    short, _ = await session_with_an_image(plain, history={"models": {MODEL: 8}})
    text = (await plain.post("/v1/sessions", json={"model": MODEL})).json()["id"]
    for session in (cancelled, short, text):
        turn = {"session": session, "model": MODEL, "prompt": "And now?"}
        answer = await plain.post("/v1/jobs", json=turn)
        assert answer.status_code == 202, answer.text
