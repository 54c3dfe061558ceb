"""The supervisor as a process of its own, with small children: kept alive, and stopped in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WAIT_S = 30.0

PROGRAM = """
import asyncio, sys
from backchannel.cli import supervise
from backchannel.cli.supervise import Child, Log, Supervisor

supervise.LAST_WORDS_S = 0.5
BODY = '''
import os, signal, sys, time
name, deaf = sys.argv[1], int(sys.argv[2])
def stop(*_):
    global deaf
    print("told to stop", flush=True)
    deaf -= 1
    if deaf < 0:
        time.sleep(0.2)
        print("gone", flush=True)
        os._exit(0)
signal.signal(signal.SIGTERM, stop)
print("pid", os.getpid(), flush=True)
while True:
    time.sleep(0.01)
'''

async def main():
    supervisor = Supervisor(Log(sys.stderr))
    supervisor.listen_to_signals()
    for spec in sys.argv[1:]:
        name, rank, deaf, grace = spec.split(":")
        command = [sys.executable, "-c", BODY, name, deaf]
        supervisor.start(Child(name, command, rank=int(rank), grace_s=float(grace)))
    await supervisor.run_until_stopped()

asyncio.run(main())
"""


class Supervised:
    """The supervisor's process and its log."""

    def __init__(self, log: Path, *children: str) -> None:
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *children], stderr=stream, stdout=stream
            )

    @property
    def lines(self) -> list[tuple[str, str]]:
        """The log: who, and what."""
        pairs = (line.partition("|") for line in self.log.read_text().splitlines())
        return [(who.strip(), what.strip()) for who, _, what in pairs]

    def pids(self, name: str) -> list[int]:
        """Of all processes a child has been so far."""
        return [int(what[4:]) for who, what in self.lines if who == name and what[:4] == "pid "]

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for it."""
        give_up = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < give_up, self.log.read_text()
            time.sleep(0.02)

    def close(self) -> None:
        """Leave nothing behind."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    """Start a supervisor with children given as ``name:rank:deaf:grace``."""
    started: list[Supervised] = []

    def start(*children: str) -> Supervised:
        started.append(Supervised(tmp_path / "log", *children))
        for child in children:
            name = child.partition(":")[0]
            started[-1].until(lambda name=name: started[-1].pids(name))
        return started[-1]

    yield start
    for each in started:
        each.close()


def alive(pid: int) -> bool:
    """Whether the process is there, and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_dead_child_starts_again_and_the_others_do_not_notice(
    supervise: Callable[..., Supervised],
) -> None:
    running = supervise("api:0:0:5", "worker:1:0:5")
    os.kill(running.pids("api")[0], signal.SIGKILL)
    running.until(lambda: len(running.pids("api")) == 2)
    assert ("backchannel", "api was killed by signal 9; it starts again in 0.5 s.") in running.lines
    assert len(running.pids("worker")) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_children_are_stopped_in_the_order_of_their_ranks(
    supervise: Callable[..., Supervised], number: signal.Signals
) -> None:
    running = supervise("valkey:3:0:5", "api:1:0:5", "worker:2:0:5", "flower:0:0:5")
    running.process.send_signal(number)
    assert running.process.wait(WAIT_S) == 0
    said = [line for line in running.lines if not line[1].startswith("pid")]
    assert said == [
        (name, what)
        for name in ("flower", "api", "worker", "valkey")
        for what in ("told to stop", "gone")
    ]


def test_the_second_signal_does_not_wait_for_the_grace_time(
    supervise: Callable[..., Supervised],
) -> None:
    running = supervise("worker:0:1:600", "valkey:1:0:600")
    running.process.terminate()
    running.until(lambda: ("worker", "told to stop") in running.lines)
    running.process.terminate()
    assert running.process.wait(WAIT_S) == 0
    assert [who for who, what in running.lines if what == "gone"] == ["worker", "valkey"]


def test_a_child_that_does_not_listen_is_killed(supervise: Callable[..., Supervised]) -> None:
    running = supervise("worker:0:99:0.3")
    running.process.terminate()
    assert running.process.wait(WAIT_S) == 0
    assert running.lines[-1][1].startswith("worker does not stop: killed.")
    assert not alive(running.pids("worker")[0])


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise on Linux only")
def test_children_go_when_the_supervisor_is_killed(supervise: Callable[..., Supervised]) -> None:
    running = supervise("worker:0:0:5")
    [pid] = running.pids("worker")
    running.process.kill()
    running.until(lambda: not alive(pid))


def test_what_cannot_be_started_is_said_and_tried_again(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from backchannel.cli.supervise import Child, Log, Supervisor\n"
        "async def main():\n"
        "    supervisor = Supervisor(Log(sys.stderr))\n"
        "    supervisor.start(Child('api', ['no-such-program']))\n"
        "    await asyncio.sleep(1)\n"
        "    await supervisor.stop()\n"
        "asyncio.run(main())\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=WAIT_S
    ).stderr
    assert said.count("api cannot be started") == 2
