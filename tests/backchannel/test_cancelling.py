"""Cancels: on record at once, and never undone; what waits ends, what runs ends itself."""

from __future__ import annotations

import pytest

from backchannel import cancelling, closing, lifecycle, reaping
from backchannel.db import Database
from backchannel.tables import CANCELLED, QUEUED, RUNNING, TERMINAL
from tests.makers import (
    assert_writes_nothing,
    calling,
    change,
    claim_of,
    finished,
    lapse,
    outcome,
    queued,
    row,
    rows,
    webhook,
)


def test_a_queued_job_is_cancelled_without_an_attempt(database: Database) -> None:
    webhook(database)
    job_id = queued(database)
    asked = database.write_now(lambda c: cancelling.request_cancel(c, job_id, "alice"))
    assert asked is not None
    assert asked[:2] == (QUEUED, 0)
    (due,) = database.read_now(closing.overdue)
    assert due[:3] == (job_id, 0, CANCELLED)
    assert database.write_now(lambda c: closing.close_queued(c, job_id, 0, outcome(CANCELLED)))
    job = row(database, job_id)
    assert (job.state, job.attempt) == (CANCELLED, 0)
    assert job.finished_ms is not None
    assert rows(database, "attempts") == rows(database, "usage") == []
    assert [told["type"] for told in rows(database, "deliveries")] == ["job.cancelled"]
    assert database.read_now(closing.overdue) == []


def test_a_running_job_hears_of_its_cancel_and_ends_itself(database: Database) -> None:
    job_id = queued(database)
    claim = calling(database, job_id)
    asked = database.write_now(lambda c: cancelling.request_cancel(c, job_id, "alice"))
    assert asked is not None
    assert asked[:2] == (RUNNING, 1)
    assert row(database, job_id).state == RUNNING
    assert_writes_nothing(
        database, lambda c: closing.close_queued(c, job_id, 1, outcome(CANCELLED))
    )
    assert database.write_now(lambda c: lifecycle.finish(c, claim, outcome(CANCELLED)))
    assert row(database, job_id).state == CANCELLED


def test_a_cancelled_job_whose_worker_died_is_not_started_again(database: Database) -> None:
    job_id = queued(database)
    calling(database, job_id)
    database.write_now(lambda c: cancelling.request_cancel(c, job_id, "alice"))
    lapse(database, job_id)
    assert database.write_now(lambda c: reaping.reap(c, job_id, 1))
    assert_writes_nothing(database, claim_of(job_id))
    (due,) = database.read_now(closing.overdue)
    assert due[:3] == (job_id, 1, CANCELLED)
    assert database.write_now(lambda c: closing.close_queued(c, job_id, 1, outcome(CANCELLED)))
    assert [bool(each["billable"]) for each in rows(database, "usage")] == [False]
    assert [each["outcome"] for each in rows(database, "attempts")] == ["reaped"]


def test_the_first_cancel_is_the_one_on_record(database: Database) -> None:
    job_id = queued(database)
    database.write_now(lambda c: cancelling.request_cancel(c, job_id, "alice"))
    change(database, job_id, cancel_ms=12345)
    database.write_now(lambda c: cancelling.request_cancel(c, job_id, "alice"))
    assert row(database, job_id).cancel_ms == 12345


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_a_finished_job_cannot_be_cancelled(state: str, database: Database) -> None:
    job_id = finished(database, state)
    assert_writes_nothing(database, lambda c: cancelling.request_cancel(c, job_id, "alice"))


def test_nobody_cancels_anothers_job(database: Database) -> None:
    job_id = queued(database)
    assert_writes_nothing(database, lambda c: cancelling.request_cancel(c, job_id, "mallory"))
