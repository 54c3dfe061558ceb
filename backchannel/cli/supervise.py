"""Child processes: started, watched, restarted, stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

PAUSE_S = 0.5  # before the first restart; doubled each time
LONGEST_PAUSE_S = 10.0
HEALTHY_S = 30.0  # a child that lived this long starts again without the doubled pause
APART_S = 0.3  # between the two SIGTERMs, at least
LAST_WORDS_S = 5.0  # from the second SIGTERM to SIGKILL

_COLOURS = (36, 33, 35, 32, 34, 96, 93, 95)
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Child:
    """One process to keep alive.

    Attributes:
        rank: Children of a lower rank are stopped, and gone, before those of a higher one.
        grace_s: From the first SIGTERM to the second.
        already_served: True while another process does this work: the child waits its turn.
    """

    name: str
    command: Sequence[str]
    rank: int = 0
    grace_s: float = 10.0
    already_served: Callable[[], bool] | None = None


def itself(*arguments: str) -> list[str]:
    """The command line that runs another command of this program."""
    return [sys.executable, "-m", "backchannel", *arguments]


def dies_with_parent() -> Callable[[], None]:
    """For `preexec_fn`: the child gets SIGTERM when its parent goes, even by kill -9 (Linux)."""
    parent = os.getpid()

    def ask_kernel() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:  # it went before we asked
                os._exit(1)

    return ask_kernel


class Log:
    """One log of many processes: each line carries its child's name."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._coloured = stream.isatty() and not os.environ.get("NO_COLOR")
        self._names: list[str] = []

    def write(self, name: str, line: str) -> None:
        """Write one line; a closed terminal must not stop the children."""
        if name not in self._names:
            self._names.append(name)
        width = max(map(len, self._names))
        label = f"{name:<{width}} |"
        if self._coloured:
            colour = _COLOURS[self._names.index(name) % len(_COLOURS)]
            label = f"\x1b[{colour}m{label}\x1b[0m"
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(f"{label} {line}\n")
            self._stream.flush()


class Supervisor:
    """Keeps children alive until it is told to stop; then stops them in the order of their ranks.

    Use it on the main thread: the kernel ties a child's life to the thread that started it.
    """

    def __init__(self, log: Log, *, environment: Mapping[str, str] | None = None) -> None:
        self.stopping = asyncio.Event()
        self.deaths: dict[str, int] = {}
        self._log = log
        self._environment = {**(environment or os.environ), "PYTHONUNBUFFERED": "1"}
        self._children: list[Child] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._hurry = asyncio.Event()

    def start(self, child: Child) -> None:
        """Start a child and keep it alive."""
        self._children.append(child)
        self._tasks[child.name] = asyncio.create_task(self._keep(child), name=f"keep-{child.name}")

    def say(self, sentence: str) -> None:
        """A sentence of our own in the common log."""
        self._log.write("backchannel", sentence)

    def listen_to_signals(self) -> None:
        """The first SIGTERM, Ctrl-C or hang-up stops in order; the second one hurries."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self.stop_soon)

    def stop_soon(self) -> None:
        """Ask for the end; asked again, do not wait for running jobs."""
        if self.stopping.is_set():
            self._hurry.set()
        self.stopping.set()

    async def run_until_stopped(self) -> None:
        """Wait for the signal, then stop everything."""
        await self.stopping.wait()
        await self.stop()

    async def stop(self) -> None:
        """Stop all children, lowest rank first; returns when every one is gone."""
        self.stopping.set()
        for rank in sorted({child.rank for child in self._children}):
            group = [child for child in self._children if child.rank == rank]
            await asyncio.gather(*map(self._stop, group))

    async def _stop(self, child: Child) -> None:
        task = self._tasks[child.name]
        self._signal(child, signal.SIGTERM)
        hurry = asyncio.create_task(self._hurry.wait(), name=f"hurry-{child.name}")
        await asyncio.wait(
            {task, hurry}, timeout=child.grace_s, return_when=asyncio.FIRST_COMPLETED
        )
        hurry.cancel()
        if not task.done():
            # two signals at once are one to the kernel
            await asyncio.wait({task}, timeout=APART_S)
        if not task.done():
            self._signal(child, signal.SIGTERM)
            await asyncio.wait({task}, timeout=LAST_WORDS_S)
        if not task.done():
            self.say(f"{child.name} does not stop: killed. Its jobs go back to the queue.")
            self._signal(child, signal.SIGKILL)
        await task

    def _signal(self, child: Child, number: signal.Signals) -> None:
        process = self._processes.get(child.name)
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(process.pid, number)  # what it started goes too
            else:
                process.send_signal(number)

    async def _keep(self, child: Child) -> None:
        pause = PAUSE_S
        while not self.stopping.is_set():
            if child.already_served is not None and child.already_served():
                await self._pause(PAUSE_S)
                continue
            started = time.monotonic()
            how = await self._live(child)
            if self.stopping.is_set():
                return
            self.deaths[child.name] = self.deaths.get(child.name, 0) + 1
            if time.monotonic() - started > HEALTHY_S:
                pause = PAUSE_S
            self.say(f"{child.name} {how}; it starts again in {pause:g} s.")
            await self._pause(pause)
            pause = min(pause * 2, LONGEST_PAUSE_S)

    async def _live(self, child: Child) -> str:
        """Run the child once; returns how it ended."""
        try:
            process = await asyncio.create_subprocess_exec(
                *child.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # Ctrl-C in the terminal is ours to pass on, once
                preexec_fn=dies_with_parent(),
            )
        except OSError as error:
            return f"cannot be started ({error})"
        self._processes[child.name] = process
        if self.stopping.is_set():  # asked to stop while it was being started
            self._signal(child, signal.SIGTERM)
        pump = asyncio.create_task(self._pump(child.name, process), name=f"log-{child.name}")
        code = await process.wait()
        # what it started may hold the pipe open for ever
        _, late = await asyncio.wait({pump}, timeout=1.0)
        if late:
            pump.cancel()
        return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"

    async def _pump(self, name: str, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        rest = b""
        while chunk := await process.stdout.read(65_536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._log.write(name, line.decode(errors="replace"))
        if rest:
            self._log.write(name, rest.decode(errors="replace"))

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), timeout=seconds)
