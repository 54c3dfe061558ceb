"""`backchannel run` by real processes: alone, on a running API, and through trouble."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.trip.stack import ROOT, Stack

RUN_S = 100.0


class Run:
    """Runs in one folder, with one environment."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        self.env = {**env, "PYTHONPATH": str(ROOT)}

    def write(self, *lines: Any, name: str = "in.jsonl") -> None:
        """The input: values, or bytes as they are."""
        texts = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in lines]
        (self.folder / name).write_bytes(b"".join(text + b"\n" for text in texts))

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start one in the background; its output goes to files."""
        with (self.folder / "out").open("wb") as out, (self.folder / "err").open("wb") as err:
            return subprocess.Popen(
                [sys.executable, "-m", "backchannel", "run", *words],
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def __call__(self, *words: str, code: int = 0, file: str = "in.jsonl") -> dict[str, Any]:
        """Run to the end; the summary."""
        process = self.start(file, "--json", *words)
        try:
            ended = process.wait(RUN_S)
        finally:
            process.kill()
        out, err = ((self.folder / name).read_text() for name in ("out", "err"))
        assert ended == code, err + out
        summary: dict[str, Any] = json.loads(out)
        return summary

    def results(self, name: str = "in.results.jsonl") -> list[dict[str, Any]]:
        """The lines of an output file."""
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def errors(self) -> list[dict[str, Any]]:
        """The lines of the errors file."""
        return self.results("in.errors.jsonl")

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for it."""
        give_up = time.monotonic() + RUN_S
        while not condition():
            assert time.monotonic() < give_up, (self.folder / "err").read_text()
            time.sleep(0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a run is started: with a space in its name, and no installation around."""
    made = tmp_path / "my prompts"
    made.mkdir()
    return made


@pytest.fixture
def run(stack: Stack, folder: Path) -> Run:
    """Runs that use the stack of the test, with one worker."""
    stack.worker()
    return Run(folder, {**stack.env, "BACKCHANNEL_API_URL": stack.url})


def prompts(count: int, model: str = "openai:ok-t4") -> list[dict[str, Any]]:
    """Lines with ids p0, p1, …"""
    return [{"prompt": f"number {n}", "custom_id": f"p{n}", "model": model} for n in range(count)]


def answered(found: list[dict[str, Any]]) -> set[str]:
    """The ids of results that are successes."""
    assert all(each["response"]["status_code"] == 200 for each in found)
    return {each["custom_id"] for each in found}


def stored(home: Path) -> int:
    """How many jobs there are in a home folder's own database."""
    import sqlite3

    connection = sqlite3.connect(home / "backchannel.db")
    try:
        count: int = connection.execute("SELECT count(*) FROM jobs").fetchone()[0]
        return count
    finally:
        connection.close()


def test_alone_it_starts_everything_and_leaves_nothing_running(folder: Path) -> None:
    home = folder / ".backchannel"
    run = Run(folder, {**os.environ})
    run.write(*({"prompt": f"Say {n}"} for n in range(10)))
    summary = run("--in-order")
    assert (summary["lines"], summary["done"], summary["failed"]) == (10, 10, 0)
    assert summary["model"] == "echo:echo-1"
    assert summary["flower_url"]
    said = [each["response"]["body"]["choices"][0]["message"]["content"] for each in run.results()]
    assert said == [f"Say {n}" for n in range(10)]
    usage = [each["response"]["body"]["usage"] for each in run.results()]
    assert summary["output_tokens"] == sum(each["completion_tokens"] for each in usage)
    assert "echo:echo-1: it is offline" in (folder / "err").read_text()
    assert not (home / "up.json").exists()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(summary["api_url"])

    before = run.results()
    again = run()
    assert (again["done"], again["skipped"], again["api_url"]) == (0, 10, None)  # nothing started
    (folder / "in.results.jsonl").unlink()
    assert run("--in-order")["done"] == 10
    assert run.results() == before  # the same jobs: nothing is done twice
    assert stored(home) == 10


def test_good_lines_are_answered_and_every_other_one_is_named(run: Run, stack: Stack) -> None:
    run.write(
        *prompts(5),
        b"{not json",
        {"prompt": "x", "custom_id": "p0"},
        {"prompt": "refused by the provider", "custom_id": "f", "model": "openai:status-400"},
        {"prompt": "refused at the door", "custom_id": "g", "model": "groq:x"},
    )
    summary = run(code=1)
    assert (summary["done"], summary["failed"], summary["bad"]) == (5, 4, 2)
    assert answered(run.results()) == {f"p{n}" for n in range(5)}
    found = run.errors()
    assert [each["error"]["line"] for each in found if each["error"]] == [6, 7]
    refused = {each["custom_id"]: each["response"] for each in found if each["response"]}
    assert refused["f"]["body"]["error"]["code"] == "invalid_request"
    assert refused["f"]["request_id"].startswith("job_")
    assert refused["g"]["status_code"] == 400
    assert refused["g"]["body"]["error"]["code"] == "provider_key_missing"
    books = stack.usage()
    assert (books["input_tokens"], books["output_tokens"]) == (
        summary["input_tokens"],
        summary["output_tokens"],
    )


def test_strict_sends_nothing_when_a_line_is_bad(run: Run, stack: Stack) -> None:
    run.write(*prompts(3), {"prompt": 7})
    process = run.start("in.jsonl", "--strict")
    assert process.wait(RUN_S) == 2
    assert "Line 4: prompt: " in (run.folder / "err").read_text()
    assert stack.calls() == []


def test_what_failed_is_sent_again_only_when_asked(run: Run, stack: Stack) -> None:
    run.write(*prompts(2), *prompts(3, "openai:flaky-2-400")[2:])
    assert run(code=1)["failed"] == 1
    assert run(code=1)["skipped"] == 2
    assert len(stack.calls()) == 3  # the second run found the job that failed
    assert run("--retry-failed", code=1)["failed"] == 1
    summary = run("--retry-failed")
    assert (summary["done"], summary["failed"]) == (1, 0)
    assert run.errors() == []
    assert not (run.folder / "in.errors.jsonl").exists()
    assert answered(run.results()) == {"p0", "p1", "p2"}
    assert len(stack.calls()) == 5


def test_a_line_that_changed_is_answered_anew(run: Run) -> None:
    run.write(*prompts(3))
    run()
    changed = prompts(3)
    changed[1]["prompt"] = "something else"
    run.write({"prompt": "new", "custom_id": "new", "model": "openai:ok-t4"}, *changed)
    summary = run("--in-order")
    assert (summary["done"], summary["skipped"]) == (2, 2)
    assert [each["custom_id"] for each in run.results()] == ["new", "p0", "p1", "p2"]


def test_what_echo_repeated_is_asked_again_once_a_real_model_is_meant(
    run: Run, stack: Stack
) -> None:
    run.write(*[{"prompt": f"number {n}", "custom_id": f"p{n}"} for n in range(3)])
    run("--model", "echo:echo-1")
    assert run("--model", "echo:echo-1")["skipped"] == 3
    summary = run("--model", "openai:ok-t4")
    assert (summary["done"], summary["skipped"]) == (3, 0)
    assert {each["response"]["body"]["model"] for each in run.results()} == {"openai:ok-t4"}
    assert run("--model", "openai:ok-t4")["skipped"] == 3
    assert run("--model", "echo:echo-1")["skipped"] == 3, "never the other way round"
    assert len(stack.calls()) == 3


def test_stdin_is_a_file_too(run: Run) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "backchannel", "run", "-", "--model", "openai:ok-t2"],
        cwd=run.folder,
        env=run.env,
        input=b'{"prompt": "Hello"}\n',
        capture_output=True,
        timeout=RUN_S,
        check=True,
    )
    [result] = run.results("stdin.results.jsonl")
    assert result["response"]["body"]["model"] == "openai:ok-t2"
    assert b"1 done, 0 failed" in said.stdout
    assert b"\x1b" not in said.stdout + said.stderr


def test_an_api_that_dies_and_comes_back_costs_nothing(run: Run, stack: Stack) -> None:
    run.write(*prompts(60, "openai:ok-t4-d50"))
    process = run.start("in.jsonl")
    run.until(lambda: len(run.results()) > 5)
    [api] = [each for each in stack.processes if b"api" in _words(each)]
    api.kill()
    api.wait()
    time.sleep(1)
    port = stack.url.rpartition(":")[2]
    stack._spawn("api", "backchannel", "api", "--port", port)
    assert process.wait(RUN_S) == 0
    assert answered(run.results()) == {f"p{n}" for n in range(60)}
    assert len(stack.calls()) == 60


def test_a_run_that_was_killed_goes_on_where_it_was(run: Run, stack: Stack) -> None:
    run.write(*prompts(80, "openai:ok-t4-d50"))
    process = run.start("in.jsonl")
    run.until(lambda: len(run.results()) > 5)
    process.kill()
    process.wait()
    file = run.folder / "in.results.jsonl"
    os.truncate(file, file.stat().st_size - 20)  # as if it had been killed in the middle of a line
    run()
    assert answered(run.results()) == {f"p{n}" for n in range(80)}
    assert len(run.results()) == 80
    assert len(stack.calls()) == 80


def test_ctrl_c_stops_sending_and_says_how_to_go_on(run: Run, stack: Stack) -> None:
    run.write(*prompts(40, "openai:ok-t10-d100"))
    process = run.start("in.jsonl")
    run.until(lambda: len(stack.calls()) > 5)
    process.send_signal(signal.SIGINT)
    assert process.wait(RUN_S) == 130
    said = (run.folder / "out").read_text()
    assert "What was sent is stored and goes on. Go on with: backchannel run in.jsonl" in said
    run()
    assert answered(run.results()) == {f"p{n}" for n in range(40)}
    assert len(stack.calls()) == 40


def _words(process: subprocess.Popen[bytes]) -> list[bytes]:
    if process.poll() is not None:
        return []
    return Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
