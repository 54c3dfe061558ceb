"""`backchannel up`: everything in one terminal, looked at with the other commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from backchannel.cli.main import answer
from backchannel.cli.running import Running, read_running
from backchannel.settings import Settings

START_S = 90.0


class Up:
    """One `backchannel up` in a home folder of its own."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home)
        self.log = home.parent / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "backchannel", "up", "--port", "0", "--flower-port", "0"],
                env={**os.environ, "BACKCHANNEL_HOME": str(home)},
                stdout=log,
                stderr=log,
            )
        self.until(lambda: "Ready. " in self.log.read_text())

    @property
    def running(self) -> Running:
        """Where it is."""
        found = read_running(self.settings)
        assert found is not None
        return found

    def pids(self) -> list[int]:
        """Of its children."""
        file = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(word) for word in file.read_text().split()]

    def pid(self, command: str) -> int | None:
        """Of the child that runs a command, if there is one at this moment."""
        for pid in self.pids():
            with suppress(OSError):
                if f"\0{command}\0" in Path(f"/proc/{pid}/cmdline").read_text():
                    return pid
        return None

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for it."""
        give_up = time.monotonic() + START_S
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < give_up, self.log.read_text()
            time.sleep(0.05)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One for all tests here."""
    started = Up(tmp_path_factory.mktemp("up") / "home")
    yield started
    started.process.kill()  # its children go with it
    started.process.wait()


@pytest.fixture(autouse=True)
def _here(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCHANNEL_HOME", str(up.settings.home_path))


@pytest.fixture
def job(up: Up) -> str:
    """A finished job's id."""
    body = {"prompt": "Say it again", "model": "echo:echo-1"}
    job_id: str = httpx2.post(f"{up.running.api_url}/v1/jobs", json=body).json()["id"]
    job = httpx2.get(f"{up.running.api_url}/v1/jobs/{job_id}?wait=30", timeout=40).json()
    assert job["state"] == "succeeded", up.log.read_text()
    return job_id


def test_it_says_where_everything_is(up: Up) -> None:
    said = up.log.read_text()
    assert f"backchannel | API      {up.running.api_url}" in said
    assert f"backchannel | Flower   {up.running.flower_url}" in said
    assert "Providers available: ollama, lmstudio, echo" in said
    assert "OPENAI_API_KEY=… backchannel up" in said
    assert len(up.pids()) == 4


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_the_other_commands_find_it(
    up: Up, job: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (
        ["jobs", "--state", "succeeded"],
        ["jobs", "show", job],
        ["jobs", "cancel", job],
        ["sessions"],
        ["usage"],
        ["usage", "--by", "provider", "--by", "day"],
        ["providers"],
        ["doctor"],
    ):
        assert answer([*command, *words]) == 0, command
        said = capsys.readouterr().out
        assert "\x1b" not in said
        if words:
            json.loads(said)
        elif command[:2] != ["jobs", "show"] and command[0] != "doctor":
            assert "\t" in said or command[1:2] == ["cancel"]


def test_usage_is_what_the_job_cost(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer(["usage", "--by", "model"])
    heading, row, *_ = capsys.readouterr().out.splitlines()
    named = dict(zip(heading.split("\t"), row.split("\t"), strict=True))
    assert (named["MODEL"], named["COST"]) == ("echo:echo-1", "$0.00")
    assert int(named["OUT"]) == 3 * int(named["JOBS"])


def test_watch_replays_the_text_and_ends_with_the_job(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(["jobs", "watch", job]) == 0
    assert capsys.readouterr().out == "Say it again\n"
    assert answer(["jobs", "watch", job, "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] == "end"
    assert answer(["jobs", "watch", "job_nobody"]) == 1
    assert "job_nobody" in capsys.readouterr().err


def test_a_job_can_be_done_again(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["jobs", "retry", job, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parent_id"] == job


def test_a_second_one_in_the_same_home_is_refused(
    up: Up, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(["up"]) == 1
    assert up.running.api_url in capsys.readouterr().err
    assert read_running(up.settings) is not None


def test_what_dies_is_started_again(up: Up, job: str) -> None:
    for command in ("api", "worker"):
        before = up.pid(command)
        assert before is not None
        os.kill(before, signal.SIGKILL)
        up.until(lambda command=command, before=before: up.pid(command) not in (None, before))

    def answers() -> bool:
        try:
            return httpx2.get(f"{up.running.api_url}/healthz").status_code == 200
        except httpx2.TransportError:
            return False

    up.until(answers)
    again = httpx2.post(
        f"{up.running.api_url}/v1/jobs", json={"prompt": "x", "model": "echo:echo-1"}
    )
    done = f"{up.running.api_url}/v1/jobs/{again.json()['id']}?wait=60"
    assert httpx2.get(done, timeout=70).json()["state"] == "succeeded"


def test_ctrl_c_stops_everything(tmp_path: Path) -> None:
    up = Up(tmp_path / "home")
    pids = up.pids()
    api_url = up.running.api_url
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(60) == 0
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert "Everything is stopped" in up.log.read_text().splitlines()[-1]
    assert read_running(up.settings) is None
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(api_url)


def test_a_killed_one_leaves_no_child_and_no_lie_behind(tmp_path: Path) -> None:
    up = Up(tmp_path / "home")
    pids = up.pids()
    up.process.kill()
    up.process.wait()
    assert read_running(up.settings) is None
    give_up = time.monotonic() + 40
    while [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < give_up
        time.sleep(0.05)
