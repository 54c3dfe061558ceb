"""Fallbacks: asked only before the first piece of an answer, and every call on the books."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backchannel.errors import PROVIDER_ERRORS, UNAVAILABLE, ProviderError, ProviderKeyMissing
from backchannel.lifecycle import Ask, Claim
from tests.servers import free_port
from tests.workers.conftest import Bench
from tests.workers.test_engine import calls, driven, fields, finished
from workers.fallback import first_model, may_pass, next_model
from workers.process import Process


async def answered(bench: Bench, process: Process, job_id: str) -> Any:
    """The job, once it is over; each of its doorbells is rung by hand."""
    async with asyncio.timeout(30):
        while bench.job(job_id).finished_ms is None:
            await finished(bench, process, job_id)
            await asyncio.sleep(0.02)
    return bench.job(job_id)


def message(bench: Bench, job_id: str) -> dict[str, Any]:
    (row,) = bench.rows("SELECT message FROM job_results WHERE job_id = ?", job_id)
    said: dict[str, Any] = json.loads(row.message) if isinstance(row.message, str) else row.message
    return said


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ("openai:status-429-ra30", "rate_limited"),
        ("openai:status-529", "overloaded"),
        ("openai:status-500", "server_error"),
        ("openai:auth", "auth"),
        ("openai:billing", "billing"),
        ("openai:status-404", "invalid_request"),
        ("openai:drop", "disconnected"),
        ("openai:cut-0", "disconnected"),
        ("openai:noend-0", "truncated"),
        ("openai:stall-0", "stalled"),
        ("groq:refused", "unreachable"),
        ("gemini:no-key", "provider_key_missing"),
        ("nobody:x", "provider_not_found"),
    ],
)
async def test_another_model_answers_at_once_and_no_retry_is_burnt(
    environment: pytest.MonkeyPatch,
    bench: Bench,
    request: pytest.FixtureRequest,
    ledger: Path,
    first: str,
    code: str,
) -> None:
    environment.setenv("GROQ_API_KEY", "key")
    environment.setenv("BACKCHANNEL_PROVIDERS__GROQ__BASE_URL", f"http://127.0.0.1:{free_port()}")
    process: Process = request.getfixturevalue("process")
    job_id = bench.accept(first, fallbacks=["anthropic:ok-t5", "openai:ok"])
    report = await finished(bench, process, job_id)
    assert f"falling back after {code}" in str(report)
    waiting = bench.job(job_id)
    assert (waiting.provider, waiting.model, waiting.rank) == ("anthropic", "ok-t5", 0)
    assert waiting.rung_ms is not None, "its doorbell is rung at once"
    job = await answered(bench, process, job_id)
    assert (job.state, job.attempt, job.retries) == ("succeeded", 2, 0)
    assert (f"{job.provider}:{job.model}", job.fallback_from) == ("anthropic:ok-t5", first)
    assert job.model_reason == f"test; fell back from {first} ({code})"
    assert message(bench, job_id)["content"] == "w0 w1 w2 w3 w4 "
    log = bench.log(job_id)
    assert [event.type for event in log][:3] == ["started", "retrying", "reset"]
    assert [fields(log[n])["model"] for n in (0, 2)] == [first, "anthropic:ok-t5"]
    assert (fields(log[1])["code"], fields(log[1])["delay_ms"]) == (code, 0)
    spent = {row.attempt: row for row in bench.usage(job_id)}
    assert (spent[2].provider, spent[2].model, spent[2].billable) == ("anthropic", "ok-t5", 1)
    assert spent[2].model_reason == job.model_reason
    on_record = bench.rows(
        "SELECT attempt, outcome, error_code FROM attempts WHERE job_id = ? "
        "AND provider_call_ms IS NOT NULL ORDER BY attempt",
        job_id,
    )
    assert calls(ledger) <= len(on_record) == len(spent)
    if code not in ("provider_key_missing", "provider_not_found"):
        assert (on_record[0].outcome, on_record[0].error_code) == ("fell_back", code)
        was = spent[1]
        assert (f"{was.provider}:{was.model}", was.model_reason) == (first, "test")
        assert not was.billable


@pytest.mark.parametrize("model", ["openai:cut-3", "anthropic:noend-3", "openai:inerr-3-529"])
async def test_after_the_first_piece_of_an_answer_the_model_stays(
    bench: Bench, process: Process, model: str
) -> None:
    job_id = bench.accept(model, fallbacks=["anthropic:ok"])
    assert "retrying after" in str(await finished(bench, process, job_id))
    job = bench.job(job_id)
    assert (f"{job.provider}:{job.model}", job.fallback_from) == (model, None)
    assert (job.state, job.attempt, job.retries) == (
        "queued",
        1,
        int(model != "openai:inerr-3-529"),
    )


@pytest.mark.parametrize(
    ("model", "code"),
    [
        ("openai:context", "context_length"),
        ("openai:policy", "content_filter"),
        ("openai:status-400", "invalid_request"),
    ],
)
async def test_what_the_request_is_refused_for_is_final(
    bench: Bench, process: Process, ledger: Path, model: str, code: str
) -> None:
    job_id = bench.accept(model, fallbacks=["anthropic:ok"])
    job = await answered(bench, process, job_id)
    assert (job.state, job.error_code, job.attempt) == ("failed", code, 1)
    assert calls(ledger) == 1


async def test_after_the_last_one_the_usual_retries_begin_with_the_first(
    bench: Bench, process: Process, ledger: Path
) -> None:
    job_id = bench.accept("openai:flaky-1-500", "once", fallbacks=["anthropic:status-500"])
    job = await answered(bench, process, job_id)
    assert (job.state, job.attempt, job.retries) == ("succeeded", 3, 1)
    assert (job.provider, job.model, job.model_reason) == ("openai", "flaky-1-500", "test")
    assert calls(ledger) == 3


async def test_a_last_one_that_refuses_for_good_does_not_end_what_may_pass(
    bench: Bench, process: Process
) -> None:
    job_id = bench.accept("openai:flaky-1-500", "twice", fallbacks=["anthropic:auth"])
    job = await answered(bench, process, job_id)
    assert (job.state, job.attempt, job.retries) == ("succeeded", 3, 1)


async def test_when_all_refuse_for_good_the_job_fails_with_the_last_reason(
    bench: Bench, process: Process, ledger: Path
) -> None:
    job_id = bench.accept("openai:auth", fallbacks=["anthropic:billing", "anthropic:auth"])
    job = await answered(bench, process, job_id)
    assert (job.state, job.error_code, job.attempt) == ("failed", "auth", 3)
    assert (job.provider, job.model) == ("anthropic", "auth")
    assert calls(ledger) == 3


async def test_retries_of_all_models_together_are_counted_like_those_of_one(
    bench: Bench, process: Process, ledger: Path
) -> None:
    job_id = bench.accept("openai:status-500", fallbacks=["anthropic:status-500"])
    job = await answered(bench, process, job_id)
    assert (job.state, job.error_code) == ("failed", "server_error")
    assert (job.retries, job.attempt) == (2, 6)  # BACKCHANNEL_MAX_RETRIES is 2
    assert calls(ledger) == 6


async def test_an_open_circuit_is_walked_around(
    environment: pytest.MonkeyPatch, bench: Bench, request: pytest.FixtureRequest, ledger: Path
) -> None:
    environment.setenv("BACKCHANNEL_CIRCUIT_FAILURES", "1")
    process: Process = request.getfixturevalue("process")
    opener = bench.accept("openai:status-500", "opens it")
    await driven(bench, process, opener, "queued")
    await finished(bench, process, opener)
    job_id = bench.accept("openai:ok", fallbacks=["anthropic:ok"])
    before = calls(ledger)
    job = await answered(bench, process, job_id)
    assert (job.state, job.provider) == ("succeeded", "anthropic")
    assert calls(ledger) == before + 1


# ---------------------------------------------------------------- which one is next

CLAIM = Claim(
    job_id="job_1", attempt=1, owner="w", caller="c", lane="interactive", provider="openai",
    model="a", session_id=None, session_seq=None, stream=True, retries=0, age_ms=0, left_ms=1000,
    messages=[], parameters={}, model_reason="test", fallbacks=["groq:b", "gemini:c"],
)  # fmt: skip
DOWN = ProviderError("It is down.", code="unreachable")


def test_models_are_asked_in_order_and_then_begin_again() -> None:
    one = next_model(CLAIM, DOWN)
    assert one == Ask("groq", "b", "test; fell back from openai:a (unreachable)")
    at_b = replace(
        CLAIM, provider="groq", model="b", fallback_from="openai:a", model_reason=one.new_reason
    )
    two = next_model(at_b, DOWN)
    assert two == Ask("gemini", "c", "test; fell back from groq:b (unreachable)")
    at_c = replace(at_b, provider="gemini", model="c", model_reason=two.new_reason)
    assert next_model(at_c, DOWN) is None
    assert first_model(at_c) == Ask("openai", "a", "test")
    again = replace(CLAIM, fallback_from="openai:a")
    assert next_model(again, DOWN) == one
    assert first_model(again) is None
    assert next_model(replace(CLAIM, fallbacks=None), DOWN) is None


@pytest.mark.parametrize("code", sorted(PROVIDER_ERRORS))
def test_only_what_may_pass_or_is_unavailable_falls_back(code: str) -> None:
    falls = PROVIDER_ERRORS[code].retryable or code in UNAVAILABLE
    assert (next_model(CLAIM, ProviderError("No.", code=code)) is not None) is falls
    assert may_pass({code}) is PROVIDER_ERRORS[code].retryable


def test_a_key_that_was_taken_away_falls_back() -> None:
    assert next_model(CLAIM, ProviderKeyMissing("No key.")) is not None
    assert not may_pass({"provider_key_missing"})
