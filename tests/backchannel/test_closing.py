"""Jobs that wait too long: they expire, and nothing else ends them."""

from __future__ import annotations

import pytest

from backchannel import closing
from backchannel.db import Database
from backchannel.tables import CANCELLED, EXPIRED
from tests.makers import ago, assert_writes_nothing, change, claimed, outcome, queued, row


def test_a_job_past_its_deadline_expires(database: Database) -> None:
    job_id = queued(database)
    assert database.read_now(closing.overdue) == []
    change(database, job_id, deadline_ms=ago(database, 1))
    (due,) = database.read_now(closing.overdue)
    assert due[:3] == (job_id, 0, EXPIRED)
    assert database.write_now(lambda c: closing.close_queued(c, job_id, 0, outcome(EXPIRED)))
    assert row(database, job_id).state == EXPIRED


@pytest.mark.parametrize("state", [CANCELLED, EXPIRED])
@pytest.mark.parametrize("why", ["no reason", "another attempt", "running"])
def test_a_job_is_not_closed_when_there_is(why: str, state: str, database: Database) -> None:
    job_id = queued(database)
    if why == "running":
        claimed(database, job_id)
    if why != "no reason":
        reason = {CANCELLED: {"cancel_ms": 1}, EXPIRED: {"deadline_ms": 1}}
        change(database, job_id, **reason[state])
    attempt = row(database, job_id).attempt + (why == "another attempt")
    assert_writes_nothing(
        database, lambda c: closing.close_queued(c, job_id, attempt, outcome(state))
    )
