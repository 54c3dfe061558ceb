"""Whatever a provider breaks, the right code comes out, and no broken answer passes for whole."""

from __future__ import annotations

import asyncio
import socket
import tracemalloc

import pytest

from backchannel.errors import PROVIDER_ERRORS
from tests.workers.providers.asking import FLAVOURS, PROMPT, Asker
from workers.providers import Delta, ProviderEvent, adapter_for

TEXT_16 = "".join(f"w{i} " for i in range(16))
UTF8_16 = "".join(f"ü{i} 🙂 " for i in range(16))

# What a provider does → what it is. A pair where streamed and plain answers differ.
FAULTS: dict[str, str | tuple[str, str]] = {
    "status-400": "invalid_request",
    "status-401": "auth",
    "status-402": "billing",
    "status-403": "auth",
    "status-404": "invalid_request",
    "status-408": "server_error",
    "status-409": "server_error",
    "status-413": "context_length",
    "status-418": "invalid_request",
    "status-429": "rate_limited",
    "status-500": "server_error",
    "status-502": "server_error",
    "status-503": "overloaded",
    "status-529": "overloaded",
    "context": "context_length",
    "policy": "content_filter",
    "redirect": "invalid_request",
    "drop": "disconnected",
    "html": "malformed",
    "empty": "truncated",
    "errjson200": "overloaded",
    "cut-0": "disconnected",
    "cut-5": "disconnected",
    "noend-0": "truncated",
    "noend-5": "truncated",
    "half-0": "truncated",
    "half-5": "truncated",
    "silent": "truncated",
    "inerr-0": "overloaded",
    "inerr-5-429": "rate_limited",
    "inerr-5-500": "server_error",
    "badjson-0": "malformed",
    "badjson-5": "malformed",
    "notsse-0": "malformed",
    "notsse-5": "malformed",
    "bigline": ("malformed", "answer_too_large"),
    "bigtext": "answer_too_large",
}


def expected(fault: str, flavour: str, stream: bool) -> str:
    if flavour == "ollama" and stream and fault.startswith("inerr"):
        return "truncated"  # it says nothing: an empty chunk, and the end
    code = FAULTS[fault]
    return code if isinstance(code, str) else code[0 if stream else 1]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("fault", FAULTS)
async def test_every_fault_has_its_code(ask: Asker, fault: str, flavour: str, stream: bool) -> None:
    heard = await ask(flavour, fault, stream=stream)
    assert heard.error is not None, f"a broken answer passed for success: {heard}"
    assert heard.error.code == expected(fault, flavour, stream)
    assert heard.error.policy is PROVIDER_ERRORS[heard.error.code]
    assert heard.finish is None
    assert TEXT_16.startswith(heard.text) or fault == "bigtext"
    assert f"my-{flavour}" in heard.error.message
    assert PROMPT not in heard.error.message
    assert fault != "html" or "page" in heard.error.message


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    "model", ["ok", "bom", "crlf", "comments", "json200", "sse200", "utf8", "drip", "nousage"]
)
async def test_every_oddity_is_read(ask: Asker, model: str, flavour: str, stream: bool) -> None:
    heard = await ask(flavour, model, stream=stream)
    assert heard.error is None
    assert heard.text == (UTF8_16 if model in ("utf8", "drip") else TEXT_16)
    assert heard.finish
    assert heard.finish.reason == "stop"


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
async def test_an_answer_cut_at_any_byte_is_whole_or_an_error(
    ask: Asker, flavour: str, stream: bool
) -> None:
    """0 truncated answers seen as success, wherever the clean end falls."""
    whole = await ask(flavour, f"chop-{1 << 20}-t2", stream=stream)
    assert whole.error is None
    sixteen = asyncio.Semaphore(16)

    async def cut(size: int) -> bool:
        async with sixteen:
            heard = await ask(flavour, f"chop-{size}-t2", stream=stream)
        if heard.error:
            assert heard.error.code == "truncated", f"{size}: {heard}"
            return False
        assert heard.text == whole.text, f"{size}: {heard}"
        assert heard.finish, f"{size}: {heard}"
        return True

    results = await asyncio.gather(*map(cut, range(1500)))
    assert not results[0]
    assert results[-1]
    assert results == sorted(results), "once whole, whole with every further byte"


@pytest.mark.parametrize("flavour", ["openai", "anthropic"])
async def test_usage_before_a_failure_is_on_the_books(ask: Asker, flavour: str) -> None:
    heard = await ask(flavour, "cut-5-c50")
    assert heard.error
    if flavour == "anthropic":  # it says so at the start; OpenAI only at the end
        assert heard.usage
        assert heard.usage.input_tokens == 56
        assert heard.usage.cached_tokens == 50


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_retry_after_is_kept(ask: Asker, flavour: str) -> None:
    heard = await ask(flavour, "status-429-ra7")
    assert heard.error
    assert (heard.error.retry_after_s, heard.error.status_code) == (7.0, 429)


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_one_call_is_one_call(ask: Asker, flavour: str) -> None:
    """No SDK retries behind our back, and no redirect is followed with the key in hand."""
    for model in ("status-500", "status-429", "drop", "redirect"):
        await ask(flavour, model)
    starts = [entry["model"] for entry in ask.fake.entries if entry["at"] == "start"]
    assert starts == ["status-500", "status-429", "drop", "redirect"]
    assert not [entry for entry in ask.fake.entries if entry["at"] == "elsewhere"]


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_keep_alives_are_no_events(ask: Asker, flavour: str) -> None:
    """The engine's watchdog works on events: a stall must look like one."""
    request = ask.request(flavour, "stall-5")
    async with ask.cache.use(request.provider) as client:
        events = adapter_for(request.provider)(client, request)
        heard: list[ProviderEvent] = []

        async def listen() -> None:
            async for event in events:
                heard.append(event)  # noqa: PERF401  # kept also when cancelled

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(listen(), 1)
    assert sum(isinstance(event, Delta) for event in heard) == 5


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_closing_the_generator_closes_the_connection(ask: Asker, flavour: str) -> None:
    request = ask.request(flavour, "ok-t100000-d5")
    async with ask.cache.use(request.provider) as client:
        events = adapter_for(request.provider)(client, request)
        async for event in events:
            if isinstance(event, Delta):
                break
        await events.aclose()  # type: ignore[attr-defined]
        for _ in range(1000):
            if ask.fake.entries[-1]["at"] == "end":
                break
            await asyncio.sleep(0.01)
    assert ask.fake.entries[-1]["outcome"] == "client left"
    assert ask.fake.entries[-1]["tokens"] < 1000


@pytest.mark.parametrize("flavour", ["openai", "anthropic"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
@pytest.mark.parametrize("model", ["bigline", "bigtext", "bigerror"])
async def test_memory_is_bounded(ask: Asker, flavour: str, stream: bool, model: str) -> None:
    """The fake sends 64 MiB; the caps are 64 KiB."""
    await ask(flavour, "ok")  # imports and connects
    tracemalloc.start()
    try:
        heard = await ask(flavour, model, stream=stream, line_cap=1 << 16, answer_cap=1 << 16)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert heard.error
    assert peak < 8 << 20


@pytest.mark.parametrize("flavour", ["openai", "anthropic"])
async def test_nobody_there_is_unreachable(ask: Asker, flavour: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        heard = await ask(flavour, "ok", base_url=f"http://127.0.0.1:{port}/v1")
    assert heard.error
    assert heard.error.code == "unreachable"
    assert str(port) in heard.error.message


@pytest.mark.parametrize("flavour", ["openai", "anthropic"])
async def test_an_unknown_host_is_unreachable(ask: Asker, flavour: str) -> None:
    heard = await ask(flavour, "ok", base_url="http://nobody.invalid/v1")
    assert heard.error
    assert heard.error.code == "unreachable"


@pytest.mark.parametrize("flavour", ["openai", "anthropic"])
async def test_tls_that_is_none_is_unreachable(ask: Asker, flavour: str) -> None:
    https = ask.fake.url.replace("http://", "https://")
    heard = await ask(flavour, "ok", base_url=f"{https}/v1")
    assert heard.error
    assert heard.error.code == "unreachable"


@pytest.mark.parametrize("flavour", ["openai", "anthropic"])
async def test_a_base_url_that_is_no_address_is_named(ask: Asker, flavour: str) -> None:
    heard = await ask(flavour, "ok", base_url="ftp://127.0.0.1/v1")
    assert heard.error
    assert heard.error.code == "invalid_request"
    assert "ftp://127.0.0.1/v1" in heard.error.message


@pytest.mark.parametrize("flavour", ["openai", "anthropic"])
async def test_a_server_that_does_not_speak_http_is_malformed(ask: Asker, flavour: str) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        heard = await ask(flavour, "ok", base_url=f"http://127.0.0.1:{port}/v1")
    assert heard.error
    assert heard.error.code in ("malformed", "disconnected")
