"""What the caretaker mends: dead workers' jobs, poison, cancels and deadlines, lost doorbells."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from backchannel import cancelling, lifecycle
from backchannel.errors import Unavailable
from backchannel.lifecycle import Claim
from backchannel.queue import queue_length
from backchannel.settings import Settings, get_settings
from backchannel.tables import BATCH, INTERACTIVE
from tests.workers.conftest import Bench
from workers import caretaker, heart
from workers.process import Process


def claimed(bench: Bench, job_id: str, owner: str = "dead") -> Claim:
    claim = bench.database.write_now(lambda c: lifecycle.claim(c, job_id, owner, 20))
    assert claim is not None
    return claim


def lapse(bench: Bench, lease_ms: int = 1) -> None:
    bench.database.write_now(lambda c: c.exec_driver_sql(f"UPDATE jobs SET lease_ms = {lease_ms}"))


async def test_a_dead_worker_s_job_goes_back_with_its_call_on_the_books(
    bench: Bench, process: Process
) -> None:
    job_id = bench.accept()
    claim = claimed(bench, job_id)
    bench.database.write_now(lambda c: lifecycle.mark_call(c, claim))
    lapse(bench)
    process.submit(caretaker.reap(process)).result(timeout=10)
    job = bench.job(job_id)
    assert (job.state, job.crashes, job.rank) == ("queued", 1, 0)
    (usage,) = bench.usage(job_id)
    assert (usage.source, usage.billable, usage.output_tokens) == ("unknown", 0, None)


async def test_a_job_that_kills_workers_fails_as_poison_and_its_stream_ends(
    bench: Bench, process: Process
) -> None:
    job_id = bench.accept()
    for _ in range(3):
        bench.database.write_now(lambda c: c.exec_driver_sql("UPDATE jobs SET run_ms = 1"))
        claim = claimed(bench, job_id)
        bench.database.write_now(lambda c, claim=claim: lifecycle.mark_call(c, claim))
        lapse(bench)
        process.submit(caretaker.reap(process)).result(timeout=10)
    job = bench.job(job_id)
    assert (job.state, job.error_code, job.crashes) == ("failed", "poison", 3)
    end = json.loads(bench.log(job_id)[-1].data)
    assert (end["state"], end["error"]["code"]) == ("failed", "poison")


async def test_a_suspect_waits_until_the_deaths_of_the_last_lease_are_known(
    bench: Bench, process: Process
) -> None:
    job_id = bench.accept()
    claim = claimed(bench, job_id)
    bench.database.write_now(lambda c: lifecycle.mark_call(c, claim))
    bench.database.write_now(lambda c: c.exec_driver_sql("UPDATE jobs SET crashes = 2"))
    now_ms = int(time.time() * 1000)
    lapse(bench, now_ms - 1000)  # a moment ago
    process.submit(caretaker.reap(process)).result(timeout=10)
    assert bench.job(job_id).state == "running"
    # meanwhile it is known of others that they died at the same time, without this job
    for number in range(7):
        bench.database.write_now(
            lambda c, number=number: lifecycle.sign_on(c, f"dead-{number}", "host", 1, 1)
        )
    for sql in (
        f"UPDATE jobs SET started_ms = {now_ms - 60_000}",
        f"UPDATE workers SET seen_ms = {now_ms - 40_000} WHERE host = 'host'",
    ):
        bench.database.write_now(lambda c, sql=sql: c.exec_driver_sql(sql))
    process.submit(caretaker.reap(process)).result(timeout=10)
    assert (bench.job(job_id).state, bench.job(job_id).crashes) == ("queued", 3)


async def test_cancelled_and_overdue_jobs_end_without_an_attempt(
    bench: Bench, process: Process
) -> None:
    cancelled, late = bench.accept(), bench.accept(deadline_s=0.0)
    bench.database.write_now(lambda c: cancelling.request_cancel(c, cancelled, "local"))
    process.submit(caretaker.close_overdue(process)).result(timeout=10)
    assert bench.job(cancelled).state == "cancelled"
    assert (bench.job(late).state, bench.job(late).error_code) == ("expired", "expired")
    for job_id in (cancelled, late):
        assert [event.seq for event in bench.log(job_id)] == [0]
        assert bench.usage(job_id) == []


async def test_the_dispatcher_rings_what_was_never_rung_and_not_more_than_its_window(
    bench: Bench, process: Process
) -> None:
    for _ in range(60):
        bench.accept(lane=BATCH)
    bench.accept(lane=INTERACTIVE)
    rung = process.submit(caretaker.ring_due(process, BATCH)).result(timeout=10)
    prefix = process.settings.redis_prefix
    waiting = process.submit(queue_length(process.redis, prefix, BATCH)).result(timeout=10)
    assert rung <= waiting <= caretaker.WINDOW_PER_SLOT * process.slots == 40


async def test_a_heartbeat_keeps_leases_and_finds_what_was_lost(
    bench: Bench, new_process: Callable[[], Process]
) -> None:
    process = new_process()
    job_id = bench.accept("openai:ok-t1000-d20")
    running = bench.start(process, job_id)
    while not bench.job(job_id).lease_ms:
        time.sleep(0.01)
    before = bench.job(job_id).lease_ms
    time.sleep(0.01)
    process.submit(heart.beat(process)).result(timeout=10)
    assert bench.job(job_id).lease_ms > before
    bench.database.write_now(
        lambda c: c.exec_driver_sql("UPDATE jobs SET owner = 'another', attempt = 2")
    )
    process.submit(heart.beat(process)).result(timeout=10)
    assert running.result(timeout=10) is None
    assert bench.job(job_id).owner == "another"


async def test_a_heartbeat_hands_back_what_is_ours_on_the_books_only(
    bench: Bench, process: Process
) -> None:
    stray, on_its_way, other = bench.accept(), bench.accept(), bench.accept()
    for job_id, owner in ((stray, process.owner), (on_its_way, process.owner), (other, "other")):
        claimed(bench, job_id, owner)
    bench.database.write_now(
        lambda c: c.exec_driver_sql(f"UPDATE jobs SET lease_ms = 1 WHERE id <> '{on_its_way}'")
    )
    process.submit(heart.beat(process)).result(timeout=10)
    job = bench.job(stray)
    assert (job.state, job.crashes, job.owner) == ("queued", 0, None)
    assert bench.job(on_its_way).owner == process.owner
    assert bench.job(other).owner == "other"


def test_after_an_outage_nobody_is_judged_for_one_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=100.0)
    monkeypatch.setattr(heart, "time", clock)
    pulse = heart.Pulse(Settings(lease_s=20, fence_s=15))
    verdicts = {}
    for clock.now in (100, 105, 110):
        pulse.felt()
    for clock.now in (115, 124, 126):
        verdicts[clock.now] = pulse.may_judge()
    clock.now = 140
    pulse.felt()
    for clock.now in (140, 145, 150, 155, 160):
        pulse.felt()
        verdicts[clock.now] = pulse.may_judge()
    assert verdicts == {
        115: True, 124: True, 126: False, 140: False, 145: False, 150: False, 155: False, 160: True,
    }  # fmt: skip


async def test_a_heartbeat_that_was_not_written_is_tried_again_soon(
    bench: Bench, environment: pytest.MonkeyPatch, new_process: Callable[[], Process]
) -> None:
    environment.setenv("BACKCHANNEL_HEARTBEAT_S", "2")
    environment.setattr(heart, "RETRY_S", 0.05)
    get_settings.cache_clear()
    beats: list[float] = []

    async def unavailable(_: Process) -> None:
        beats.append(time.monotonic())
        raise Unavailable("The database does not answer.")

    environment.setattr(heart, "beat", unavailable)
    new_process()
    await asyncio.sleep(3.5)
    assert len(beats) > 5
