"""A Celery pool that runs each task as a coroutine on the process's event loop.

The task begins when its coroutine begins and ends when it ends, so Flower's runtimes are true, and
no thread waits for it. Finished coroutines come back through a pipe that Celery's hub watches:
the tracer, the acknowledgement and every other broker call stay on the main thread.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple

import structlog
from billiard.einfo import ExceptionInfo
from celery.concurrency.base import BasePool
from celery.exceptions import Ignore, WorkerShutdown, WorkerTerminate
from kombu.serialization import loads

from workers.process import get_process

log = structlog.get_logger()

LAST_RESORT_S = 8.0  # beyond the grace time: longer than the orderly way ever takes
HAND_BACK_S = 5.0  # to write the hand-backs of all running jobs, in one group commit or two


class _Flight(NamedTuple):
    """One task in flight: what Celery wants called, and when it started.

    Without its future, which keeps its callbacks, and they this: 50 objects of each job would be
    left to the search for garbage cycles, during which everything stands still.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    callback: Callable[..., Any]
    started: float


def _nothing_to_do() -> ExceptionInfo:
    try:
        raise Ignore
    except Ignore:
        return ExceptionInfo()


# What Celery's tracer returns for a doorbell that nothing came of. Made once: it takes a traceback
# apart down to the columns, 1.5 ms each time, and behind a backlog such doorbells are many.
_IGNORED = _nothing_to_do()


class AsyncioPool(BasePool):
    """At most `limit` coroutines in flight; Celery's prefetch keeps to it."""

    signal_safe = False
    task_join_will_block = False

    def on_start(self) -> None:
        """Open the process: loop, database, Redis, clients."""
        self.process = get_process(slots=self.limit)
        self._landed: deque[tuple[_Flight, Future[Any]]] = deque()
        self._in_flight = 0
        self._bell, self._ring = os.pipe()
        os.set_blocking(self._bell, False)
        os.set_blocking(self._ring, False)
        self._grace_ends: float | None = None

    def register_with_event_loop(self, hub: Any) -> None:
        """Called at every (re)connection to the broker: the hub forgets its readers."""
        hub.add_reader(self._bell, self._land)

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Any,
        kwargs: Any,
        callback: Callable[..., Any] | None = None,
        accept_callback: Callable[..., Any] | None = None,
        **_: Any,
    ) -> None:
        """Start a task's coroutine; `target` is Celery's tracer, called when it has finished."""
        name, _uuid, _request, body, content_type, encoding = args
        task = self.app.tasks[name]
        task_args, way, _embed = loads(body, content_type, encoding, accept={content_type})
        started = time.monotonic()
        if accept_callback is not None:
            accept_callback(os.getpid(), started)
        self._in_flight += 1
        flight = _Flight(target, args, callback or _nobody, started)

        def landed(future: Future[Any]) -> None:  # on the loop's thread
            self._landed.append((flight, future))
            with suppress(BlockingIOError):  # full: it rings already
                os.write(self._ring, b"\0")

        self.process.submit(task.coroutine(*task_args, **way)).add_done_callback(landed)

    def _land(self, *_: Any) -> None:
        """Finish what has come back: on the main thread, under Celery's own tracer."""
        try:
            os.read(self._bell, 65_536)
        except BlockingIOError:
            return
        while self._landed:
            flight, future = self._landed.popleft()
            self._in_flight -= 1
            if not future.cancelled() and isinstance(future.exception(), Ignore):
                flight.callback((1, _IGNORED, 0.0))
                continue
            task = self.app.tasks[flight.args[0]]
            task.finished = future
            try:
                failed, result, _ = flight.target(*flight.args)
            except (WorkerShutdown, WorkerTerminate):
                raise
            except BaseException:
                flight.callback((1, ExceptionInfo(), 0.0))
            else:
                flight.callback((failed, result, time.monotonic() - flight.started))
            finally:
                task.finished = None

    def take_signals(self) -> None:
        """Put ourselves before Celery's handlers: the first SIGTERM drains, the next means now."""
        for number in (signal.SIGTERM, signal.SIGINT):
            celery_s = signal.getsignal(number)

            def told(number: int, frame: Any, celery_s: Any = celery_s) -> None:
                if self._grace_ends is not None:
                    self._grace_ends = 0.0
                    return
                self._begin_to_stop()
                celery_s(number, frame)

            signal.signal(number, told)

    def _begin_to_stop(self) -> None:
        """Claim nothing more, and see to it that this process ends even if Celery does not."""
        if self._grace_ends is None:
            self.process.drain()
            self._grace_ends = time.monotonic() + self.process.settings.grace_s
            threading.Thread(target=self._last_resort, name="last-resort", daemon=True).start()

    def _last_resort(self) -> None:
        # With Redis frozen Celery's main thread publishes its heartbeat again and again and never
        # comes to stop the pool; by then everything is handed back, and nothing is lost.
        while time.monotonic() < (self._grace_ends or 0.0) + LAST_RESORT_S:
            time.sleep(0.1)
        self.process.hand_back_all()
        time.sleep(1.0)
        self.process.close()
        log.warning("Celery did not stop in time; its jobs are handed back, the process ends.")
        os._exit(0)

    def on_close(self) -> None:
        """Celery begins to stop."""
        self._begin_to_stop()
        if self._in_flight:
            log.info(
                "Stopping: running jobs may finish, the rest goes back to the queue.",
                jobs=self._in_flight,
                grace_s=self.process.settings.grace_s,
            )

    def on_stop(self) -> None:
        """Wait for what fits in the grace time, hand the rest back, close the process."""
        self._wait_until(lambda: self._grace_ends or 0.0)
        if self._in_flight:
            log.info("Handing running jobs back to the queue.", jobs=self._in_flight)
            self.process.hand_back_all()
            deadline = time.monotonic() + HAND_BACK_S
            self._wait_until(lambda: deadline)
        self.process.close()
        os.close(self._bell)
        os.close(self._ring)

    def on_terminate(self) -> None:
        """Cold shutdown: as `on_stop` without the grace."""
        self._grace_ends = 0.0
        self.on_stop()

    def _wait_until(self, deadline: Callable[[], float]) -> None:
        # Celery's hub does not run while the pool stops, so this watches the pipe itself
        while self._in_flight and time.monotonic() < deadline():
            select.select([self._bell], [], [], 0.1)
            self._land()


def _nobody(_: Any) -> None:
    """No callback was given."""
