"""The writer: one transaction for all that queued, each with its own answer; none is locked out."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest
from sqlalchemy import Connection, select, text

from backchannel.db import Database
from backchannel.errors import Unavailable
from backchannel.tables import workers
from tests.backchannel.writing import Gate, owners, run_processes, sign_on

# ---------------------------------------------------------------- group commit


def test_what_queued_during_a_commit_is_one_transaction(database: Database) -> None:
    transactions: list[Any] = []

    def work(connection: Connection) -> None:
        transactions.append(connection.get_transaction())

    gate = Gate(database)
    futures = [database.submit(work) for _ in range(20)]
    gate.open()
    for future in futures:
        future.result(10)
    assert len(set(map(id, transactions))) == 1


def test_each_piece_of_a_group_gets_its_own_answer(database: Database) -> None:
    gate = Gate(database)
    futures = {name: database.submit(sign_on(name)) for name in map(str, range(50))}
    gate.open()
    assert {name: future.result(10) for name, future in futures.items()} == {n: n for n in futures}
    assert owners(database) == set(futures)


def test_one_bad_piece_does_not_fail_its_neighbours(database: Database) -> None:
    def bad(connection: Connection) -> None:
        connection.execute(workers.insert(), [{"owner": "half", "host": None}])

    gate = Gate(database)
    before = database.submit(sign_on("before"))
    broken = database.submit(bad)
    wrong = database.submit(lambda _: {}["nothing"])
    after = database.submit(sign_on("after"))
    gate.open()
    assert (before.result(10), after.result(10)) == ("before", "after")
    assert isinstance(wrong.exception(10), KeyError)
    assert broken.exception(10) is not None
    assert owners(database) == {"before", "after"}


def test_a_failing_piece_leaves_nothing_behind(database: Database) -> None:
    def half(connection: Connection) -> None:
        sign_on("half")(connection)
        raise ValueError("changed its mind")

    with pytest.raises(ValueError, match="changed its mind"):
        database.write_now(half)
    assert owners(database) == set()


async def test_a_caller_that_goes_away_does_not_stop_the_writer(database: Database) -> None:
    gate = Gate(database)
    leaving = asyncio.create_task(database.write(sign_on("never begun")))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    gate.open()

    reached, go_on = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        reached.set()
        assert go_on.wait(10)
        sign_on("begun")(connection)

    leaving = asyncio.create_task(database.write(slow))
    assert await asyncio.to_thread(reached.wait, 10)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    go_on.set()
    assert await asyncio.wait_for(database.write(sign_on("next")), 10) == "next"
    assert owners(database) == {"begun", "next"}


def test_close_finishes_what_was_submitted(database_url: str) -> None:
    database = Database(database_url, name="closing")
    futures = [database.submit(sign_on(str(number))) for number in range(30)]
    database.close()
    assert all(future.done() and not future.exception() for future in futures)


def test_a_write_after_close_fails_instead_of_waiting_for_ever(sqlite_url: str) -> None:
    database = Database(sqlite_url, name="closed")
    database.close()
    with pytest.raises(Unavailable):
        database.submit(sign_on("late")).result(10)


async def test_reads_do_not_wait_for_the_writer(database: Database) -> None:
    gate = Gate(database)
    found = await asyncio.wait_for(
        database.read(lambda c: c.execute(text("SELECT 1")).scalar_one()), 10
    )
    gate.open()
    assert found == 1


# ---------------------------------------------------------------- several writers


def _count_up(url: str, times: int) -> None:
    """Read, then write: what fails with "database is locked" unless it starts as a writer."""
    database = Database(url, name="counter")
    try:
        for _ in range(times):
            database.write_now(_one_more)
    finally:
        database.close()


def _one_more(connection: Connection) -> None:
    slots = workers.c.slots
    found = connection.execute(select(slots).with_for_update()).scalar_one()
    connection.execute(workers.update().values(slots=found + 1))


def test_threads_that_read_and_then_write_lose_nothing(database_url: str) -> None:
    database = Database(database_url, name="test")
    database.write_now(sign_on("sum"))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(_count_up, [database_url] * 4, [50] * 4))
    assert database.read_now(lambda c: c.execute(select(workers.c.slots)).scalar()) == 201
    database.close()


def test_processes_that_read_and_then_write_are_never_locked_out(sqlite_url: str) -> None:
    database = Database(sqlite_url, name="test")
    database.write_now(sign_on("sum"))
    run_processes(_count_up, [(sqlite_url, 100)] * 2)
    assert database.read_now(lambda c: c.execute(select(workers.c.slots)).scalar()) == 201
    database.close()


def test_two_groups_that_deadlock_are_both_written_in_the_end(postgres_url: str) -> None:
    left, right = (Database(postgres_url, name=name) for name in ("left", "right"))
    for owner in ("a", "b"):
        left.write_now(sign_on(owner))
    both_hold_one = threading.Barrier(2)

    def add(first: str, second: str) -> Any:
        tries = count()

        def work(connection: Connection) -> None:
            for owner in (first, second):
                connection.execute(
                    workers.update()
                    .where(workers.c.owner == owner)
                    .values(slots=workers.c.slots + 1)
                )
                if owner == first and next(tries) == 0:
                    both_hold_one.wait(10)

        return work

    futures = [left.submit(add("a", "b")), right.submit(add("b", "a"))]
    for future in futures:
        future.result(30)
    assert left.read_now(lambda c: c.execute(select(workers.c.slots)).scalars().all()) == [3, 3]
    left.close()
    right.close()
