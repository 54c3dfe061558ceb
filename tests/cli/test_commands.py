"""Commands that look at an installation: doctor, worker --check, flower."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from backchannel.cli.main import answer
from backchannel.db import HEAD, Database
from backchannel.lifecycle import sign_on
from tests.servers import free_port


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder that is not there yet, and no API."""
    monkeypatch.setenv("BACKCHANNEL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BACKCHANNEL_API_URL", "http://127.0.0.1:1")
    return tmp_path / "home"


def checks(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """What doctor found, by name."""
    return {each["what"]: each for each in json.loads(capsys.readouterr().out)["checks"]}


def test_a_fresh_installation_is_healthy_and_nothing_is_made_by_asking(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GROQ_API_KEY", "gsk-test")
    assert answer(["doctor", "--json"]) == 0
    found = checks(capsys)
    assert not home.exists()
    assert {"python", "home", "redis", "database", "api", "workers", "echo"} <= found.keys()
    assert not found["api"]["ok"]
    assert found["groq"]["ok"]
    assert not found["openai"]["ok"]
    assert "OPENAI_API_KEY=…" in found["openai"]["advice"]


def test_doctor_is_plain_and_fails_when_something_needed_is_broken(
    home: Path,
    redis_url: str,
    sqlite_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BACKCHANNEL_REDIS_URL", redis_url)
    monkeypatch.setenv("BACKCHANNEL_DATABASE_URL", sqlite_url)
    assert answer(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "✓ redis      Valkey 9." in said
    assert f"✓ database   SQLite, revision {HEAD}" in said
    assert "\x1b" not in said
    monkeypatch.setenv("BACKCHANNEL_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("BACKCHANNEL_DATABASE_URL", "postgresql://127.0.0.1:1/none")
    from backchannel.settings import get_settings

    get_settings.cache_clear()
    assert answer(["doctor", "--json"]) == 1
    found = checks(capsys)
    assert not found["redis"]["ok"]
    assert not found["database"]["ok"]
    assert "BACKCHANNEL_DATABASE_URL" in found["database"]["advice"]


def test_worker_check_wants_a_fresh_heartbeat_of_this_host(
    home: Path,
    database: Database,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BACKCHANNEL_DATABASE_URL", database_url)
    assert answer(["worker", "--check"]) == 1
    assert "Type: backchannel worker" in capsys.readouterr().err
    database.write_now(lambda c: sign_on(c, "elsewhere", "another-host", 1, 10))
    assert answer(["worker", "--check"]) == 1
    database.write_now(lambda c: sign_on(c, "here", socket.gethostname(), 1, 10))
    assert answer(["worker", "--check"]) == 0
    database.write_now(lambda c: c.exec_driver_sql("UPDATE workers SET seen_ms = seen_ms - 60000"))
    assert answer(["worker", "--check"]) == 1


@pytest.fixture
def flower(home: Path, redis_url: str) -> Iterator[Callable[..., str]]:
    """Start Flower on the test's Valkey, on its unix socket; further variables by name."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*options: str, **environment: str) -> str:
        port = free_port()
        words = ["flower", "--port", str(port), *options]
        process = subprocess.Popen(
            [sys.executable, "-m", "backchannel", *words],
            env={**os.environ, "BACKCHANNEL_REDIS_URL": redis_url, **environment},
            stderr=subprocess.DEVNULL,
        )
        processes.append(process)
        url = f"http://127.0.0.1:{port}"
        give_up = time.monotonic() + 60
        while True:
            try:
                assert httpx2.get(f"{url}/healthcheck", timeout=5).status_code == 200
                return url
            except httpx2.TransportError:
                assert process.poll() is None
                assert time.monotonic() < give_up
                time.sleep(0.1)

    yield start
    for process in processes:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_flower_shows_and_does_not_touch(flower: Callable[..., str]) -> None:
    url = flower()
    assert httpx2.get(f"{url}/workers", timeout=10).status_code == 200
    assert httpx2.get(f"{url}/api/tasks", timeout=10).json() == {}
    lengths = httpx2.get(f"{url}/api/queues/length", timeout=10).json()["active_queues"]
    assert {queue["name"]: queue["messages"] for queue in lengths} == {"interactive": 0, "batch": 0}
    for path in ("worker/shutdown/x", "task/revoke/x", "task/async-apply/backchannel.run_chat"):
        assert httpx2.post(f"{url}/api/{path}", json={}, timeout=10).status_code == 403


def test_flower_with_a_password_asks_for_it_and_leaves_the_probes_open(
    flower: Callable[..., str],
) -> None:
    url = flower("--host", "0.0.0.0", FLOWER_PASSWORD="open sesame")
    assert httpx2.get(f"{url}/workers", timeout=10).status_code == 401
    assert httpx2.get(f"{url}/api/tasks", timeout=10).status_code == 401
    assert httpx2.get(f"{url}/metrics", timeout=10).status_code == 200
    secret = base64.b64encode(b"admin:open sesame").decode()
    headers = {"Authorization": f"Basic {secret}"}
    assert httpx2.get(f"{url}/workers", headers=headers, timeout=10).status_code == 200
