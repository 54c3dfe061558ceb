"""All transitions in any order, and at once: the books stay true."""

from __future__ import annotations

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, select, text

from backchannel import cancelling, closing, lifecycle, reaping
from backchannel.accept import accept
from backchannel.db import Database
from backchannel.lifecycle import Claim
from backchannel.tables import (
    CANCELLED,
    EXPIRED,
    FAILED,
    FOLLOWS,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    TERMINAL,
    jobs,
)
from tests.makers import (
    Step,
    claim_of,
    new_job,
    outcome,
    queued,
    row,
    rows,
    session,
    webhook,
    writes_of,
)


class Chaos:
    """Workers, a reaper, a canceller and the clock, who act on one job in any order.

    Workers keep every claim they ever got, and go on to write for it: most of them are zombies.
    """

    def __init__(self, database: Database, seed: int) -> None:
        self.database = database
        self.dice = random.Random(seed)
        session(database, f"sess_{seed}")
        self.job_id = queued(database, session_id=f"sess_{seed}")
        self.claims: list[Claim] = []
        self.seen: list[Any] = [row(database, self.job_id)]

    def step(self) -> Any:
        job = self.seen[-1]
        guess = max(job.attempt - self.dice.choice([0, 0, 0, 1]), 0)
        steps: list[Step] = [claim_of(self.job_id, self.dice.choice(["worker-1", "worker-2"]))] * 3
        for claim in self.dice.sample(self.claims, min(2, len(self.claims))):
            steps += writes_of(claim).values()
        if job.state == RUNNING and job.owner and self.dice.random() < 0.5:
            steps.append(lambda c: c.execute(_job(self.job_id).values(lease_ms=1)))
        steps.append(lambda c: c.execute(_job(self.job_id).values(run_ms=1)))
        steps += [lambda c: reaping.reap(c, self.job_id, guess)] * 3
        steps.append(lambda c: reaping.reap_poison(c, self.job_id, guess, outcome(FAILED)))
        steps.append(lambda c: closing.close_queued(c, self.job_id, guess, outcome(EXPIRED)))
        steps.append(lambda c: closing.close_queued(c, self.job_id, guess, outcome(CANCELLED)))
        if self.dice.random() < 0.1:
            steps.append(lambda c: cancelling.request_cancel(c, self.job_id, "alice"))
        if self.dice.random() < 0.05:
            steps.append(lambda c: c.execute(_job(self.job_id).values(deadline_ms=1)))
        result = self.database.write_now(self.dice.choice(steps))
        if isinstance(result, Claim):
            self.claims.append(result)
        self.seen.append(row(self.database, self.job_id))
        return self.seen[-1]

    def check(self) -> None:
        before, after = self.seen[-2:]
        assert after.attempt in {before.attempt, before.attempt + 1}
        assert after.crashes >= before.crashes
        assert after.retries >= before.retries
        assert after.state == before.state or after.state in FOLLOWS[before.state]
        if before.state in TERMINAL:
            # the clock above pretends; everything else stands
            assert _but_for_the_clock(after) == _but_for_the_clock(before)
        mine = self.database.read_now(self._mine)
        ended = after.state in TERMINAL
        assert len(mine["deliveries"]) == len(mine["job_results"]) == int(ended)
        billed = [each for each in mine["usage"] if each["billable"]]
        assert len(billed) <= int(ended)
        assert [each["attempt"] for each in billed] in ([], [after.attempt])
        assert len(mine["attempts"]) == after.attempt
        open_ = [each["attempt"] for each in mine["attempts"] if each["finished_ms"] is None]
        assert open_ == ([after.attempt] if after.state == RUNNING else [])
        called = {each["attempt"] for each in mine["attempts"] if each["provider_call_ms"]}
        assert {each["attempt"] for each in mine["usage"]} == called - set(open_)
        assert len(mine["turns"]) == (2 if after.state == SUCCEEDED else 1)

    def _mine(self, connection: Connection) -> dict[str, list[Any]]:
        tables = dict.fromkeys(("job_results", "usage", "attempts", "turns"), "job_id")
        return {
            table: list(
                connection.execute(
                    text(f'SELECT * FROM "{table}" WHERE {its} = :job'), {"job": self.job_id}
                ).mappings()
            )
            for table, its in {**tables, "deliveries": "subject"}.items()
        }


def _job(job_id: str) -> Any:
    return jobs.update().where(jobs.c.id == job_id)


def _but_for_the_clock(job: Any) -> dict[str, Any]:
    return dict(job._mapping) | {"run_ms": 0, "deadline_ms": 0}


def test_whatever_happens_in_any_order_the_books_stay_true(database: Database) -> None:
    webhook(database)
    ended: Counter[str] = Counter()
    attempts: Counter[int] = Counter()
    for seed in range(30):
        chaos = Chaos(database, seed)
        for _ in range(25):
            chaos.step()
            chaos.check()
        ended[chaos.seen[-1].state] += 1
        attempts[chaos.seen[-1].attempt] += 1
    # the dice did roll: every end was reached, and jobs had several lives
    assert set(ended) >= TERMINAL, ended
    assert max(attempts) >= 3, attempts


RACES = 1_000


def race(
    one: tuple[Database, list[Step]], other: tuple[Database, list[Step]]
) -> list[tuple[bool, bool]]:
    """Two processes' writers act on the same jobs at the same moments; who did anything?"""
    together = threading.Barrier(2)

    def run(database: Database, steps: list[Step]) -> list[bool]:
        results = []
        for step in steps:
            together.wait(30)
            results.append(bool(database.write_now(step)))
        return results

    with ThreadPoolExecutor(2, thread_name_prefix="racer") as threads:
        sides = [threads.submit(run, *side) for side in (one, other)]
        return list(zip(*(side.result(100) for side in sides), strict=True))


def against(claim: Claim) -> Step:
    """What a caretaker does about a silent worker: in turns, hope and no more hope."""
    if claim.retries % 2:
        return lambda c: reaping.reap(c, claim.job_id, 1)
    return lambda c: reaping.reap_poison(c, claim.job_id, 1, outcome(FAILED))


def test_of_a_finish_and_a_reaper_exactly_one_wins(database_url: str) -> None:
    worker, caretaker = (Database(database_url, name=name) for name in ("worker", "caretaker"))
    webhook(worker)
    ids = [each.result(60) for each in [worker.submit(_accept) for _ in range(RACES)]]
    claimed = [each.result(60) for each in [worker.submit(claim_of(job_id)) for job_id in ids]]
    claims = [replace(claim, retries=number) for number, claim in enumerate(claimed) if claim]
    marks = [worker.submit(lambda c, x=claim: lifecycle.mark_call(c, x)) for claim in claims]
    assert all(mark.result(60) for mark in marks)
    worker.write_now(lambda c: c.execute(jobs.update().values(lease_ms=1)))

    results = race(
        (worker, [lambda c, x=claim: lifecycle.finish(c, x, outcome()) for claim in claims]),
        (caretaker, [against(claim) for claim in claims]),
    )

    won = Counter(results)
    assert set(won) == {(True, False), (False, True)}, won
    ends = Counter(worker.read_now(lambda c: c.execute(select(jobs.c.state)).scalars().all()))
    assert ends[SUCCEEDED] == won[True, False]
    assert ends[QUEUED] + ends[FAILED] == won[False, True]
    assert len(rows(worker, "deliveries")) == ends[SUCCEEDED] + ends[FAILED]
    billed = [bool(each["billable"]) for each in rows(worker, "usage")]
    assert len(billed) == RACES
    assert sum(billed) == ends[SUCCEEDED] + ends[FAILED]
    worker.close()
    caretaker.close()


def test_of_a_claim_and_a_cancel_exactly_one_wins(database_url: str) -> None:
    worker, api = (Database(database_url, name=name) for name in ("worker", "api"))
    ids = [each.result(60) for each in [worker.submit(_accept) for _ in range(100)]]

    def cancel_of(job_id: str) -> Step:
        def cancel(connection: Connection) -> Any:
            assert cancelling.request_cancel(connection, job_id, "alice")
            return closing.close_queued(connection, job_id, 0, outcome(CANCELLED))

        return cancel

    results = race((worker, [claim_of(each) for each in ids]), (api, [cancel_of(x) for x in ids]))
    assert set(results) == {(True, False), (False, True)}
    ends = Counter(worker.read_now(lambda c: c.execute(select(jobs.c.state)).scalars().all()))
    assert ends == {RUNNING: results.count((True, False)), CANCELLED: results.count((False, True))}
    worker.close()
    api.close()


def _accept(connection: Connection) -> str:
    return accept(connection, new_job()).job_id
