"""The transitions of jobs whose worker has died: back to the head of the line, or failed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

from sqlalchemy import Connection, Update, bindparam, case, exists, func, select

from backchannel.books import Outcome, close_attempt, write_finish
from backchannel.db import NOW
from backchannel.lifecycle import PATIENCE
from backchannel.tables import FAILED, QUEUED, RUNNING, attempts, jobs, state_is, workers
from backchannel.transitions import ending, ending_values, going_back, move


class Lapsed(NamedTuple):
    """A running job whose lease is over."""

    job_id: str
    attempt: int
    crashes: int  # with this one, if it counts
    age_ms: int
    silent_ms: int  # since its lease was over
    deaths: int  # of workers, since it first ran; those of the last lease are not known yet

    def is_suspect(self, max_crashes: int) -> bool:
        """Whether it seems to be the job that kills workers.

        Each worker that died meanwhile without it asks for two more crashes: something else kills
        workers then, and of thousands of innocent jobs some are there three times. A worker is
        known to be dead a lease after its death, so the verdict waits for one more lease: or of
        many deaths those that clear the job would be missing.
        """
        without = max(self.deaths - self.crashes, 0)
        return self.crashes >= min(max_crashes + 2 * without, PATIENCE * max_crashes)


# Who died before its provider call was on record was hardly killed by the job: a worker that has
# just started takes many and imports the SDK first. That this goes on for ever it does count.
MOST_UNCALLED = 10
_counts = case(
    (
        exists().where(
            attempts.c.job_id == jobs.c.id,
            attempts.c.attempt == jobs.c.attempt,
            attempts.c.provider_call_ms.is_not(None),
        ),
        1,
    ),
    (jobs.c.attempt >= MOST_UNCALLED, 1),
    else_=0,
)
_deaths = (
    select(func.count())
    .select_from(workers)
    .where(
        workers.c.seen_ms >= jobs.c.started_ms - bindparam("lease_in_ms"),
        workers.c.seen_ms < NOW - bindparam("lease_in_ms"),
    )
    .scalar_subquery()
)
_LAPSED = (
    select(
        jobs.c.id,
        jobs.c.attempt,
        jobs.c.crashes + _counts,
        NOW - jobs.c.created_ms,
        NOW - jobs.c.lease_ms,
        _deaths,
    )
    .where(state_is(RUNNING), jobs.c.lease_ms < NOW)
    .limit(1000)
)


def lapsed(connection: Connection, lease_s: float = 20.0) -> list[Lapsed]:
    """The running jobs whose worker has gone silent.

    Args:
        lease_s: A worker not heard of for this long is dead.
    """
    rows = connection.execute(_LAPSED, {"lease_in_ms": int(lease_s * 1000)})
    return [Lapsed(*row) for row in rows]


def _reaped(statement: Update) -> Update:
    return statement.where(jobs.c.attempt == bindparam("by_attempt"), jobs.c.lease_ms < NOW).values(
        crashes=jobs.c.crashes + _counts
    )


_LOCK_CALL = (
    select(attempts.c.provider_call_ms)
    .where(attempts.c.job_id == bindparam("job"), attempts.c.attempt == bindparam("by_attempt"))
    .with_for_update()
)


def _with_call(connection: Connection, row: Any) -> Any:
    """The row of a reaped job, with its call as it is on record by now.

    A worker that is not dead may have marked it while we took the job; from here on it cannot.
    """
    its = {"job": row.id, "by_attempt": row.attempt}
    called = connection.execute(_LOCK_CALL, its).scalar()
    return SimpleNamespace(**{**row._mapping, "provider_call_ms": called})


_REAP = going_back(_reaped(move(RUNNING, QUEUED))).values(run_ms=NOW, rank=0)
_REAP_POISON = ending(_reaped(move(RUNNING, FAILED)))


def reap(connection: Connection, job_id: str, attempt: int) -> bool:
    """Put a job whose worker died back at the head of the line."""
    row = connection.execute(_REAP, {"job": job_id, "by_attempt": attempt}).first()
    if row is None:
        return False
    row = _with_call(connection, row)
    close_attempt(connection, row, "reaped", None, None, None, billable=False)
    return True


def reap_poison(connection: Connection, job_id: str, attempt: int, outcome: Outcome) -> bool:
    """Fail a job that took too many workers with it."""
    row = connection.execute(
        _REAP_POISON, {"job": job_id, "by_attempt": attempt, **ending_values(outcome)}
    ).first()
    if row is not None:
        write_finish(connection, _with_call(connection, row), outcome)
    return row is not None
