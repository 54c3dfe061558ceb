"""Watches the event loop from a thread of its own: its lag, and stack dumps when it hangs."""

from __future__ import annotations

import asyncio
import faulthandler
import sys
import threading
import time

import structlog

log = structlog.get_logger()

PROBE_S = 0.5
HANG_S = 2.0  # nothing on the loop should compute this long
QUIET_S = 30.0  # between two dumps


class Watchdog:
    """`lag_s` is how late the loop ran its last probe; above 0.2 s the engine takes no new job."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.lag_s = 0.0
        self._loop = loop
        self._stop = threading.Event()
        self._dumped = -QUIET_S
        self._thread = threading.Thread(target=self._watch, name="loop-watchdog", daemon=True)
        self._thread.start()

    async def caught_up(self, lag_s: float) -> None:
        """Wait until the loop is no later than this."""
        while self.lag_s > lag_s:  # noqa: ASYNC110  a thread measures it, there is no event
            await asyncio.sleep(PROBE_S)

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(PROBE_S):
            asked = time.monotonic()
            ran = threading.Event()
            try:
                self._loop.call_soon_threadsafe(ran.set)
            except RuntimeError:  # the loop is closed
                return
            if not ran.wait(HANG_S):
                self.lag_s = HANG_S
                self._dump()
                ran.wait(60)
            self.lag_s = time.monotonic() - asked

    def _dump(self) -> None:
        if time.monotonic() - self._dumped < QUIET_S:
            return
        self._dumped = time.monotonic()
        log.error(
            "The event loop hangs; the stacks of all threads follow. Something computes on it.",
            seconds=HANG_S,
        )
        # frames only, no values: a prompt or a key never gets into the log this way
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
