"""Short ways to have something written, alone, in one group or by many processes."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, select, text

from backchannel.db import Database
from backchannel.tables import workers

spawn = multiprocessing.get_context("spawn")


def sign_on(owner: str) -> Any:
    """Work that writes one row, and answers with its name."""
    row = {"owner": owner, "host": "h", "pid": 1, "slots": 1, "in_flight": 0}

    def work(connection: Connection) -> str:
        connection.execute(workers.insert(), row | {"started_ms": 1, "seen_ms": 1})
        return owner

    return work


def owners(database: Database) -> set[str]:
    """Who was signed on."""
    return set(database.read_now(lambda c: c.execute(select(workers.c.owner))).scalars())


def run_processes(target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
    """Processes of their own, one for each arguments; they all succeed."""
    processes = [spawn.Process(target=target, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)


class Gate:
    """Work that holds the writer, so that what is submitted meanwhile becomes one group."""

    def __init__(self, database: Database) -> None:
        self._open = threading.Event()
        self._reached = threading.Event()
        self.done = database.submit(self._work)
        assert self._reached.wait(10)

    def _work(self, connection: Connection) -> None:
        connection.execute(text("SELECT 1"))
        self._reached.set()
        assert self._open.wait(10)

    def open(self) -> None:
        """Let the group go."""
        self._open.set()
        self.done.result(10)
