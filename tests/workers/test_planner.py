"""The planner of a worker process: a window at a time, and a prompt end of all that is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from backchannel import batches
from backchannel.batch_input import job_of_line
from backchannel.tables import BATCH
from tests.backchannel import batching
from tests.backchannel.batching import content, line, row
from tests.workers.conftest import Bench
from workers import planner
from workers.process import Process

LINES = 3_000


async def until(bench: Bench, batch_id: str, reached: Callable[[Any], bool]) -> Any:
    """The batch, once it has come so far."""
    give_up = time.monotonic() + 60
    while not reached(batch := row(bench.database, batch_id)):
        assert time.monotonic() < give_up, batch
        await asyncio.sleep(0.05)
    return batch


async def test_a_window_is_planned_and_the_rest_waits_until_it_is_cancelled(
    bench: Bench, process: Process
) -> None:
    lines = [line(str(number)) for number in range(LINES)]
    lines[7] = line("7", body={"model": "nobody:x", "messages": []})
    batch_id = batching.create(bench.database, batching.upload(bench.database, *lines))
    await until(bench, batch_id, lambda batch: batch.planned >= planner.LEAST_WINDOW - 125)
    await asyncio.sleep(3 * planner.LOOK_S)
    batch = row(bench.database, batch_id)
    assert batch.planned <= planner.LEAST_WINDOW + 1  # the refused line is over already
    assert (batch.total, batch.failed) == (LINES, 1)
    assert [each["custom_id"] for each in content(bench.database, batch_id, "error")] == ["7"]

    asked = time.monotonic()
    bench.database.write_now(lambda c: batches.cancel(c, batch_id, "alice"))
    batch = await until(bench, batch_id, lambda batch: batch.ended_ms is not None)
    assert time.monotonic() - asked < 20
    assert (batch.status, batch.completed, batch.failed) == ("cancelled", 0, LINES)
    errors = [each["custom_id"] for each in content(bench.database, batch_id, "error")]
    assert sorted(errors) == sorted(map(str, range(LINES)))
    states = bench.rows("SELECT DISTINCT state, lane FROM jobs")
    assert [tuple(each) for each in states] == [("cancelled", BATCH)]


async def test_a_defect_costs_its_line_and_no_other(
    bench: Bench, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(batch: Any, raw: bytes, head: Any, registry: Any) -> Any:
        return {}["no"] if head.line == 2 else job_of_line(batch, raw, head, registry)

    monkeypatch.setattr(planner, "job_of_line", broken)
    file_id = batching.upload(bench.database, *map(line, "abc"))
    batch_id = batching.create(bench.database, file_id)
    batch = await until(bench, batch_id, lambda batch: batch.planned == 3)
    assert batch.failed == 1
    (record,) = content(bench.database, batch_id, "error")
    assert (record["custom_id"], record["response"]["status_code"]) == ("b", 500)


async def test_a_file_whose_time_is_over_before_it_is_read_expires(
    bench: Bench, process: Process
) -> None:
    file_id = batching.upload(bench.database, line("a"))
    batch_id = batching.create(bench.database, file_id, window_s=-1)
    batch = await until(bench, batch_id, lambda batch: batch.ended_ms is not None)
    assert (batch.status, batch.total) == ("expired", 0)
