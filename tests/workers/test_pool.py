"""What Celery's pool interface gets back of a task, and what of it stays behind."""

from __future__ import annotations

import asyncio
import gc
import select
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from kombu.serialization import dumps

from workers import pool as pools
from workers.pool import AsyncioPool


class Loop:
    """As the process: coroutines run on a loop of their own thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class Request:
    """As Celery's: its pool is told what to call in the end."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_success(self, told: Any) -> None:
        self.told.append(told)


async def answer(word: str) -> str:
    await asyncio.sleep(0)
    return word


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[AsyncioPool]:
    process = Loop()
    monkeypatch.setattr(pools, "get_process", lambda slots: process)
    task = SimpleNamespace(coroutine=answer, finished=None)
    pool = AsyncioPool(limit=1, app=SimpleNamespace(tasks={"chat": task}))
    pool.on_start()
    yield pool
    process.close()


def go(pool: AsyncioPool, callback: Callable[[Any], None]) -> None:
    """One task from Celery's handing it over to its callback."""
    content_type, encoding, body = dumps((["hi"], {}, {}), serializer="json")
    task = pool.app.tasks["chat"]
    arguments: Any = ("chat", "id", {}, body, content_type, encoding)
    pool.on_apply(lambda *_: (0, task.finished.result(), 0.0), arguments, {}, callback)
    assert select.select([pool._bell], [], [], 30.0)[0]
    pool._land()


def test_a_finished_task_is_told_with_its_result_and_its_time(pool: AsyncioPool) -> None:
    request = Request()
    go(pool, request.on_success)
    ((failed, result, seconds),) = request.told
    assert (failed, result) == (0, "hi")
    assert 0 <= seconds < 30
    assert pool._in_flight == 0


def test_a_finished_task_leaves_nothing_to_the_search_for_garbage(pool: AsyncioPool) -> None:
    gc.disable()
    try:
        request = Request()
        gone = weakref.ref(request)
        go(pool, request.on_success)
        del request
        pool.process.submit(answer("the loop has let go of it too")).result()
        assert gone() is None
    finally:
        gc.enable()
