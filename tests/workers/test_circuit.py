"""An endpoint that fails again and again is left alone, tried by one call, and used again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backchannel.errors import PROVIDER_ERRORS, UNWELL, ProviderError
from backchannel.registry import BUILT_IN
from backchannel.settings import Settings, get_settings
from tests.servers import free_port
from tests.workers.conftest import Bench
from workers import circuit as module
from workers.circuit import SPREAD, Circuit
from workers.clients import ClientCache
from workers.process import Process

OPEN_S = 30.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The circuit's own clock, to be put forward."""
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    return clock


class Clock:
    """A moment."""

    now = 1000.0


@pytest.fixture
def circuit(clock: Clock) -> Circuit:
    """Opens at the third failure in a row."""
    return Circuit("An endpoint", 3, OPEN_S)


def call(circuit: Circuit, code: str | None = None, job: str = "a", *, begun: bool = False) -> None:
    """One call that ends well or with an error, before any content or after."""
    with circuit.passage(job) as passage:
        if begun or code is None:
            passage.well()
        if code is not None:
            raise ProviderError("x", code=code)


def fail(circuit: Circuit, code: str = "server_error", job: str = "a") -> None:
    with pytest.raises(ProviderError):
        call(circuit, code, job)


def is_open(circuit: Circuit) -> bool:
    return circuit.wait_s() > 0


@pytest.mark.parametrize("code", sorted(set(PROVIDER_ERRORS) - {"circuit_open"}))
def test_which_failures_in_a_row_open_it(circuit: Circuit, code: str) -> None:
    for _ in range(3):
        fail(circuit, code)
    assert is_open(circuit) == (code in UNWELL)


def test_an_answer_or_a_refusal_in_between_starts_the_count_again(circuit: Circuit) -> None:
    for sign_of_life in (None, "rate_limited", "auth"):
        fail(circuit)
        fail(circuit)
        if sign_of_life:
            fail(circuit, sign_of_life)
        else:
            call(circuit)
    assert not is_open(circuit)


def test_what_breaks_after_the_first_content_says_nothing_bad(circuit: Circuit) -> None:
    for _ in range(5):
        with pytest.raises(ProviderError):
            call(circuit, "disconnected", begun=True)
    assert not is_open(circuit)


def test_while_open_nothing_is_called_and_the_wait_is_said(circuit: Circuit, clock: Clock) -> None:
    for _ in range(3):
        fail(circuit)
    clock.now += 10
    with pytest.raises(ProviderError) as refused, circuit.passage("b"):
        pytest.fail("it was let through")
    assert refused.value.code == "circuit_open"
    assert refused.value.retryable
    assert not refused.value.policy.burns_attempt
    assert refused.value.retry_after_s is not None
    assert OPEN_S - 10 <= refused.value.retry_after_s <= OPEN_S - 10 + SPREAD * OPEN_S


def test_one_probe_goes_through_and_closes_it(circuit: Circuit, clock: Clock) -> None:
    for _ in range(3):
        fail(circuit)
    clock.now += OPEN_S
    with circuit.passage("b") as probe:
        assert is_open(circuit), "only one"
        probe.well()
        assert not is_open(circuit), "at the first content, not at the end of a long answer"
    call(circuit)


def test_a_failed_probe_opens_it_again(circuit: Circuit, clock: Clock) -> None:
    for _ in range(3):
        fail(circuit)
    clock.now += OPEN_S
    fail(circuit)
    assert circuit.wait_s() >= OPEN_S


def test_a_probe_that_learns_nothing_lets_the_next_one_through(
    circuit: Circuit, clock: Clock
) -> None:
    for _ in range(3):
        fail(circuit)
    clock.now += OPEN_S
    with pytest.raises(KeyError), circuit.passage("a"):
        raise KeyError("the job was cancelled, or its lease lost")
    assert not is_open(circuit)
    call(circuit)


def test_calls_that_began_before_it_opened_are_not_listened_to(
    circuit: Circuit, clock: Clock
) -> None:
    with circuit.passage("old") as old:
        for _ in range(3):
            fail(circuit)
        old.well()
        assert is_open(circuit)
    clock.now += OPEN_S - 1
    circuit.failed(old, "server_error")
    clock.now += 1
    assert not is_open(circuit), "the time did not begin again"


def test_a_job_alone_with_its_failures_is_blamed_for_them(circuit: Circuit) -> None:
    for _ in range(3):
        fail(circuit, job="a")
    assert circuit.blames("a"), "it may be the prompt"
    assert not circuit.blames("b")
    other = Circuit("Another", 3, OPEN_S)
    for job in "aab":
        fail(other, job=job)
    assert not other.blames("a")
    assert not other.blames("b")


def test_each_endpoint_and_key_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = ClientCache(Settings(circuit_failures=1))
    openai, groq = (next(each for each in BUILT_IN if each.id == id_) for id_ in ("openai", "groq"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-one")
    first = clients.circuit(openai)
    fail(first)
    assert clients.circuit(openai) is first
    assert not is_open(clients.circuit(groq))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-two")
    assert not is_open(clients.circuit(openai))


async def test_a_reset_forgets_what_was_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = ClientCache(Settings(circuit_failures=1))
    openai = next(each for each in BUILT_IN if each.id == "openai")
    fail(clients.circuit(openai))
    await clients.reset("openai")
    assert not is_open(clients.circuit(openai))


# ---------------------------------------------------------------- in the engine


def calls(ledger: Path) -> int:
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return sum(json.loads(line)["at"] == "start" for line in lines)


async def run(bench: Bench, process: Process, job_id: str) -> str:
    report = await asyncio.wait_for(asyncio.wrap_future(bench.start(process, job_id)), 20)
    return str(report)


@pytest.fixture
def quick_circuit(environment: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Opens at the second failure, for half a second."""
    environment.setenv("BACKCHANNEL_CIRCUIT_FAILURES", "2")
    environment.setenv("BACKCHANNEL_CIRCUIT_OPEN_S", "0.5")
    get_settings.cache_clear()
    return environment


async def test_an_open_circuit_puts_a_job_back_uncalled_unbooked_and_unburnt(
    quick_circuit: pytest.MonkeyPatch, bench: Bench, process: Process, ledger: Path
) -> None:
    for number in (1, 2):
        await run(bench, process, bench.accept("openai:status-500", prompt=f"{number}"))
    job_id = bench.accept("openai:ok-t3")
    assert "retrying after circuit_open" in await run(bench, process, job_id)
    assert calls(ledger) == 2
    job = bench.job(job_id)
    assert (job.state, job.retries, job.crashes) == ("queued", 0, 0)
    (attempt,) = bench.rows("SELECT * FROM attempts WHERE job_id = ?", job_id)
    assert (attempt.outcome, attempt.error_code) == ("retried", "circuit_open")
    assert attempt.provider_call_ms is None
    assert bench.usage(job_id) == []

    healthy = bench.accept("anthropic:ok-t3")
    await run(bench, process, healthy)
    assert bench.job(healthy).state == "succeeded", "another endpoint is not concerned"

    async with asyncio.timeout(10):
        while bench.job(job_id).state != "succeeded":
            await run(bench, process, job_id)
            await asyncio.sleep(0.05)
    kinds = [event.type for event in bench.log(job_id)]
    assert kinds[:3] == ["started", "retrying", "reset"]
    assert kinds[-1] == "end"
    assert [row.billable for row in bench.usage(job_id)] == [1]


async def test_jobs_of_a_dead_endpoint_wait_and_do_not_use_up_their_retries(
    quick_circuit: pytest.MonkeyPatch, bench: Bench, new_process: Callable[[], Process]
) -> None:
    quick_circuit.setenv(
        "BACKCHANNEL_PROVIDERS__OPENAI__BASE_URL", f"http://127.0.0.1:{free_port()}/v1"
    )
    quick_circuit.setenv("BACKCHANNEL_MAX_RETRIES", "1")
    quick_circuit.setenv("BACKCHANNEL_CIRCUIT_OPEN_S", "0.05")
    get_settings.cache_clear()
    process = new_process()
    jobs = [bench.accept("openai:ok", prompt=f"{number}") for number in range(2)]
    probes: set[Any] = set()
    async with asyncio.timeout(30):
        while len(probes) < 8:
            for job_id in jobs:
                await run(bench, process, job_id)
            await asyncio.sleep(0.02)
            rows = bench.rows("SELECT * FROM attempts WHERE provider_call_ms IS NOT NULL")
            probes = {(row.job_id, row.attempt) for row in rows}
    assert {bench.job(job_id).state for job_id in jobs} == {"queued"}
    assert all(bench.job(job_id).retries <= 1 for job_id in jobs)


async def test_a_job_that_fails_alone_still_uses_up_its_retries(
    quick_circuit: pytest.MonkeyPatch, bench: Bench, process: Process
) -> None:
    job_id = bench.accept("openai:status-500")
    async with asyncio.timeout(20):
        while bench.job(job_id).state != "failed":
            await run(bench, process, job_id)
            await asyncio.sleep(0.05)
    assert bench.job(job_id).error_code == "server_error"


async def test_with_an_open_circuit_a_job_waits_for_its_deadline(
    quick_circuit: pytest.MonkeyPatch, bench: Bench, new_process: Callable[[], Process]
) -> None:
    quick_circuit.setenv("BACKCHANNEL_CIRCUIT_OPEN_S", "60")
    get_settings.cache_clear()
    process = new_process()
    for number in (1, 2):
        await run(bench, process, bench.accept("openai:status-500", prompt=f"{number}"))
    job_id = bench.accept("openai:ok", deadline_s=1.0)
    assert "circuit_open" in await run(bench, process, job_id)
    async with asyncio.timeout(15):  # the caretaker's expiry, a habit of the process
        while bench.job(job_id).state == "queued":  # noqa: ASYNC110  the state is elsewhere
            await asyncio.sleep(0.1)
    assert (bench.job(job_id).state, bench.job(job_id).error_code) == ("expired", "expired")
