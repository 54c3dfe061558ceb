"""Batches: every end counted once, whoever sees it; nothing paid for is lost."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import update

from backchannel import batch_lines, batches, cancelling, closing, files, lifecycle
from backchannel.db import Database, now_ms
from backchannel.errors import Conflict
from backchannel.tables import BATCH_FOLLOWS, BATCH_TERMINAL
from backchannel.tables import batches as table
from tests import makers
from tests.backchannel import batching
from tests.backchannel.batching import content, finish, jobs_of, line, lines_of, row


@pytest.fixture
def other(database: Database, database_url: str) -> Iterator[Database]:
    """Another process's way to the same database."""
    with contextlib.closing(Database(database_url, name="other")) as opened:
        yield opened


def late(database: Database, batch_id: str) -> None:
    """The completion window is over."""
    over = {"expires_ms": now_ms() - 1000}
    database.write_now(
        lambda c: c.execute(update(table).where(table.c.id == batch_id).values(over))
    )


# ---------------------------------------------------------------- the states


def test_only_what_follows_can_be_reached() -> None:
    for here, follows in BATCH_FOLLOWS.items():
        for there in BATCH_FOLLOWS.keys() - follows:
            with pytest.raises(AssertionError):
                batches.turn(here, there)
    assert {"completed", "failed", "expired", "cancelled"} == BATCH_TERMINAL


def test_a_batch_goes_from_its_file_to_its_end(database: Database) -> None:
    batch_id = batching.create(database, batching.upload(database, *map(line, "abc")))
    assert row(database, batch_id).status == "validating"
    assert batching.validate_once(database, row(database, batch_id))
    batch = row(database, batch_id)
    assert (batch.status, batch.total, batch.planned) == ("in_progress", 3, 0)
    assert batching.plan_once(database, batch)
    jobs = jobs_of(database, batch_id)
    assert [(job.line, job.lane, job.stream, job.state) for job in jobs] == [
        (number, "batch", False, "queued") for number in (1, 2, 3)
    ]
    assert not database.write_now(lambda c: batches.finalize(c, batch_id))
    for job, state in zip(jobs, ("succeeded", "failed", "succeeded"), strict=True):
        finish(database, job.id, state)
    assert database.write_now(lambda c: batches.finalize(c, batch_id))
    assert not database.read_now(lambda c: batches.has_expired(c, row(database, batch_id)))
    assert batching.end(database, batch_id)
    batch = row(database, batch_id)
    assert (batch.status, batch.completed, batch.failed) == ("completed", 2, 1)
    assert (batch.input_tokens, batch.output_tokens, batch.cost_nanousd) == (36, 9, 5_100)
    assert batch.ended_ms == batch.completed_ms
    assert not batching.end(database, batch_id)


def test_a_key_makes_a_batch_once(database: Database) -> None:
    file_id = batching.upload(database, line("a"))
    first = batching.create(database, file_id, idempotency_key="k")
    assert batching.create(database, file_id, idempotency_key="k") == first
    with pytest.raises(Conflict):
        batching.create(database, file_id, idempotency_key="k", request_hash="other")


# ---------------------------------------------------------------- planners that meet


def test_planners_that_race_make_one_job_of_each_line(database: Database, other: Database) -> None:
    pad = "x" * 20_000
    file_id = batching.upload(database, *[line(str(n), pad=pad) for n in range(120)])
    batch_id = batching.create(database, file_id)
    start = threading.Barrier(4)

    def race(mine: Database) -> int:
        start.wait(10)
        steps = 0
        while (batch := row(mine, batch_id)).planned < 120:
            if batch.status == "validating":
                steps += batching.validate_once(mine, batch)
            elif batch.planned < batch.total:
                steps += batching.plan_once(mine, batch)
        return steps

    with ThreadPoolExecutor(4) as pool:
        steps = list(pool.map(race, [database, other, database, other]))
    jobs = jobs_of(database, batch_id)
    assert [job.line for job in jobs] == list(range(1, 121))
    assert [each.job_id for each in lines_of(database, batch_id)] == [job.id for job in jobs]
    batch = row(database, batch_id)
    assert (batch.total, batch.planned) == (120, 120)
    assert sum(steps) <= batch.checked + 120


def test_a_batch_is_left_to_the_planner_that_looked_last(database: Database) -> None:
    batch_id = batching.validated(database, line("a"))

    def take(owner: str) -> list[str]:
        return [each.id for each in database.write_now(lambda c: batches.take(c, owner))]

    assert take("one") == [batch_id]
    assert take("two") == []
    assert take("one") == [batch_id]
    statement = update(table).values(tended_ms=now_ms() - batches.TENDED_MS - 1)
    database.write_now(lambda c: c.execute(statement))
    assert take("two") == [batch_id]
    assert take("one") == []


# ---------------------------------------------------------------- the counts


def test_lines_have_their_places_without_gaps_whoever_finishes_them(
    database: Database, other: Database
) -> None:
    batch_ids = [batching.planned(database, *map(line, map(str, range(40)))) for _ in range(2)]
    work: dict[str, list[Any]] = {"one": [], "two": []}
    for batch_id in batch_ids:
        for number, job in enumerate(jobs_of(database, batch_id)):
            owner = "one" if number % 2 else "two"
            work[owner].append(makers.calling(database, job.id, owner))
    # each process meets the batches in another order, many finishes to a commit
    work["two"].reverse()

    def finish_all(mine: Database, owner: str) -> None:
        futures = [
            mine.submit(
                lambda c, claim=claim: lifecycle.finish(
                    c, claim, makers.outcome("succeeded" if claim.line_is_even else "failed")
                )
            )
            for claim in map(_Parity, work[owner])
        ]
        assert all(future.result(30) for future in futures)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(finish_all, [database, other], ["one", "two"]))
    for batch_id in batch_ids:
        batch = row(database, batch_id)
        assert (batch.completed + batch.failed, batch.last_seq) == (40, 40)
        lines = lines_of(database, batch_id)
        assert sorted(each.done_seq for each in lines) == list(range(1, 41))
        assert sum(each.ok for each in lines) == batch.completed
        assert batch.input_tokens == 40 * 12


class _Parity:
    """A claim that also says how it will end."""

    def __init__(self, claim: Any) -> None:
        self._claim = claim
        self.line_is_even = hash(claim.job_id) % 2 == 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._claim, name)


def test_a_commit_that_failed_counts_nothing_twice(database: Database) -> None:
    batch_id = batching.planned(database, line("a"))
    (job,) = jobs_of(database, batch_id)
    claim = makers.calling(database, job.id)
    together = threading.Event()
    holding = database.submit(lambda _: together.wait(10))
    good = database.submit(lambda c: lifecycle.finish(c, claim, makers.outcome()))
    bad = database.submit(lambda _: {}["nothing"])
    together.set()
    assert holding.result(10)
    assert isinstance(bad.exception(10), KeyError)
    assert good.result(10)
    batch = row(database, batch_id)
    assert (batch.completed, batch.last_seq) == (1, 1)


def test_unknown_usage_is_counted_and_not_zero(database: Database) -> None:
    batch_id = batching.planned(database, line("a"), line("b"))
    for job in jobs_of(database, batch_id):
        finish(database, job.id, "failed", spent=None)
    batch = row(database, batch_id)
    assert (batch.unknown_tokens, batch.unknown_price, batch.input_tokens) == (2, 2, 0)


def test_a_retried_attempt_counts_no_line(database: Database) -> None:
    batch_id = batching.planned(database, line("a"))
    (job,) = jobs_of(database, batch_id)
    claim = makers.calling(database, job.id)
    assert database.write_now(lambda c: lifecycle.hand_back(c, claim, makers.SPENT))
    assert row(database, batch_id).last_seq == 0
    finish(database, job.id)
    assert (row(database, batch_id).completed, row(database, batch_id).last_seq) == (1, 1)


# ---------------------------------------------------------------- the files


def test_the_files_grow_and_what_was_read_never_changes(database: Database) -> None:
    batch_id = batching.planned(database, *map(line, "abcd"))
    jobs = jobs_of(database, batch_id)
    finish(database, jobs[2].id)
    first = content(database, batch_id, "output")
    assert [each["custom_id"] for each in first] == ["c"]
    finish(database, jobs[0].id, "failed")
    finish(database, jobs[1].id)
    assert content(database, batch_id, "output")[:1] == first
    assert [each["custom_id"] for each in content(database, batch_id, "output", 1)] == ["b"]
    (failed,) = content(database, batch_id, "error")
    assert failed["error"] is None
    assert failed["response"]["status_code"] == 502
    assert failed["response"]["body"]["error"]["code"] == "why_failed"


# ---------------------------------------------------------------- cancel, expiry, retry


def test_cancel_keeps_what_is_done_and_names_every_other_line(database: Database) -> None:
    batch_id = batching.validated(database, *map(line, "abcdef"))
    batching.plan_once(database, row(database, batch_id), room=4)
    done, running, *_ = jobs_of(database, batch_id)
    finish(database, done.id)
    claim = makers.calling(database, running.id)

    found = database.write_now(lambda c: batches.cancel(c, batch_id, "alice"))
    assert found.status == "cancelling"
    assert not batching.plan_once(database, row(database, batch_id))
    stop = database.write_now(lambda c: cancelling.request_cancel_of_batch(c, batch_id))
    assert stop == [running.id]
    closed = makers.outcome("cancelled", error_code=None, error_message=None, spent=None)
    assert database.write_now(lambda c: closing.close_unstarted(c, batch_id, closed)) == 2
    assert not batching.end(database, batch_id, "cancelled"), "one still runs"
    partly = makers.outcome("cancelled", spent=makers.SPENT)
    assert database.write_now(lambda c: lifecycle.finish(c, claim, partly))
    assert batching.end(database, batch_id, "cancelled")

    batch = row(database, batch_id)
    assert (batch.status, batch.total, batch.completed, batch.failed) == ("cancelled", 6, 1, 5)
    assert [each["custom_id"] for each in content(database, batch_id, "output")] == ["a"]
    errors = content(database, batch_id, "error")
    assert sorted(each["custom_id"] for each in errors) == list("bcdef")
    assert {each["error"]["code"] for each in errors} == {"batch_cancelled"}
    assert [each["seq"] for each in errors] == [2, 3, 4, 5, 6]
    assert content(database, batch_id, "error", after=5)[0]["custom_id"] == "f"
    # what the cancelled call has cost stands in the sums, beside its line, and on the books
    (paid,) = [each["error"] for each in errors if "usage" in each["error"]]
    assert (paid["usage"]["total_tokens"], paid["kept"]) == (15, f"/v1/jobs/{running.id}")
    assert (batch.input_tokens, batch.output_tokens, batch.cost_nanousd) == (24, 6, 3_400)
    assert len(makers.rows(database, "usage")) == 2
    assert database.write_now(lambda c: batches.cancel(c, batch_id, "alice")).status == "cancelled"
    assert database.write_now(lambda c: batches.cancel(c, batch_id, "bob")) is None


def test_what_ends_before_its_file_was_read_has_no_lines_and_no_files(database: Database) -> None:
    some = [line(f"{n}", body={"x": f"{n}" * 50_000}) for n in range(20)]
    cancelled, expired = (batching.create(database, batching.upload(database, *some)) for _ in "ab")
    for batch_id in (cancelled, expired):
        assert batching.validate_once(database, row(database, batch_id))
        assert 0 < row(database, batch_id).total < len(some)
    database.write_now(lambda c: batches.cancel(c, cancelled, "alice"))
    assert not batching.validate_once(database, row(database, cancelled))
    assert batching.end(database, cancelled, "cancelled")
    assert database.write_now(lambda c: batches.expire_unchecked(c, expired))
    for batch_id, status in ((cancelled, "cancelled"), (expired, "expired")):
        batch = row(database, batch_id)
        assert (batch.status, batch.total, batch.failed) == (status, 0, 0)
        assert (batch.output_file_id, batch.error_file_id) == (None, None)
    database.write_now(batch_lines.forget_unbegun)
    assert makers.rows(database, "batch_lines") == []


def test_a_completed_batch_cannot_be_cancelled(database: Database) -> None:
    batch_id = batching.planned(database, line("a"))
    finish(database, jobs_of(database, batch_id)[0].id)
    database.write_now(lambda c: batches.finalize(c, batch_id))
    with pytest.raises(Conflict):
        database.write_now(lambda c: batches.cancel(c, batch_id, "alice"))


def test_expiry_keeps_what_is_done_and_names_every_other_line(database: Database) -> None:
    batch_id = batching.validated(database, *map(line, "abcd"))
    batching.plan_once(database, row(database, batch_id), room=2)
    done, queued = jobs_of(database, batch_id)
    finish(database, done.id)
    late(database, batch_id)
    makers.change(database, queued.id, deadline_ms=1)
    assert database.write_now(lambda c: batches.finalize(c, batch_id))
    expired = makers.outcome("expired", spent=None)
    assert database.write_now(lambda c: closing.close_unstarted(c, batch_id, expired)) == 1
    assert database.read_now(lambda c: batches.has_expired(c, row(database, batch_id)))
    assert batching.end(database, batch_id, "expired")
    assert [each["custom_id"] for each in content(database, batch_id, "output")] == ["a"]
    errors = content(database, batch_id, "error")
    assert [(each["custom_id"], each["error"]["code"]) for each in errors] == [
        (name, "batch_expired") for name in "bcd"
    ]
    assert all(each["response"] is None for each in errors)


# ---------------------------------------------------------------- files


def test_a_file_that_is_needed_stays(database: Database) -> None:
    batch_id = batching.planned(database, line("a"))
    batch = row(database, batch_id)
    for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
        with pytest.raises(Conflict):
            database.write_now(lambda c, file_id=file_id: files.drop(c, file_id))
    finish(database, jobs_of(database, batch_id)[0].id)
    database.write_now(lambda c: batches.finalize(c, batch_id))
    batching.end(database, batch_id)
    database.write_now(lambda c: files.drop(c, batch.input_file_id))
    assert makers.rows(database, "file_chunks") == []


def test_expired_files_and_abandoned_uploads_are_forgotten(database: Database) -> None:
    kept, gone, needed = (batching.upload(database, line("a")) for _ in range(3))
    batching.create(database, needed)
    table_ = files.files
    for file_id in (gone, needed):
        statement = update(table_).where(table_.c.id == file_id).values(expires_ms=1)
        database.write_now(lambda c, statement=statement: c.execute(statement))
    database.write_now(lambda c: files.begin(c, "file-half", "alice"))
    statement = update(table_).where(table_.c.id == "file-half").values(created_ms=1)
    database.write_now(lambda c: c.execute(statement))
    assert database.write_now(files.forget_expired) == 2
    assert {each["id"] for each in makers.rows(database, "files")} == {kept, needed}
