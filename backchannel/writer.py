"""A process's one writer: what queues while the last commit runs is in the next one."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, Engine, Executable

from backchannel.outages import busy, closed, is_conflict, is_held_up, is_outage, translated

T = TypeVar("T")
Work = Callable[[Connection], T]

# Rows of one group commit; past a few hundred a larger commit only delays its first row.
MAX_GROUP = 500


class Awaited:
    """The future of a coroutine: settled on its loop, with all others of its group in one call."""

    __slots__ = ("_error", "_future", "_result", "loop")

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._future: asyncio.Future[Any] = self.loop.create_future()
        self._error: BaseException | None = None
        self._result: Any = None

    def __await__(self) -> Generator[Any, None, Any]:
        return self._future.__await__()

    def set_running_or_notify_cancel(self) -> bool:
        return not self._future.cancelled()

    def set_result(self, result: Any) -> None:
        self._result = result

    def set_exception(self, error: BaseException) -> None:
        self._error = error

    def settle(self) -> None:
        """On the loop; who went away meanwhile is not told."""
        if self._future.done():
            return
        if self._error is not None:
            self._future.set_exception(self._error)
        else:
            self._future.set_result(self._result)


class Part(NamedTuple):
    """One item of a work that is done for all items of a group together."""

    together: Callable[[Connection, list[Any]], list[Any]]
    item: Any


Reply = Future[Any] | Awaited
Asked = Work[Any] | Part


def _settle(replies: Sequence[Reply]) -> None:
    """Wake each loop once: a wake-up per row cost more than the row."""
    awaited: dict[asyncio.AbstractEventLoop, list[Awaited]] = {}
    for reply in replies:
        if isinstance(reply, Awaited):
            awaited.setdefault(reply.loop, []).append(reply)
    for loop, theirs in awaited.items():
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_settle_all, theirs)


def _settle_all(awaited: Sequence[Awaited]) -> None:
    for each in awaited:
        each.settle()


_AT_END = "backchannel_at_end"


def at_end(connection: Connection, do: Callable[[Connection, list[T]], None], item: T) -> None:
    """Have `do` called once with all items of this transaction, just before it commits.

    For rows that many jobs share: one statement per group instead of one per job, and their locks
    are held for the commit only.
    """
    connection.info.setdefault(_AT_END, {}).setdefault(do, []).append(item)


def in_bulk(statement: Executable) -> Callable[[Connection, list[dict[str, Any]]], None]:
    """For `at_end`: one execution of a statement for the rows of a whole group.

    A row costs a fifth of its own execution then, and on PostgreSQL no round trip.
    """

    def execute(connection: Connection, rows: list[dict[str, Any]]) -> None:
        connection.execute(statement, rows)

    return execute


class Writer:
    """A thread that does all that is put before it, in transactions of up to `MAX_GROUP`."""

    def __init__(self, engine: Engine, *, name: str) -> None:
        self._engine = engine
        self._queue: queue.SimpleQueue[tuple[Asked, Reply] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._write_forever, name=name, daemon=True)
        self._thread.start()

    def put(self, asked: Asked, reply: Reply) -> None:
        """Have it done in the next group; the reply is settled once it is durable."""
        if self._closed:
            reply.set_exception(closed())
            _settle([reply])
        else:
            self._queue.put((asked, reply))

    def close(self, timeout_s: float) -> None:
        """Finish what was put, then let go of the thread."""
        self._closed = True
        self._queue.put(None)
        self._thread.join(timeout=timeout_s)
        with suppress(queue.Empty):
            while True:  # what slipped in behind the end
                if (item := self._queue.get_nowait()) is not None:
                    item[1].set_exception(closed())
                    _settle([item[1]])

    def _write_forever(self) -> None:
        open_ = True
        while open_:
            item = self._queue.get()
            if item is None:
                return
            group = [item]
            # whatever queued while the last commit ran goes into this one; no timer
            while len(group) < MAX_GROUP:
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    open_ = False
                    break
                group.append(item)
            # From here on a caller that goes away cannot cancel its future under the writer's
            # hands, which would end this thread; what was cancelled before is not begun.
            group = [each for each in group if each[1].set_running_or_notify_cancel()]
            if group:
                self._commit(group)
                _settle([reply for _, reply in group])

    def _commit(self, group: Sequence[tuple[Asked, Reply]], tries: int = 5) -> bool:
        """Write a group; tells whether its transaction waited for a lock in vain."""
        try:
            with self._engine.begin() as connection:
                connection.info.pop(_AT_END, None)  # of a transaction that was rolled back
                results = _do(connection, [asked for asked, _ in group])
                for do, items in connection.info.pop(_AT_END, {}).items():
                    do(connection, items)
        except BaseException as error:
            # One bad piece of work must not fail its neighbours, and a deadlock between two groups
            # cannot happen between single pieces: each again, alone. The work is guarded, so doing
            # again what a lost reply left undecided changes nothing.
            if not is_outage(error) and (len(group) > 1 or (is_conflict(error) and tries > 1)):
                self._commit_each(group, tries - 1)
            else:
                for _, future in group:
                    future.set_exception(translated(error))
            return is_held_up(error)
        for (_, future), result in zip(group, results, strict=True):
            future.set_result(result)
        return False

    def _commit_each(self, group: Sequence[tuple[Asked, Reply]], tries: int) -> None:
        held_up = 0
        for each in group:
            if held_up < 2:
                held_up += self._commit([each], tries)
            else:  # no single row: the whole table is locked, and each would wait 5 s to hear it
                each[1].set_exception(busy("others hold locks"))


def _do(connection: Connection, group: list[Asked]) -> list[Any]:
    results: list[Any] = [None] * len(group)
    parts: dict[Any, list[int]] = {}
    for place, asked in enumerate(group):
        if isinstance(asked, Part):
            parts.setdefault(asked.together, []).append(place)
        else:
            results[place] = asked(connection)
    for together, places in parts.items():
        items = [group[place].item for place in places]  # type: ignore[union-attr]
        for place, result in zip(places, together(connection, items), strict=True):
            results[place] = result
    return results
