"""Before the claim: who may call a provider now, and who waits in the database, at no cost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import text

from backchannel import custom_providers, stored_keys
from backchannel.limits import Place
from backchannel.provider_input import EditProvider, NewProvider
from backchannel.sealed import seal
from backchannel.settings import Settings, get_settings
from tests.fake_provider import FakeProvider
from tests.workers.conftest import Bench
from tests.workers.test_engine import calls, until
from workers import engine
from workers.process import Process
from workers.report import Report

WAIT_S = 20


@pytest.fixture
def limited(environment: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the limits of `openai`, before a process is opened."""

    def limit(**limits: int) -> None:
        environment.setenv("BACKCHANNEL_LIMITS", json.dumps({"openai": limits}))
        get_settings.cache_clear()

    return limit


async def rung(process: Process, job_id: str, provider: str | None = "openai") -> Report | None:
    """What becomes of one doorbell."""
    future = process.submit(engine.run(process, job_id, provider, "interactive"))
    return await asyncio.wait_for(asyncio.wrap_future(future), WAIT_S)


def due(bench: Bench, job_id: str) -> None:
    """The time for which it was put off has gone by."""
    bench.database.write_now(
        lambda c: c.execute(text("UPDATE jobs SET run_ms = 0 WHERE id = :job"), {"job": job_id})
    )


def assert_waits(bench: Bench, job_id: str, at_least_s: float = 0) -> None:
    """It is as if nobody had rung, but for the moment it may run."""
    job = bench.job(job_id)
    assert (job.state, job.attempt, job.retries, job.rung_ms) == ("queued", 0, 0, None)
    assert job.run_ms - job.created_ms > at_least_s * 1000
    assert bench.rows("SELECT * FROM attempts WHERE job_id = ?", job_id) == []


def places(process: Process) -> int:
    """How many places are taken in Redis."""
    with redis.Redis.from_url(process.settings.redis) as client:
        names = client.keys("*:places")
        return sum(client.zcard(name) for name in names)  # type: ignore[union-attr, misc]


@pytest.mark.parametrize("provider", ["openai", None], ids=["named", "of an older version"])
async def test_two_processes_share_a_limit_and_who_waits_costs_nothing(
    bench: Bench,
    new_process: Callable[[], Process],
    limited: Callable[..., None],
    ledger: Path,
    provider: str | None,
) -> None:
    limited(requests_per_minute=2)
    one, two = new_process(), new_process()
    first, second, third = (bench.accept("openai:ok", f"number {n}") for n in range(3))
    assert "succeeded" in str(await rung(one, first, provider))
    for process, job_id in ((two, second), (one, third)):
        assert await rung(process, job_id, provider) is None
        assert_waits(bench, job_id, 25)
    assert bench.job(third).run_ms - bench.job(second).run_ms > 25_000, "one after the other"
    other = bench.accept("anthropic:ok")
    assert "succeeded" in str(await rung(two, other, "anthropic"))
    assert calls(ledger) == 2


async def test_what_runs_at_once_is_counted_and_a_doubled_doorbell_counts_nothing(
    bench: Bench, new_process: Callable[[], Process], limited: Callable[..., None]
) -> None:
    limited(concurrency=2)
    one, two = new_process(), new_process()
    slow, other, third = (bench.accept("openai:ok-t20-d50", f"number {n}") for n in range(3))
    running = [asyncio.create_task(rung(process, slow)) for process in (one, two)]
    await until(lambda: bench.job(slow).state == "running")
    await until(lambda: places(one) == 1)
    running.append(asyncio.create_task(rung(two, other)))
    await until(lambda: bench.job(other).state == "running")
    assert await rung(one, third) is None
    assert_waits(bench, third)
    reports = await asyncio.gather(*running)
    assert sum(report is not None for report in reports) == 2
    assert places(one) == 0
    due(bench, third)
    assert "succeeded" in str(await rung(one, third))


async def test_places_are_renewed_for_longer_than_a_lease(
    bench: Bench, new_process: Callable[[], Process], limited: Callable[..., None]
) -> None:
    limited(concurrency=1)  # the lease is 2 s
    one, two = new_process(), new_process()
    slow, other = (bench.accept("openai:ok-t60-d50", f"number {n}") for n in range(2))
    running = asyncio.create_task(rung(one, slow))
    await until(lambda: bench.job(slow).state == "running")
    await asyncio.sleep(2.4)
    assert await rung(two, other) is None
    assert "succeeded" in str(await running)


async def test_the_tokens_used_are_known_afterwards(
    bench: Bench, new_process: Callable[[], Process], limited: Callable[..., None]
) -> None:
    limited(tokens_per_minute=6_000)
    process = new_process()
    job_id = bench.accept("openai:ok-t100")
    await rung(process, job_id)
    (usage,) = bench.usage(job_id)
    next_one = bench.accept("openai:ok-t5")
    place = process.submit(process.gate.enter(next_one, "openai", "interactive")).result(WAIT_S)
    assert isinstance(place, Place)
    assert place.charged == usage.input_tokens + usage.output_tokens >= 100


async def test_while_redis_cannot_say_nobody_is_called(
    bench: Bench,
    new_process: Callable[[], Process],
    limited: Callable[..., None],
    ledger: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limited(requests_per_minute=1000)
    process = new_process()

    async def away(*_: Any) -> Place:
        raise redis.ConnectionError("gone")

    monkeypatch.setattr(process.gate.limiter, "enter", away)
    job_id = bench.accept("openai:ok")
    assert await rung(process, job_id) is None
    assert_waits(bench, job_id)
    assert "succeeded" in str(await rung(process, bench.accept("anthropic:ok"), "anthropic"))
    assert calls(ledger) == 1


# ---------------------------------------------------------------- what providers ask for


async def test_what_one_process_is_told_all_others_keep_to(
    bench: Bench, new_process: Callable[[], Process], ledger: Path
) -> None:
    one, two = new_process(), new_process()
    await rung(one, bench.accept("openai:status-429-ra30"))
    await until(lambda: "openai" not in two.gate.open)
    late = new_process()  # its channel is silent: it looks
    await until(lambda: "openai" not in late.gate.open)
    for process in (one, two, late):
        job_id = bench.accept("openai:ok", f"{process.owner}")
        assert await rung(process, job_id) is None
        assert_waits(bench, job_id, 25)
    assert "succeeded" in str(await rung(two, bench.accept("anthropic:ok"), "anthropic"))
    assert calls(ledger) == 2


async def test_it_is_over_when_the_time_is_over(
    bench: Bench, process: Process, ledger: Path
) -> None:
    await rung(process, bench.accept("openai:status-429-ra1"))
    job_id = bench.accept("openai:ok")
    assert await rung(process, job_id) is None
    await asyncio.sleep(1.1)
    due(bench, job_id)
    assert "succeeded" in str(await rung(process, job_id))
    assert "openai" in process.gate.open


async def test_a_job_with_fallbacks_does_not_wait_for_a_provider_that_asked_for_it(
    bench: Bench, process: Process, ledger: Path
) -> None:
    await rung(process, bench.accept("openai:status-429-ra30"))
    job_id = bench.accept("openai:ok", fallbacks=["anthropic:ok"])
    assert "falling back after rate_limited" in str(await rung(process, job_id))
    assert "succeeded" in str(await rung(process, job_id, "anthropic"))
    assert calls(ledger) == 2
    assert [usage.provider for usage in bench.usage(job_id)] == ["anthropic"]


async def test_a_job_with_fallbacks_waits_for_a_limit_of_ours(
    bench: Bench, new_process: Callable[[], Process], limited: Callable[..., None]
) -> None:
    limited(requests_per_minute=1)
    process = new_process()
    await rung(process, bench.accept("openai:ok"))
    job_id = bench.accept("openai:ok", "next", fallbacks=["anthropic:ok"])
    assert await rung(process, job_id) is None
    assert_waits(bench, job_id)


# ---------------------------------------------------------------- changes


def add(bench: Bench, url: str, **fields: Any) -> None:
    said = {"name": "Own", "base_url": url, "default_model": "ok", "allow_loopback": True}
    new = NewProvider(**(said | fields))
    bench.database.write_now(lambda c: custom_providers.add(c, new, Settings()))


def edit(bench: Bench, **fields: Any) -> None:
    change = EditProvider(**fields)
    bench.database.write_now(lambda c: custom_providers.edit(c, "own", change, Settings()))


async def test_a_provider_that_is_new_to_the_process_is_limited_from_its_first_job_on(
    bench: Bench, new_process: Callable[[], Process], fake: FakeProvider, ledger: Path
) -> None:
    one, two = new_process(), new_process()
    add(bench, f"{fake.url}/v1", limits={"requests_per_minute": 1})  # nobody is told
    await rung(one, bench.accept("own:ok"), "own")
    job_id = bench.accept("own:ok", "next")
    assert await rung(two, job_id, "own") is None
    assert_waits(bench, job_id, 30)
    edit(bench, limits={"requests_per_minute": None})
    await until(lambda: "own" in one.gate.open and "own" in two.gate.open)
    assert "succeeded" in str(await rung(one, bench.accept("own:ok", "new"), "own"))
    assert "succeeded" in str(await rung(two, job_id, "own")), "it was called back by the change"
    assert calls(ledger) == 3


@pytest.mark.parametrize("change", ["key", "address", "price"])
async def test_what_is_asked_for_belongs_to_a_key_and_an_address(
    bench: Bench,
    new_process: Callable[[], Process],
    fake: FakeProvider,
    environment: pytest.MonkeyPatch,
    tmp_path: Path,
    change: str,
) -> None:
    environment.setenv("BACKCHANNEL_HOME", str(tmp_path / "home"))
    get_settings.cache_clear()
    process = new_process()
    add(bench, f"{fake.url}/v1")
    await rung(process, bench.accept("own:status-429-ra30"), "own")
    job_id = bench.accept("own:ok")
    assert await rung(process, job_id, "own") is None
    match change:
        case "key":
            sealed = seal(get_settings(), "sk-other-0123456789")
            bench.database.write_now(lambda c: stored_keys.put(c, "own", sealed))
        case "address":
            edit(bench, base_url=f"{fake.url}/ollama/v1")
        case _:
            edit(bench, prices={"*": {"input": 1, "output": 1}})
    await until(lambda: process.registry.version == 2)
    due(bench, job_id)
    assert (await rung(process, job_id, "own") is None) == (change == "price")


async def test_a_doorbell_of_the_model_before_takes_nothing(
    bench: Bench, new_process: Callable[[], Process], limited: Callable[..., None], ledger: Path
) -> None:
    limited(requests_per_minute=1)
    process = new_process()
    await rung(process, bench.accept("openai:ok"))
    job_id = bench.accept("openai:ok", "it asked groq before")
    assert await rung(process, job_id, "groq") is None
    assert bench.job(job_id).attempt == 0
    assert calls(ledger) == 1
