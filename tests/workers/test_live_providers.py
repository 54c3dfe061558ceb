"""A change of a provider or its key reaches running workers; what already runs goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from backchannel import custom_providers, stored_keys
from backchannel.provider_input import EditProvider, NewProvider
from backchannel.sealed import seal
from backchannel.settings import Settings, get_settings
from tests.fake_provider import FakeProvider
from tests.workers.conftest import Bench
from workers import errands
from workers.process import Process
from workers.report import Report

WAIT_S = 20
FIRST, SECOND = "sk-first-0123456789", "sk-second-0123456789"


@pytest.fixture
async def other(tmp_path: Path) -> AsyncIterator[FakeProvider]:
    """A second server, to move to."""
    async with FakeProvider(tmp_path / "other.jsonl") as provider:
        yield provider


def add(bench: Bench, url: str, **fields: Any) -> None:
    """Add the provider `own`."""
    said = {"name": "Own", "base_url": url, "default_model": "ok", "allow_loopback": True}
    new = NewProvider(**(said | fields))
    bench.database.write_now(lambda c: custom_providers.add(c, new, Settings()))


def edit(bench: Bench, **fields: Any) -> None:
    change = EditProvider(**fields)
    bench.database.write_now(lambda c: custom_providers.edit(c, "own", change, Settings()))


def store(bench: Bench, key: str) -> None:
    sealed = seal(get_settings(), key)
    bench.database.write_now(lambda c: stored_keys.put(c, "own", sealed))


async def ended(future: Future[Report | None]) -> Report | None:
    return await asyncio.wait_for(asyncio.wrap_future(future), WAIT_S)


async def run(bench: Bench, process: Process, model: str) -> Any:
    """A job's row after one attempt."""
    job_id = bench.accept(model)
    await ended(bench.start(process, job_id))
    return bench.job(job_id)


async def sent_key(bench: Bench, process: Process) -> str:
    """What the provider got to see, as the echo of it is the answer."""
    job = await run(bench, process, "own:echo")
    assert job.state == "succeeded", job.error_message
    (row,) = bench.rows("SELECT message FROM job_results WHERE job_id = ?", job.id)
    message = json.loads(row.message) if isinstance(row.message, str) else row.message
    headers = {k.lower(): v for k, v in json.loads(message["content"])["headers"].items()}
    return str(headers["authorization"])


async def test_every_process_runs_the_next_job_with_the_new_entry(
    bench: Bench,
    new_process: Callable[[], Process],
    fake: FakeProvider,
    other: FakeProvider,
    ledger: Path,
) -> None:
    processes = [new_process(), new_process()]
    assert [each.registry.version for each in processes] == [0, 0]
    add(bench, f"{fake.url}/v1")  # nobody is told: the claim says it
    for process in processes:
        assert (await run(bench, process, "own:ok")).state == "succeeded"
    assert [each.registry.version for each in processes] == [1, 1]

    slow = bench.accept("own:ok-t20-d50")
    streaming = bench.start(processes[0], slow)
    async with asyncio.timeout(WAIT_S):
        while ledger.read_text().count('"start"') < 3:  # noqa: ASYNC110  it is in other threads
            await asyncio.sleep(0.02)
    edit(bench, base_url=f"{other.url}/v1")
    for process in processes:
        assert (await run(bench, process, "own:ok")).state == "succeeded"
    assert other.connections == 2
    assert not streaming.done(), "the old client is closed only when it is unused"
    assert "succeeded" in str(await ended(streaming))
    assert bench.usage(slow)[0].output_tokens == 20


async def test_a_job_whose_provider_is_gone_or_set_aside_fails_with_the_reason(
    bench: Bench, process: Process, fake: FakeProvider
) -> None:
    add(bench, f"{fake.url}/v1")
    bench.database.write_now(
        lambda c: c.execute(text("UPDATE providers SET base_url = 'gopher://x'"))
    )
    job = await run(bench, process, "own:ok")
    assert (job.state, job.error_code) == ("failed", "provider_not_found")
    assert "is set aside: base_url" in job.error_message
    bench.database.write_now(lambda c: custom_providers.remove(c, "own"))
    job = await run(bench, process, "own:ok")
    assert (job.state, job.error_code) == ("failed", "provider_not_found")
    assert "There is no provider 'own'" in job.error_message


async def test_a_stored_key_is_used_from_the_next_job_on_and_so_is_its_successor(
    bench: Bench,
    new_process: Callable[[], Process],
    fake: FakeProvider,
    environment: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    environment.setenv("BACKCHANNEL_HOME", str(tmp_path / "home"))
    get_settings.cache_clear()
    process = new_process()
    add(bench, f"{fake.url}/v1", needs_key=True)
    job = await run(bench, process, "own:ok")
    assert (job.state, job.error_code) == ("failed", "provider_key_missing")
    assert "backchannel keys set own" in job.error_message
    store(bench, FIRST)
    assert await sent_key(bench, process) == f"Bearer {FIRST}"
    store(bench, SECOND)
    assert await sent_key(bench, process) == f"Bearer {SECOND}"
    assert FIRST not in repr(vars(process.clients.keys)), "the old one is forgotten"
    environment.setenv("BACKCHANNEL_PROVIDERS__OWN__API_KEY", "sk-env")
    get_settings.cache_clear()
    assert await sent_key(bench, new_process()) == "Bearer sk-env"
    bench.database.write_now(lambda c: stored_keys.remove(c, "own"))
    assert (await run(bench, process, "own:ok")).error_code == "provider_key_missing"


async def test_a_key_that_cannot_be_opened_is_never_left_out(
    bench: Bench, process: Process, fake: FakeProvider, tmp_path: Path
) -> None:
    add(bench, f"{fake.url}/v1")  # it needs no key, but has one
    sealed = seal(Settings(home=tmp_path / "elsewhere"), FIRST)
    bench.database.write_now(lambda c: stored_keys.put(c, "own", sealed))
    job = await run(bench, process, "own:ok")
    assert (job.state, job.error_code) == ("failed", "provider_key_missing")
    assert "cannot use its key" in job.error_message
    assert (await run(bench, process, "openai:ok")).state == "succeeded"


async def test_a_mounted_key_is_read_again_when_its_file_is_replaced(
    bench: Bench,
    new_process: Callable[[], Process],
    fake: FakeProvider,
    environment: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "key"
    file.write_text(f"{FIRST}\n")
    environment.setenv("BACKCHANNEL_PROVIDERS__OWN__API_KEY_FILE", str(file))
    get_settings.cache_clear()
    process = new_process()
    add(bench, f"{fake.url}/v1", needs_key=True)
    assert await sent_key(bench, process) == f"Bearer {FIRST}"
    (tmp_path / "next").write_text(SECOND)
    (tmp_path / "next").rename(file)
    assert await sent_key(bench, process) == f"Bearer {SECOND}"
    file.write_text("")
    job = await run(bench, process, "own:ok")
    assert (job.error_code, "is empty" in job.error_message) == ("provider_key_missing", True)


async def test_the_books_say_which_version_each_process_runs(
    bench: Bench, new_process: Callable[[], Process], fake: FakeProvider
) -> None:
    new_process(), new_process()
    add(bench, f"{fake.url}/v1")
    async with asyncio.timeout(WAIT_S):
        workers = "SELECT registry_version FROM workers"
        while {row.registry_version for row in bench.rows(workers)} != {1}:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_an_own_price_is_what_it_costs_and_without_one_nobody_knows(
    bench: Bench, process: Process, fake: FakeProvider
) -> None:
    add(bench, f"{fake.url}/v1", prices={"ok-t5": {"input": 1.0, "output": 2.0}})
    job = await run(bench, process, "own:ok-t5")
    (usage,) = bench.usage(job.id)
    assert usage.cost_nanousd == usage.input_tokens * 1_000 + 5 * 2_000
    assert usage.price_date.endswith(" own")
    job = await run(bench, process, "own:ok-t6")
    assert bench.usage(job.id)[0].cost_nanousd is None


# ---------------------------------------------------------------- discover


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"200 OK\n\nnot json", "is not JSON"),
        (b'200 OK\n\n{"models": []}', "has no data"),
        (b'401 No\n\n{"error": {"message": "wrong key"}}', "wrong key"),
        (b"404 No\n\nwhat?", "404"),
        (b"302 Found\nLocation: http://127.0.0.1:1/\n\n", "redirects are not followed"),
        (b'200 OK\n\n{"data": [' + b" " * (5 << 20), "more than 4 MiB"),
        (b"", "within 1 s"),
    ],
    ids=["prose", "no data", "401", "404", "redirect", "too big", "too slow"],
)
async def test_a_provider_that_lists_no_models_is_told_so_in_words(
    bench: Bench, process: Process, answer: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errands, "DISCOVER_S", 1.0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            if not answer:
                await reader.read()  # until the other side has had enough
            head, _, body = answer.partition(b"\n\n")
            head = head.replace(b"\n", b"\r\n")
            writer.write(b"HTTP/1.1 " + head + b"\r\nConnection: close\r\n\r\n" + body)
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    add(bench, f"http://127.0.0.1:{port}/v1")
    found = await asked(process)
    assert said in found["error"]["message"]
    assert "Provider 'own'" in found["error"]["message"]
    server.close()
    found = await asked(process)
    assert "cannot be reached" in found["error"]["message"]


@pytest.mark.parametrize("kind", ["openai-compatible", "anthropic"])
async def test_a_provider_lists_its_models(
    bench: Bench, process: Process, fake: FakeProvider, kind: str
) -> None:
    path = "/v1" if kind == "openai-compatible" else ""
    add(bench, f"{fake.url}{path}", type=kind)
    assert await asked(process) == {"models": ["ok"]}


async def asked(process: Process) -> dict[str, Any]:
    """What a worker answers to the errand."""
    future = process.submit(errands._answer(process, {"provider": "own"}))
    return await asyncio.wait_for(asyncio.wrap_future(future), WAIT_S)
