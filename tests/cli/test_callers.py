"""`backchannel callers`: keys made, listed and revoked, and sent by the other commands."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from backchannel.cli.main import answer
from backchannel.settings import Settings
from tests.api.play import serving

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Type a command in an empty home folder; further variables by name."""

    def typed(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "backchannel", *words],
            env={**os.environ, "BACKCHANNEL_HOME": str(tmp_path / "home"), **environment},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    return typed


def test_a_key_is_made_before_anything_runs_and_shown_once(run: Run) -> None:
    made = run("callers", "add", "alice")
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    assert len(key) == 46
    assert "It is the first" in made.stderr
    assert key not in made.stderr
    wishes = ("--scope", "batches", "--model", "groq:*", "--expires", "30d", "--tag", "team=pets")
    other = json.loads(run("callers", "add", "nightly", *wishes, "--json").stdout)
    assert other["key"].startswith(other["prefix"])
    again = run("callers", "add", "alice")
    assert "alice has had 1 before" in again.stderr
    listed = run("callers", "list", "--json").stdout
    assert key not in listed
    assert other["key"] not in listed
    newest, nightly, first = json.loads(listed)["data"]
    assert nightly == {name: value for name, value in other.items() if name != "key"}
    assert nightly["tags"] == {"team": "pets"}
    assert nightly["expires_at"] > nightly["created_at"]
    assert (first["scopes"], first["models"]) == (
        ["jobs:write", "jobs:read", "batches", "usage:read"], None,
    )  # fmt: skip
    table = run("callers", "list").stdout.splitlines()
    assert [row.split("\t")[1] for row in table] == ["NAME", "alice", "nightly", "alice"]

    assert run("callers", "revoke", nightly["id"]).stdout == f"{nightly['id']} revoked.\n"
    both = run("callers", "revoke", "alice")
    assert newest["id"] in both.stdout
    assert first["id"] in both.stdout
    assert "nobody is let in now" in both.stderr
    gone = run("callers", "revoke", "alice")
    assert gone.returncode == 1
    assert "Type: backchannel callers list" in gone.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["al ice"], "is no name"),
        (["alice", "--scope", "jobs"], "Type one of: jobs:write"),
        (["alice", "--model", "gpt-5"], "Type: '*:gpt-5'"),
        (["alice", "--expires", "soon"], "90m, 12h or 30d"),
        (["alice", "--expires", "0d"], "90m, 12h or 30d"),
        (["alice", "--tag", "team"], "Type: --tag team=…"),
    ],
)
def test_what_cannot_be_is_misuse(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("BACKCHANNEL_HOME", str(tmp_path / "home"))
    assert answer(["callers", "add", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


async def test_the_other_commands_send_the_key(run: Run, tmp_path: Path, redis_url: str) -> None:
    key = run("callers", "add", "alice").stdout.strip()
    settings = Settings(home=tmp_path / "home", redis_url=redis_url)
    async with serving(settings) as url, httpx2.AsyncClient(base_url=url) as client:

        async def typed(*words: str, **environment: str) -> Any:
            at = {"BACKCHANNEL_API_URL": url, "BACKCHANNEL_REDIS_URL": redis_url}
            return await asyncio.to_thread(run, *words, **at, **environment)

        asked = {"model": "echo", "prompt": "Hello?"}
        headers = {"x-api-key": key}
        job = (await client.post("/v1/jobs", json=asked, headers=headers)).json()["id"]
        without = await typed("jobs")
        assert without.returncode == 1
        assert "Type: export BACKCHANNEL_API_KEY=bk_…" in without.stderr
        with_it = await typed("jobs", "--json", BACKCHANNEL_API_KEY=key)
        assert [each["id"] for each in json.loads(with_it.stdout)["data"]] == [job]
        assert (await typed("jobs", "cancel", job, BACKCHANNEL_API_KEY=key)).returncode == 0
        file = tmp_path / "one.jsonl"
        file.write_text('{"prompt": "Hello?"}\n')
        words = ["run", str(file), "-o", str(tmp_path / "out.jsonl"), "--model", "echo"]
        refused = await typed(*words)
        assert refused.returncode == 1
        assert "Type: export BACKCHANNEL_API_KEY=bk_…" in refused.stderr
