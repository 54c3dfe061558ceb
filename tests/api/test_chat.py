"""Chat completions as they are stored: what was asked, what may be changed, and when."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest
from openai.types.chat.chat_completion_store_message import ChatCompletionStoreMessage

from backchannel.db import Database
from tests import makers
from tests.api.play import Play
from tests.api.test_faces import the_job

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASKED: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is it?"}, IMAGE]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]


def stored(database: Database, **changes: Any) -> str:
    """The digits of a chat completion in the database."""
    job_id = makers.queued(database, caller="local", kind="chat.completion", **changes)
    return job_id.removeprefix("job_")


async def test_what_was_asked_is_given_back_as_the_sdk_reads_it(
    client: httpx2.AsyncClient, database: Database
) -> None:
    digits = stored(database, messages=ASKED)
    path = f"/v1/chat/completions/chatcmpl-{digits}/messages"
    said = (await client.get(path)).json()["data"]
    for message, asked in zip(said, ASKED, strict=True):
        # the SDK's type knows no role but the assistant's; all else is to be as it says
        ChatCompletionStoreMessage.model_validate({**message, "role": "assistant"}, strict=True)
        assert message["role"] == asked["role"]
        assert asked["content"] in (message["content"], message["content_parts"])
    assert said[2]["tool_calls"] == [CALL]
    assert len({message["id"] for message in said}) == len(ASKED)


async def test_metadata_waits_for_the_answer(
    client: httpx2.AsyncClient, database: Database, play: Play
) -> None:
    digits = stored(database)
    path, change = f"/v1/chat/completions/chatcmpl-{digits}", {"metadata": {"a": "b"}}
    early = await client.post(path, json=change)
    assert (early.status_code, early.json()["error"]["code"]) == (409, "not_finished")
    await play.run(f"job_{digits}")
    assert (await client.post(path, json=change)).json()["metadata"] == {"a": "b"}


@pytest.mark.parametrize("face", ["chat/completions", "responses", "messages"])
async def test_a_replayed_stream_says_that_it_is_one(
    client: httpx2.AsyncClient, play: Play, face: str
) -> None:
    said: dict[str, Any] = {"model": "echo", "stream": True}
    said |= {"input": "Hello?"} if face == "responses" else {"messages": ASKED[:1]}
    said |= {"max_tokens": 5} if face == "messages" else {}
    key = {"Idempotency-Key": "once"}
    asking: Any = client.post(f"/v1/{face}", json=said, headers=key)
    first = asyncio.create_task(asking)
    await play.run(await the_job(client))
    answer = await first
    again = await client.post(f"/v1/{face}", json=said, headers=key)
    assert again.content == answer.content
    assert answer.headers.get("Idempotent-Replay") is None
    assert again.headers["Idempotent-Replay"] == "true"
    assert again.headers["x-backchannel-job"] == answer.headers["x-backchannel-job"]


async def test_a_field_of_ours_is_named_where_it_stands(client: httpx2.AsyncClient) -> None:
    ours = {"x_backchannel": {"deadline_s": 1e9}}
    answer = await client.post("/v1/chat/completions", json={"messages": ASKED[:1]} | ours)
    assert answer.json()["error"]["param"] == "x_backchannel.deadline_s"
