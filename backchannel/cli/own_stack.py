"""A stack that a command started for itself, in the same home folder, and stops again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import deque
from pathlib import Path
from urllib.parse import urlsplit

from backchannel.cli.running import Running, is_loopback, read_running
from backchannel.cli.screen import Failure
from backchannel.cli.supervise import APART_S, dies_with_parent, itself
from backchannel.settings import Settings

START_S = 100.0  # longer than the stack's own patience, which knows more


class OwnStack:
    """``backchannel up`` as our child: it goes when we go."""

    def __init__(self, settings: Settings) -> None:
        self.log = settings.home_path / "logs" / "run.log"
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._hurried = asyncio.Event()

    @property
    def running(self) -> bool:
        """Whether we started one that still lives."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> Running:
        """Start a stack and wait until it is ready; or find the one somebody else just started.

        Raises:
            Failure: It does not start; the end of its log says why.
        """
        port = "0"
        if "api_url" in self._settings.model_fields_set:
            port = str(urlsplit(self._settings.api_url).port or 80)
        self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        words = ("up", "--port", port, "--flower-port", "0", "--log", str(self.log))
        with self.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *itself(*words),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=dies_with_parent(),
            )
        self._process = process
        give_up = time.monotonic() + START_S
        while time.monotonic() < give_up:
            found = read_running(self._settings)
            if found is not None and (found.pid == process.pid or process.returncode is not None):
                return found
            if process.returncode is not None and not await self._somebody_else():
                raise Failure(f"Backchannel did not start. {self._last_words()}")
            await asyncio.sleep(0.05)
        raise Failure(f"Backchannel was not ready after {START_S:g} s. {self._last_words()}")

    async def stop(self) -> None:
        """Let it drain, or do not wait for that once hurried; returns when it has gone."""
        if self._process is None or not self.running:
            return
        self._process.send_signal(signal.SIGTERM)
        gone = asyncio.create_task(self._process.wait(), name="own-stack-gone")
        hurried = asyncio.create_task(self._hurried.wait(), name="own-stack-hurried")
        await asyncio.wait({gone, hurried}, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not gone.done():
            # two signals at once are one to the kernel
            await asyncio.wait({gone}, timeout=APART_S)
        if not gone.done():
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
        await gone

    def hurry(self) -> None:
        """Do not wait for running jobs: they go back to the queue."""
        self._hurried.set()

    async def _somebody_else(self) -> bool:
        """Whether another process holds the home folder's lock, and so is starting a stack."""
        import fcntl

        with (self._settings.home_path / "up.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
            return False

    def _last_words(self) -> str:
        with self.log.open(encoding="utf-8", errors="replace") as log:
            lines = "\n".join(line.rstrip() for line in deque(log, 12))
        return f"Its log ({os.path.relpath(self.log)}) ends:\n{lines}"


def may_start(settings: Settings) -> bool:
    """Whether the API that is missing could be on this machine."""
    return "api_url" not in settings.model_fields_set or is_loopback(settings.api_url)


def shown(path: Path) -> str:
    """A path as short as it can be typed."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
