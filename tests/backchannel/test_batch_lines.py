"""A batch's lines: wrong ones named by their numbers, the others made jobs once, whoever plans."""

from __future__ import annotations

import pytest

from backchannel import batch_lines, batches, files
from backchannel.batch_lines import Refused
from backchannel.db import Database
from tests import makers
from tests.backchannel import batching
from tests.backchannel.batching import content, finish, jobs_of, line, lines_of, row


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (b"{", "invalid_json_line"),
        (b"[]", "invalid_json_line"),
        (b'{"custom_id": NaN}', "invalid_json_line"),
        (line(None), "missing_required_parameter"),
        (line(7), "invalid_custom_id"),
        (line("x" * 600), "invalid_custom_id"),
        (line("a"), "duplicate_custom_id"),
        (line("b", method="GET"), "invalid_method"),
        (line("b", method=None), "invalid_method"),
        (line("b", url="/v1/embeddings"), "invalid_url"),
        (line("b", body="Hi"), "missing_required_parameter"),
        (line("b", body=None), "missing_required_parameter"),
        (line("b", pad="x" * files.MAX_LINE_BYTES), "line_too_long"),
        (line("b", pad="x" * 2 * files.MAX_LINE_BYTES), "line_too_long"),
    ],
)
def test_a_line_of_the_wrong_form_fails_the_batch_by_its_number(
    database: Database, bad: bytes, code: str
) -> None:
    batch_id = batching.validated(database, line("a"), b"", bad, line("z"))
    batch = row(database, batch_id)
    assert batch.status == "failed"
    assert (batch.faults[0]["line"], batch.faults[0]["code"]) == (3, code)
    database.write_now(batch_lines.forget_unbegun)
    assert lines_of(database, batch_id) == []


def test_an_empty_file_fails(database: Database) -> None:
    for content_ in ([], [b"", b"  "]):
        batch = row(database, batching.validated(database, *content_))
        assert (batch.status, batch.faults[0]["code"]) == ("failed", "empty_file")


def test_faults_are_named_up_to_a_cap_and_counted_beyond(database: Database) -> None:
    batch = row(database, batching.validated(database, line("a"), *[b"{"] * 150))
    assert (batch.faults_count, len(batch.faults)) == (150, 100)
    assert [fault["line"] for fault in batch.faults] == list(range(2, 102))


def test_an_id_is_found_again_in_another_chunk(database: Database) -> None:
    pad = "x" * (files.CHUNK_BYTES // 2)
    lines = [line(str(number), pad=pad) for number in range(6)]
    batch_id = batching.create(database, batching.upload(database, *lines, line("1")))
    chunks = 0
    while row(database, batch_id).status == "validating":
        chunks += batching.validate_once(database, row(database, batch_id))
    assert chunks > 2
    (fault,) = row(database, batch_id).faults
    assert (fault["line"], fault["code"]) == (7, "duplicate_custom_id")


def test_a_step_that_was_made_is_not_made_again(database: Database) -> None:
    batch_id = batching.create(database, batching.upload(database, *map(line, "abc")))
    batch = row(database, batch_id)
    assert batching.validate_once(database, batch)
    assert not batching.validate_once(database, batch)
    batch = row(database, batch_id)
    assert batching.plan_once(database, batch)
    before = makers.everything(database)
    assert not batching.plan_once(database, batch)
    assert makers.everything(database) == before


def test_a_refused_line_is_in_the_errors_and_the_rest_is_planned(database: Database) -> None:
    batch_id = batching.validated(database, line("a"), line("b"))
    refused = [Refused(1, 400, {"error": {"message": "No.", "code": "x"}})]
    assert database.write_now(lambda c: batch_lines.plan(c, batch_id, 1, 2, [], refused))
    (record,) = content(database, batch_id, "error")
    assert record["response"] == {
        "status_code": 400,
        "request_id": record["id"],
        "body": {"error": {"message": "No.", "code": "x"}},
    }
    batch = row(database, batch_id)
    assert (batch.planned, batch.failed, batch.last_seq, batch.next_line) == (1, 1, 1, 2)


def test_a_retry_is_a_batch_of_the_lines_without_an_answer(database: Database) -> None:
    batch_id = batching.validated(database, *map(line, "abcdef"))
    batching.plan_once(database, row(database, batch_id), room=3)
    for job, state in zip(
        jobs_of(database, batch_id), ("succeeded", "failed", "succeeded"), strict=True
    ):
        finish(database, job.id, state)
    database.write_now(lambda c: batches.cancel(c, batch_id, "alice"))
    assert batching.end(database, batch_id, "cancelled")

    parent = row(database, batch_id)
    child_id = batching.create(database, parent.input_file_id, parent_id=batch_id)
    assert database.write_now(lambda c: batch_lines.copy_lines(c, child_id, batch_id, 0))
    assert not database.write_now(lambda c: batch_lines.copy_lines(c, child_id, batch_id, 0))
    child = row(database, child_id)
    assert (child.status, child.total) == ("in_progress", 4)
    assert [each.custom_id for each in lines_of(database, child_id)] == list("bdef")
    assert batching.plan_once(database, child)
    assert [job.line for job in jobs_of(database, child_id)] == [2, 4, 5, 6]
