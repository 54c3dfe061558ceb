"""Jobs that wait for their provider: they have not begun, and are called back."""

from __future__ import annotations

import pytest

from backchannel import cancelling, waiting
from backchannel.db import Database
from backchannel.tables import QUEUED
from tests.makers import (
    ago,
    assert_writes_nothing,
    change,
    claim_of,
    claimed,
    queued,
    row,
    rows,
)


def test_a_job_that_waits_for_its_provider_has_not_begun(database: Database) -> None:
    job_id = queued(database, provider="groq")
    change(database, job_id, rung_ms=ago(database, 0))
    assert database.write_now(lambda c: waiting.defer(c, job_id, "groq", 30.0))
    job = row(database, job_id)
    assert (job.state, job.attempt, job.retries, job.rung_ms) == (QUEUED, 0, 0, None)
    assert job.run_ms == pytest.approx(ago(database, -30), abs=5_000)
    assert rows(database, "attempts") == []
    assert_writes_nothing(database, claim_of(job_id))
    database.write_now(lambda c: waiting.recall(c, "openai"))
    assert_writes_nothing(database, claim_of(job_id))
    database.write_now(lambda c: waiting.recall(c, "groq"))
    assert claimed(database, job_id).attempt == 1


@pytest.mark.parametrize(
    "why", ["not due", "past its deadline", "cancelled", "running", "of another", "unknown"]
)
def test_a_job_is_not_put_off_when_it_is(why: str, database: Database) -> None:
    job_id, provider = queued(database, provider="groq"), "groq"
    match why:
        case "not due":
            change(database, job_id, run_ms=ago(database, -60))
        case "past its deadline":
            change(database, job_id, deadline_ms=ago(database, 1))
        case "cancelled":
            database.write_now(lambda c: cancelling.request_cancel(c, job_id, "alice"))
        case "running":
            claimed(database, job_id)
        case "of another":
            provider = "openai"
        case _:
            job_id = "job_of_nobody"
    assert_writes_nothing(database, lambda c: waiting.defer(c, job_id, provider, 1.0) or None)


def test_who_has_fallbacks_need_not_wait_for_a_provider_that_asks_to_be_left_alone(
    database: Database,
) -> None:
    plain = queued(database, provider="groq")
    other = queued(database, provider="groq", fallbacks=["openai:x"], request_hash="other")
    put_off = [
        database.write_now(
            lambda c, j=job_id: waiting.defer(c, j, "groq", 9.0, unless_fallbacks=True)  # type: ignore[misc]
        )
        for job_id in (plain, other)
    ]
    assert put_off == [True, False]
    assert claimed(database, other)
