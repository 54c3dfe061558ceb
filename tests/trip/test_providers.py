"""Providers of one's own, by the command line, on an installation of several processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from tests.servers import free_port
from tests.trip.stack import ROOT, Stack


class Shell:
    """Types commands as a user of this installation."""

    def __init__(self, stack: Stack) -> None:
        self._env = stack.env | {"BACKCHANNEL_API_URL": stack.url}

    def __call__(self, *words: str, stdin: str = "", code: int = 0, out: bool = False) -> str:
        """What a command prints on stdout, or where it fails on stderr."""
        done = subprocess.run(
            [sys.executable, "-m", "backchannel", *words],
            cwd=ROOT,
            env=self._env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done.stderr if code and not out else done.stdout

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--json"))


@pytest.fixture
def busy(new_stack: Callable[..., Stack], database_url: str) -> Stack:
    """Two API and two worker processes."""
    stack = new_stack(database_url, BACKCHANNEL_FIRST_BYTE_S="2")
    for start in (stack.api, stack.api, stack.worker, stack.worker):
        start()
    return stack


@pytest.mark.timeout(300)
def test_from_adding_one_to_resetting_all(busy: Stack) -> None:
    type_ = Shell(busy)
    url = busy.fake()
    made = json.loads(
        type_("providers", "add", "Attic", "--url", f"{url}/v1", "--model", "ok", "--json")
    )
    assert (made["id"], made["allow_loopback"]) == ("attic", True)
    again = ("providers", "add", "attic!", "--url", url, "--model", "x")
    assert "a provider 'attic' already" in type_(*again, code=1)
    assert "attic:ok answered in" in type_("providers", "test", "attic")
    assert type_("providers", "discover", "attic", "--save") == "attic:ok\n"
    assert type_("providers", "show", "attic").count("models") == 1
    jobs = [busy.post("attic:ok", f"number {n}") for n in range(20)]
    assert {busy.finished(job["id"])["state"] for job in jobs} == {"succeeded"}

    streaming = busy.post("attic:ok-t40-d100")
    while busy.job(streaming["id"], wait=0.1)["state"] == "queued":
        pass
    moved = busy.fake()
    type_("providers", "edit", "attic", "--url", f"{moved}/v1", "--can", "images")
    jobs = [busy.post("attic:ok", f"moved {n}") for n in range(20)]
    done = [busy.finished(job["id"]) for job in jobs]
    assert {job["state"] for job in done} == {"succeeded"}
    assert {job["attempt"] for job in done} == {1}
    assert busy.finished(streaming["id"])["attempt"] == 1, "it finished on the old client"
    listed = type_.json("providers", "list")
    assert [each["kind"] for each in listed["processes"]] == ["api", "worker", "worker"]
    calls = {entry["pid"] for entry in busy.calls()}
    assert len(calls) == 2, "the old server and the new one"

    limits = ("--requests-per-minute", "6000", "--concurrency", "9")
    assert type_.json("providers", "edit", "attic", *limits)["limits"]["concurrency"] == 9
    type_("providers", "edit", "attic", "--concurrency", "0")
    shown = type_("providers", "show", "attic")
    assert "requests_per_minute 6000\n" in shown
    assert busy.finished(busy.post("attic:ok", "limited")["id"])["attempt"] == 1

    type_("providers", "reset", stdin="n\n", code=130)
    assert type_.json("providers", "list")["data"][-1]["id"] == "attic"
    type_("providers", "reset", "--yes")
    answer = httpx2.post(f"{busy.url}/v1/jobs", json={"model": "attic:ok", "prompt": "Hi"})
    assert answer.json()["error"]["code"] == "provider_not_found"


def test_every_process_comes_to_run_the_new_version_without_a_job(busy: Stack) -> None:
    type_ = Shell(busy)
    type_("providers", "add", "Attic", "--url", "https://llm.example.com/v1", "--model", "x")
    for _ in range(300):
        listed = httpx2.get(f"{busy.url}/v1/providers", timeout=10).json()
        if {each["version"] for each in listed["processes"]} == {listed["version"]} == {1}:
            return
        time.sleep(0.1)
    pytest.fail(str(listed))


@pytest.mark.parametrize(
    ("model", "code", "said"),
    [
        ("status-401", "auth", "as asked"),
        ("status-404", "invalid_request", "as asked"),
        ("html", "malformed", "Provider 'attic'"),
        ("badjson", "malformed", "Provider 'attic'"),
        ("bigtext", "answer_too_large", "8388608 bytes"),
        ("mute", "stalled", "No content within the deadline"),
        ("drop", "disconnected", "closed the connection"),
    ],
)
def test_what_happened_in_words(stack: Stack, model: str, code: str, said: str) -> None:
    stack.env["BACKCHANNEL_FIRST_BYTE_S"] = "2"
    stack.worker()
    type_ = Shell(stack)
    url = stack.fake()
    type_("providers", "add", "Attic", "--url", f"{url}/v1", "--model", model)
    found = json.loads(type_("providers", "test", "attic", "--json", code=1, out=True))
    assert (found["ok"], found["code"]) == (False, code), found
    assert said in found["message"]
    job = stack.finished(found["job"])
    assert job["state"] in ("failed", "cancelled")


def test_a_server_that_is_not_there(stack: Stack) -> None:
    stack.worker()
    type_ = Shell(stack)
    url = f"http://127.0.0.1:{free_port()}/v1"
    type_("providers", "add", "Attic", "--url", url, "--model", "x")
    assert f"Provider 'attic' cannot be reached at {url}" in type_(
        "providers", "test", "attic", code=1
    )
    assert "cannot be reached" in type_("providers", "discover", "attic", code=1)


@pytest.mark.timeout(240)
def test_keys_by_the_command_line(stack: Stack) -> None:
    stack.worker()
    type_ = Shell(stack)
    own = {"name": "Attic", "base_url": f"{stack.fake()}/v1", "default_model": "echo"}
    own |= {"needs_key": True, "allow_loopback": True}
    assert httpx2.post(f"{stack.url}/v1/providers", json=own).status_code == 201
    for key in ("sk-first-0123456789", "sk-second-0123456789"):
        said = type_("keys", "set" if "first" in key else "rotate", "attic", stdin=f"{key}\n")
        assert key not in said
        job = stack.finished(stack.post("attic:echo")["id"])
        assert f"Bearer {key}" in job["message"]["content"]
    type_("keys", "rotate", "--master")
    assert stack.finished(stack.post("attic:echo")["id"])["state"] == "succeeded"
    type_("keys", "remove", "attic")
    answer = httpx2.post(f"{stack.url}/v1/jobs", json={"model": "attic", "prompt": "Hi"})
    job = answer.json()
    if answer.status_code == 202:  # within the 2 s before the API looks again
        job = stack.finished(job["id"])
    assert job["error"]["code"] == "provider_key_missing"
