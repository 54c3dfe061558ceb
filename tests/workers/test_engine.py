"""One attempt from claim to finish: every way it can end, on both databases."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import DataError

from backchannel import bus, cancelling, events, lifecycle
from backchannel.errors import PROVIDER_ERRORS, ProviderError
from backchannel.lifecycle import Claim
from backchannel.settings import Settings
from tests import makers
from tests.workers.conftest import Bench
from workers.backoff import retry_delay_s
from workers.engine import MAX_HOPING
from workers.process import Process
from workers.report import Report

WAIT_S = 20


async def finished(bench: Bench, process: Process, job_id: str) -> Report | None:
    return await asyncio.wait_for(asyncio.wrap_future(bench.start(process, job_id)), WAIT_S)


async def driven(bench: Bench, process: Process, job_id: str, state: str) -> None:
    """Ring by hand, as the dispatcher would, until the job is in a state."""
    async with asyncio.timeout(WAIT_S):
        while bench.job(job_id).state != state:
            await finished(bench, process, job_id)
            await asyncio.sleep(0.02)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  the state is in other threads
            await asyncio.sleep(0.02)


def calls(ledger: Path) -> int:
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return len({json.loads(line)["call"] for line in lines})


def fields(event: events.Event) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(event.data)
    return whole


@pytest.mark.parametrize("model", ["openai:ok-t5", "anthropic:ok-t5"])
async def test_an_answer_is_streamed_stored_and_booked(
    bench: Bench, process: Process, model: str
) -> None:
    makers.webhook(bench.database, caller="local")
    job_id = bench.accept(model)
    report = await finished(bench, process, job_id)
    job = bench.job(job_id)
    assert (job.state, job.finish_reason, job.attempt) == ("succeeded", "stop", 1)
    (row,) = bench.rows("SELECT message FROM job_results WHERE job_id = ?", job_id)
    message = json.loads(row.message) if isinstance(row.message, str) else row.message
    assert message == {"role": "assistant", "content": "w0 w1 w2 w3 w4 "}
    (usage,) = bench.usage(job_id)
    assert (usage.billable, usage.source, usage.output_tokens) == (1, "final", 5)
    (told,) = bench.rows("SELECT type FROM deliveries WHERE subject = ?", job_id)
    assert told.type == "job.succeeded"
    stored = bench.log(job_id)
    assert [event.seq for event in stored] == list(range(len(stored)))
    assert stored[0].type == "started"
    assert stored[-1].type == "end"
    assert "".join(fields(e)["text"] for e in stored if e.type == "delta") == message["content"]
    assert fields(stored[-1])["usage"]["output_tokens"] == 5
    assert await bench.live_log(process, job_id) == stored
    assert str(report).startswith(f"{job_id} · succeeded · {model} · 2+5 tokens")


async def test_a_heartbeat_that_misses_a_job_just_finished_does_not_silence_its_end(
    bench: Bench, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = bus.Stream.end

    def end(stream: bus.Stream, closed: list[events.Event]) -> None:
        ended(stream, closed)
        for running in process.runs.values():
            running.stop("lost")

    monkeypatch.setattr(bus.Stream, "end", end)
    job_id = bench.accept("openai:ok-t5")
    await finished(bench, process, job_id)
    assert await bench.live_log(process, job_id) == bench.log(job_id)


async def test_a_second_doorbell_for_the_same_job_does_nothing(
    bench: Bench, process: Process, ledger: Path
) -> None:
    job_id = bench.accept("openai:slow")
    first = bench.start(process, job_id)
    await until(lambda: bench.job(job_id).state == "running")
    assert await finished(bench, process, job_id) is None
    await asyncio.wrap_future(first)
    assert await finished(bench, process, job_id) is None
    assert await finished(bench, process, "job_unknown") is None
    assert calls(ledger) == 1


async def test_reasoning_and_tool_calls_are_kept_apart_from_the_text(
    bench: Bench, process: Process
) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    job_id = bench.accept("openai:tools", parameters={"tools": tools})
    await finished(bench, process, job_id)
    assert bench.job(job_id).finish_reason == "tool_calls"
    (row,) = bench.rows("SELECT message FROM job_results WHERE job_id = ?", job_id)
    message = json.loads(row.message) if isinstance(row.message, str) else row.message
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "look"
    json.loads(call["function"]["arguments"])
    kinds = [event.type for event in bench.log(job_id)]
    assert kinds.count("tool_call") >= 2

    job_id = bench.accept("openai:reasoning")
    await finished(bench, process, job_id)
    assert "reasoning" in [event.type for event in bench.log(job_id)]


async def test_a_job_nobody_watches_has_lifecycle_events_only(
    bench: Bench, process: Process
) -> None:
    job_id = bench.accept("openai:ok-t50", stream=False)
    await finished(bench, process, job_id)
    assert [event.type for event in bench.log(job_id)] == ["started", "end"]
    assert bench.usage(job_id)[0].output_tokens == 50


@pytest.mark.parametrize("model", ["openai:cut-3", "anthropic:noend-3", "openai:inerr-3-529"])
async def test_a_broken_stream_goes_back_to_the_queue_and_never_succeeds(
    bench: Bench, process: Process, model: str
) -> None:
    job_id = bench.accept(model)
    report = await finished(bench, process, job_id)
    assert "retrying after" in str(report)
    job = bench.job(job_id)
    assert (job.state, job.attempt, job.owner) == ("queued", 1, None)
    (usage,) = bench.usage(job_id)
    assert not usage.billable
    assert usage.source in {"partial", "unknown"}
    assert (await bench.live_log(process, job_id))[-1].type == "retrying"


async def test_an_attempt_after_a_failed_one_resets_and_continues_the_numbers(
    bench: Bench, process: Process
) -> None:
    job_id = bench.accept("openai:flaky-1-500", prompt="only once")
    await driven(bench, process, job_id, "succeeded")
    log = bench.log(job_id)
    kinds = [event.type for event in log]
    assert kinds[:3] == ["started", "retrying", "reset"]
    assert kinds[-1] == "end"
    assert [event.seq for event in log] == list(range(len(log)))
    assert [row.billable for row in bench.usage(job_id)] == [0, 1]


async def test_readers_hear_of_a_retry_before_it_begins(
    bench: Bench, new_process: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "FLUSH_MS", 60_000)  # as on a loop that is late
    process = new_process()
    job_id = bench.accept("openai:flaky-1-500", prompt="at once")
    await driven(bench, process, job_id, "succeeded")
    kinds = [event.type for event in bench.log(job_id)]
    assert kinds == ["started", "retrying", "reset", "delta", "end"]


async def test_a_job_fails_when_its_retries_are_used_up(bench: Bench, process: Process) -> None:
    job_id = bench.accept("openai:status-500")
    await driven(bench, process, job_id, "failed")
    job = bench.job(job_id)
    assert (job.error_code, job.attempt, job.retries) == ("server_error", 3, 2)
    assert "500" in job.error_message


@pytest.mark.parametrize(
    ("model", "code"),
    [
        ("openai:auth", "auth"),
        ("anthropic:context", "context_length"),
        ("openai:billing", "billing"),
        ("openai:status-404", "invalid_request"),
    ],
)
async def test_what_cannot_be_mended_by_trying_again_fails_at_once(
    bench: Bench, process: Process, model: str, code: str
) -> None:
    job_id = bench.accept(model)
    await finished(bench, process, job_id)
    job = bench.job(job_id)
    assert (job.state, job.error_code, job.attempt) == ("failed", code, 1)
    assert fields(bench.log(job_id)[-1])["error"]["code"] == code


async def test_keep_alives_without_content_are_a_stall(bench: Bench, process: Process) -> None:
    job_id = bench.accept("openai:stall-3")
    report = await finished(bench, process, job_id)
    assert "retrying after stalled" in str(report)


async def test_a_provider_or_key_that_vanished_after_accept_fails_with_its_name(
    bench: Bench, process: Process, environment: pytest.MonkeyPatch
) -> None:
    for model, code in (("gone:x", "provider_not_found"), ("groq:x", "provider_key_missing")):
        job_id = bench.accept(model)
        await finished(bench, process, job_id)
        assert (bench.job(job_id).state, bench.job(job_id).error_code) == ("failed", code)


async def test_a_cancel_stops_a_running_call_and_books_it(bench: Bench, process: Process) -> None:
    job_id = bench.accept("openai:ok-t1000-d20")
    running = bench.start(process, job_id)
    await until(lambda: process.runs and next(iter(process.runs.values())).answer.begun)
    bench.database.write_now(lambda c: cancelling.request_cancel(c, job_id, "local"))
    await asyncio.wait_for(asyncio.wrap_future(running), WAIT_S)
    assert bench.job(job_id).state == "cancelled"
    (usage,) = bench.usage(job_id)
    assert usage.billable
    assert usage.source == "unknown"
    assert fields(bench.log(job_id)[-1])["state"] == "cancelled"


async def test_a_job_past_its_deadline_stops_and_expires(bench: Bench, process: Process) -> None:
    job_id = bench.accept("openai:ok-t1000-d20", deadline_s=1.0)
    await finished(bench, process, job_id)
    assert bench.job(job_id).state == "expired"


async def test_a_zombie_writes_nothing(bench: Bench, process: Process) -> None:
    makers.webhook(bench.database, caller="local")
    job_id = bench.accept("openai:ok-t60-d20")
    running = bench.start(process, job_id)
    await until(lambda: process.runs and next(iter(process.runs.values())).answer.begun)
    # another worker took the job meanwhile: the reaper's and the claim's statements, at once
    bench.database.write_now(
        lambda c: c.exec_driver_sql("UPDATE jobs SET attempt = 2, owner = 'another'")
    )
    assert await asyncio.wait_for(asyncio.wrap_future(running), WAIT_S) is None
    job = bench.job(job_id)
    assert (job.state, job.attempt, job.owner) == ("running", 2, "another")
    assert bench.usage(job_id) == []
    assert bench.rows("SELECT * FROM deliveries") == []
    assert bench.rows("SELECT * FROM job_results") == []
    assert "end" not in [event.type for event in await bench.live_log(process, job_id)]


async def test_a_draining_process_hands_its_jobs_back_ahead_of_the_line(
    bench: Bench, process: Process
) -> None:
    job_id = bench.accept("openai:ok-t1000-d20")
    running = bench.start(process, job_id)
    await until(lambda: process.runs and next(iter(process.runs.values())).answer.begun)
    process.drain()
    process.hand_back_all()
    report = await asyncio.wait_for(asyncio.wrap_future(running), WAIT_S)
    assert "handed back" in str(report)
    job = bench.job(job_id)
    assert (job.state, job.rank, job.crashes, job.retries) == ("queued", 0, 0, 0)
    assert await finished(bench, process, job_id) is None


async def test_counts_no_provider_can_mean_are_unknown_not_a_reason_to_run_again(
    bench: Bench, process: Process, ledger: Path
) -> None:
    job_id = bench.accept("openai:ok-t5-c99999999999999999999")
    await finished(bench, process, job_id)
    assert bench.job(job_id).state == "succeeded"
    (usage,) = bench.usage(job_id)
    assert (usage.source, usage.input_tokens) == ("unknown", None)
    assert calls(ledger) == 1


async def test_a_finish_the_database_refuses_ends_the_job(
    bench: Bench, process: Process, ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def refuse_answers(connection: Any, claim: Claim, outcome: Any) -> Any:
        if outcome.message is not None:
            refused.append(outcome)
            raise DataError("INSERT", {}, ValueError("a value this database does not take"))
        return finish(connection, claim, outcome)

    finish = lifecycle.finish
    monkeypatch.setattr("workers.engine.lifecycle.finish", refuse_answers)
    job_id = bench.accept("openai:ok-t5")
    await finished(bench, process, job_id)
    assert refused
    job = bench.job(job_id)
    assert (job.state, job.error_code, job.attempt) == ("failed", "internal_error", 1)
    assert [usage.source for usage in bench.usage(job_id)] == ["unknown"]
    assert fields(bench.log(job_id)[-1])["state"] == "failed"
    assert calls(ledger) == 1


async def test_a_long_answer_nobody_watches_is_no_stall(bench: Bench, process: Process) -> None:
    job_id = bench.accept("openai:ok-t30-d100", stream=False)  # 3 s; first content within 2, idle 1
    await finished(bench, process, job_id)
    assert bench.job(job_id).state == "succeeded"


async def test_jobs_on_their_last_chance_run_one_at_a_time(bench: Bench, process: Process) -> None:
    jobs = [bench.accept("openai:ok-t5-d20") for _ in range(MAX_HOPING + 2)]
    bench.database.write_now(lambda c: c.exec_driver_sql("UPDATE jobs SET crashes = 2"))
    running = [bench.start(process, job_id) for job_id in jobs]
    await asyncio.gather(*[asyncio.wrap_future(each) for each in running])
    states = [bench.job(job_id).state for job_id in jobs]
    # one follows the other at once; whom there was no room for is rung for again
    assert states.count("succeeded") == MAX_HOPING
    assert states.count("queued") == 2
    times = sorted(bench.rows("SELECT started_ms, finished_ms FROM attempts"))
    assert all(later[0] >= earlier[1] for earlier, later in pairwise(times)), times


async def test_a_session_s_answer_becomes_its_turn_and_the_next_question_knows_it(
    bench: Bench, process: Process
) -> None:
    bench.database.write_now(
        lambda c: c.exec_driver_sql(
            "INSERT INTO sessions (id, caller, provider, model, model_version, last_seq, meta, "
            "created_ms, updated_ms) VALUES ('s', 'local', 'openai', 'ok-t2', 1, 0, '{}', 0, 0)"
        )
    )
    first = bench.accept("openai:ok-t2", prompt="one", session_id="s")
    second = bench.accept("openai:echo", prompt="two", session_id="s")
    assert await finished(bench, process, second) is None, "not before its turn"
    await finished(bench, process, first)
    await driven(bench, process, second, "succeeded")
    (row,) = bench.rows("SELECT message FROM job_results WHERE job_id = ?", second)
    message = json.loads(row.message) if isinstance(row.message, str) else row.message
    asked = json.loads(message["content"])["body"]["messages"]
    assert [turn["content"] for turn in asked] == ["one", "w0 w1 ", "two"]
    turns = bench.rows("SELECT seq, model FROM turns ORDER BY seq")
    assert [(turn.seq, turn.model) for turn in turns] == [
        (1, None), (2, "ok-t2"), (3, None), (4, "echo"),
    ]  # fmt: skip


@pytest.mark.parametrize("code", sorted(PROVIDER_ERRORS))
def test_the_wait_before_a_retry(code: str) -> None:
    settings = Settings(backoff_max_s=60, max_retries=5)
    claim = Claim(
        job_id="j", attempt=4, owner="o", caller="c", lane="batch", provider="p", model="m",
        session_id=None, session_seq=None, stream=True, retries=5, age_ms=0, left_ms=100_000,
        messages=[], parameters={},
    )  # fmt: skip
    policy = PROVIDER_ERRORS[code]
    delay = retry_delay_s(ProviderError("x", code=code, retry_after_s=7.0), claim, settings, 100.0)
    if not policy.retryable or policy.burns_attempt:
        assert delay is None, "five retries are used up"
    else:
        assert delay is not None
        assert 7.0 <= delay <= 60.0, "never under the provider's Retry-After"
    late = ProviderError("x", code=code, retry_after_s=101.0)
    kept = 101.0 if code == "circuit_open" else None
    assert retry_delay_s(late, claim, settings, 100.0) == kept, "past the deadline only uncalled"
