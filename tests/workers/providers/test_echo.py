"""The offline provider: deterministic, counted, cheap."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import Any

import pytest

from backchannel.errors import ProviderError
from backchannel.registry import BUILT_IN
from tests.workers.providers.asking import Heard
from workers.providers import ChatRequest, Delta, Usage, adapter_for
from workers.providers.echo import WORDS_PER_DELTA

ECHO = next(provider for provider in BUILT_IN if provider.id == "echo")


def request(content: Any, **parameters: Any) -> ChatRequest:
    messages = [
        {"role": "system", "content": "four"},
        {"role": "user", "content": content},
        {"role": "assistant", "content": None},
    ]
    return ChatRequest(ECHO, "echo-1", messages, parameters, True, 1 << 20, 8 << 20)


async def echo(asked: ChatRequest) -> Heard:
    return Heard([event async for event in adapter_for(ECHO)(None, asked)])


@pytest.mark.parametrize("words", ["", "x", " two  words\n", "ü " * 100, "\n\n", "x" * 10_000])
async def test_the_last_user_message_comes_back_byte_for_byte(words: str) -> None:
    heard = await echo(request(words))
    assert heard.text == words
    assert heard.usage == Usage(1 + -(-len(words.encode()) // 4), -(-len(words.encode()) // 4))
    assert heard.finish
    assert (heard.finish.reason, heard.finish.model) == ("stop", "echo-1")


async def test_parts_are_joined_and_images_left_out() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    heard = await echo(
        request([{"type": "text", "text": "a"}, image, {"type": "text", "text": "b"}])
    )
    assert heard.text == "ab"


async def test_words_come_in_handfuls() -> None:
    heard = await echo(request("word " * 100))
    assert sum(isinstance(event, Delta) for event in heard.events) == -(-100 // WORDS_PER_DELTA)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_the_cap_on_tokens_is_kept(name: str) -> None:
    heard = await echo(request("ü" * 100, **{name: 3}))
    assert heard.text == "ü" * 6
    assert heard.usage
    assert heard.usage.output_tokens == 3
    assert heard.finish
    assert heard.finish.reason == "length"


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
async def test_json_is_answered_with_json(kind: str) -> None:
    heard = await echo(request('say "hi"', response_format={"type": kind}))
    assert json.loads(heard.text) == {"echo": 'say "hi"'}
    assert (await echo(request("x", response_format={"type": "text"}))).text == "x"


async def test_the_answer_has_its_cap() -> None:
    with pytest.raises(ProviderError) as caught:
        await echo(replace(request("x" * 11), answer_cap=10))
    assert caught.value.code == "answer_too_large"


async def test_a_thousand_prompts_take_moments() -> None:
    started = time.monotonic()
    for number in range(1000):
        await echo(request(f"prompt {number} " * 50))
    assert time.monotonic() - started < 10


def test_no_sdk_is_needed() -> None:
    import subprocess

    code = (
        "import sys; from workers.providers import adapter_for; "
        "from backchannel.registry import BUILT_IN; "
        "[adapter_for(each) for each in BUILT_IN]; import workers.clients; "
        "sys.exit(bool({'openai', 'anthropic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
