"""Processes of a benchmark: started on one core, stopped by pid, their CPU time and memory read.

Linux only, like pinning itself: the figures are the kernel's own, from /proc and the CPU clocks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60.0
_TICKS = os.sysconf("SC_CLK_TCK")


@cache  # as it was before this process bound itself to one of them
def cores() -> tuple[int, int]:
    """The core of provider and driver, and the core of what is measured."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[-1]


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        with suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def pin(pids: Iterable[int], core: int) -> None:
    """Bind processes, their threads and descendants to a core."""
    for root in pids:
        for pid in tree(root):
            with suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setaffinity(int(task.name), {core})


def cpu_s(pids: Iterable[int]) -> float:
    """User and system seconds so far of processes and their descendants, the reaped ones too."""
    return sum(_cpu_s(pid) for root in pids for pid in tree(root))


def _cpu_s(pid: int) -> float:
    try:
        # the clock of another process, as clock_getcpuclockid(3) makes it: nanoseconds, not ticks
        own = time.clock_gettime((~pid << 3) | 2)
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0  # gone: its parent has its time now
    return own + (int(fields[13]) + int(fields[14])) / _TICKS


def cpu_by_role(roles: Mapping[str, list[int]]) -> dict[str, float]:
    """CPU seconds so far of each role's processes."""
    return {role: cpu_s(pids) for role, pids in roles.items()}


def resident_kb(pids: Iterable[int]) -> int:
    """Resident memory of processes and their descendants."""
    return sum(_status_kb(pid, "VmRSS") for root in pids for pid in tree(root))


def _status_kb(pid: int, name: str) -> int:
    with suppress(OSError, IndexError):
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.partition(f"{name}:")[2].split()[0])
    return 0


class Child:
    """One process that was started here."""

    def __init__(
        self,
        *module: str,
        core: int,
        log: Path,
        env: Mapping[str, str] | None = None,
        talks: bool = False,
    ) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *module],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else file,
                stderr=file,
                start_new_session=True,  # Ctrl-C is for the benchmark, which then stops this
                text=True,
            )
        pin([self.pid], core)

    @property
    def pid(self) -> int:
        """Its own pid."""
        return self.process.pid

    def readline(self) -> str:
        """What it says next."""
        assert self.process.stdout is not None
        line: str = self.process.stdout.readline()
        assert line, f"{self.process.args!r} ended:\n{self.said()}"
        return line

    def tell(self, line: str) -> None:
        """Write it one line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-3000:]

    def until(self, ready: Callable[[], bool], every_s: float = 0.02) -> float:
        """Wait until it is ready; returns the seconds that took."""
        started = time.monotonic()
        while not ready():
            if self.process.poll() is not None or time.monotonic() - started > PATIENCE_S:
                raise AssertionError(f"{self.process.args!r} is not ready:\n{self.said()}")
            time.sleep(every_s)
        return time.monotonic() - started

    def stop(self) -> None:
        """Kill it and its descendants."""
        for pid in tree(self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
