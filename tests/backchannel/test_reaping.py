"""Jobs whose worker has died: who is taken back, whose death counts, and who is failed."""

from __future__ import annotations

import pytest

from backchannel import lifecycle, reaping
from backchannel.db import Database
from backchannel.tables import FAILED, QUEUED, workers
from tests.makers import (
    LEASE_S,
    ago,
    assert_writes_nothing,
    calling,
    change,
    claimed,
    lapse,
    outcome,
    queued,
    row,
    rows,
    webhook,
)


@pytest.mark.parametrize("called", [True, False])
def test_a_reaped_job_goes_to_the_head_of_the_line(called: bool, database: Database) -> None:
    job_id = queued(database)
    (calling if called else claimed)(database, job_id)
    change(database, job_id, run_ms=ago(database, 100))
    lapse(database, job_id)
    # who had not called yet can hardly have been killed by the job
    assert [each[:3] for each in database.read_now(reaping.lapsed)] == [(job_id, 1, int(called))]
    assert database.write_now(lambda c: reaping.reap(c, job_id, 1))
    job = row(database, job_id)
    assert (job.state, job.attempt, job.crashes) == (QUEUED, 1, int(called))
    assert (job.retries, job.rank) == (0, 0)
    assert (job.owner, job.lease_ms, job.rung_ms) == (None, None, None)
    assert rows(database, "attempts")[0]["outcome"] == "reaped"
    usage = [(bool(each["billable"]), each["source"]) for each in rows(database, "usage")]
    assert usage == ([(False, "unknown")] if called else [])


@pytest.mark.parametrize("why", ["renewed", "another attempt", "queued", "finished"])
def test_a_job_is_not_reaped_when_it_is(why: str, database: Database) -> None:
    job_id = queued(database)
    attempt = 1
    if why == "queued":
        attempt = 0
    else:
        claim = calling(database, job_id)
        lapse(database, job_id)
        if why == "renewed":
            database.write_now(lambda c: lifecycle.heartbeat(c, "worker-1", [job_id], LEASE_S))
        elif why == "finished":
            database.write_now(lambda c: lifecycle.finish(c, claim, outcome()))
        else:
            attempt = 2
    if why != "another attempt":
        assert database.read_now(reaping.lapsed) == []
    assert_writes_nothing(database, lambda c: reaping.reap(c, job_id, attempt))
    assert_writes_nothing(
        database, lambda c: reaping.reap_poison(c, job_id, attempt, outcome(FAILED))
    )


def test_crashes_before_the_call_count_once_there_are_too_many(database: Database) -> None:
    job_id = queued(database)
    found = []
    for attempt in range(1, reaping.MOST_UNCALLED + 3):
        claimed(database, job_id)
        lapse(database, job_id)
        found += [each.crashes for each in database.read_now(reaping.lapsed)]
        assert database.write_now(lambda c, attempt=attempt: reaping.reap(c, job_id, attempt))
    assert found == [0] * (reaping.MOST_UNCALLED - 1) + [1, 2, 3]


def test_a_job_needs_two_more_crashes_for_each_worker_that_died_without_it(
    database: Database,
) -> None:
    job_id = queued(database)
    calling(database, job_id, "worker-0")
    lapse(database, job_id)
    change(database, job_id, crashes=2)

    def found(first: int, last: int) -> reaping.Lapsed:
        for number in range(first, last):
            database.write_now(
                lambda c, number=number: lifecycle.sign_on(c, f"dead-{number}", "host", 1, 1)
            )
        # heard of since the job began, and not lately
        seen = row(database, job_id).started_ms
        database.write_now(lambda c: c.execute(workers.update().values(seen_ms=seen)))
        return database.read_now(lambda c: reaping.lapsed(c, lease_s=0))[0]

    all_with, one_without = found(0, 3), found(3, 4)
    assert (all_with.crashes, all_with.deaths, all_with.is_suspect(3)) == (3, 3, True)
    assert (one_without.crashes, one_without.deaths, one_without.is_suspect(3)) == (3, 4, False)
    assert not one_without._replace(crashes=4, deaths=5).is_suspect(3)
    assert one_without._replace(crashes=5, deaths=6).is_suspect(3)
    # but it cannot loop
    assert one_without._replace(crashes=9, deaths=90).is_suspect(3)


def test_a_job_that_takes_its_workers_with_it_fails_as_poison(database: Database) -> None:
    webhook(database)
    job_id = queued(database)
    for crash in (1, 2):
        calling(database, job_id)
        lapse(database, job_id)
        assert database.write_now(lambda c, crash=crash: reaping.reap(c, job_id, crash))
    calling(database, job_id)
    lapse(database, job_id)
    assert [each[:3] for each in database.read_now(reaping.lapsed)] == [(job_id, 3, 3)]
    poison = outcome(FAILED, error_code="poison", spent=None)
    assert database.write_now(lambda c: reaping.reap_poison(c, job_id, 3, poison))
    job = row(database, job_id)
    assert (job.state, job.crashes, job.error_code, job.lease_ms) == (FAILED, 3, "poison", None)
    usage = [(each["attempt"], bool(each["billable"])) for each in rows(database, "usage")]
    assert usage == [(1, False), (2, False), (3, True)]
    assert {each["source"] for each in rows(database, "usage")} == {"unknown"}
    assert [told["type"] for told in rows(database, "deliveries")] == ["job.failed"]
