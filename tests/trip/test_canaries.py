"""Keys and prompts are where they belong, and nowhere else: five canaries of each, and a search.

Keys: nowhere but in the calls to their provider. Not in the database's files, not in what goes
through or lies in Redis (Celery's messages are in it), not in a log at the level debug, not in a
traceback, not in Flower, not in the API's answers. A key that the operator put into the environment
is in the environment of the processes he started so; the ones stored by `backchannel keys` are in
no environment and in no argument. Prompts: in the database, which is where jobs are, and in none of
the other places.
"""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import make_url

from tests.fake_provider import key_of
from tests.servers import free_port
from tests.trip.stack import Stack
from tests.trip.test_providers import Shell

KEYS = {
    "environment": "sk-canary-environment-7d1f",
    "setting": "sk-canary-setting-91aa",
    "file": "sk-canary-file-c04e",
    "stored": "sk-canary-stored-5b3d",
    "rotated": "sk-canary-rotated-e8c2",
}
PROMPTS = [f"canary-prompt-{number}-f3a9" for number in range(5)]


@contextmanager
def monitor(stack: Stack) -> Iterator[list[bytes]]:
    """Everything that goes through Redis meanwhile, command by command."""
    heard: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(stack.valkey.socket))
        connection.sendall(b"MONITOR\r\n")

        def listen() -> None:
            while said := connection.recv(1 << 20):
                heard.append(said)

        thread = threading.Thread(target=listen, name="monitor")
        thread.start()
        try:
            yield heard
        finally:
            connection.shutdown(socket.SHUT_RDWR)
            thread.join()


def environments(stack: Stack) -> bytes:
    """The environment and the arguments of every process that runs."""
    running = [process.pid for process in stack.processes if process.poll() is None]
    places = [Path(f"/proc/{pid}/{what}") for pid in running for what in ("environ", "cmdline")]
    return b"\n".join(place.read_bytes() for place in places)


def until(condition: Callable[[], Any], stack: Stack) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if condition():
                return
        except httpx2.HTTPError:
            pass
        assert time.monotonic() < deadline, stack.logs()
        time.sleep(0.2)


def add_all(stack: Stack, type_: Shell) -> list[str]:
    """Five providers, each with its canary; their ids."""
    url = stack.fake()
    for name in ("setting", "file", "stored", "rotated"):
        own = {"name": name, "base_url": f"{url}/v1", "default_model": "ok"}
        answer = httpx2.post(
            f"{stack.url}/v1/providers", json={**own, "needs_key": True, "allow_loopback": True}
        )
        assert answer.status_code == 201, answer.text
    type_("keys", "set", "stored", stdin=KEYS["stored"])
    type_("keys", "set", "rotated", stdin="sk-canary-before-rotation")
    stack.finished(stack.post("rotated:ok", "first the old one")["id"])
    type_("keys", "rotate", "rotated", stdin=KEYS["rotated"])
    return ["openai", "setting", "file", "stored", "rotated"]


@pytest.mark.timeout(300)
def test_no_canary_is_found_where_it_does_not_belong(
    new_stack: Callable[..., Stack], sqlite_url: str, tmp_path: Path
) -> None:
    (tmp_path / "mounted").mkdir()
    (tmp_path / "mounted" / "key").write_text(KEYS["file"])
    stack = new_stack(
        sqlite_url,
        OPENAI_API_KEY=KEYS["environment"],
        BACKCHANNEL_PROVIDERS__SETTING__API_KEY=KEYS["setting"],
        BACKCHANNEL_PROVIDERS__FILE__API_KEY_FILE=str(tmp_path / "mounted" / "key"),
        BACKCHANNEL_LOG_LEVEL="debug",
        BACKCHANNEL_MAX_RETRIES="0",
        BACKCHANNEL_FIRST_BYTE_S="1",
    )
    stack.api()
    spoil(stack.post("anthropic:ok", PROMPTS[0])["id"], sqlite_url)
    flower_port = free_port()
    stack._spawn("flower", "backchannel", "flower", "--port", str(flower_port))
    flower = f"http://127.0.0.1:{flower_port}"
    until(lambda: httpx2.get(f"{flower}/healthcheck", timeout=5).status_code == 200, stack)
    worker = stack.worker()
    type_ = Shell(stack)
    with monitor(stack) as commands:
        ids = add_all(stack, type_)
        for provider, prompt, key in zip(ids, PROMPTS, KEYS.values(), strict=True):
            stack.finished(stack.post(f"{provider}:ok", prompt)["id"])
            used = [entry["key"] for entry in stack.calls()]
            assert key_of(key) in used
            # and what goes wrong: at the provider, on the way, and in our own hands
            for model in ("status-401", "html", "badjson", "drop", "mute"):
                stack.post(f"{provider}:{model}", prompt)
            httpx2.post(f"{stack.url}/v1/jobs", json={"model": provider, "prompt": prompt, "x": 1})
            httpx2.post(f"{stack.url}/v1/jobs", content=prompt.encode())
            httpx2.post(f"{stack.url}/v1/providers/{provider}/discover", timeout=30)
        until(lambda: len(httpx2.get(f"{flower}/api/tasks", timeout=10).json()) >= 20, stack)
        tasks = httpx2.get(f"{flower}/api/tasks", timeout=10)
        pages = [tasks.content] + [
            httpx2.get(f"{flower}/{page}", timeout=10).content
            for page in ("tasks", "workers", *(f"task/{each}" for each in tasks.json()))
        ]
        answers = [
            httpx2.get(f"{stack.url}/v1/{page}", timeout=10).content
            for page in ("providers", "usage", "models")
        ]
        answers += [type_("keys", "list").encode(), type_("doctor", code=0).encode()]
        about_processes = environments(stack)
        assert stack.valkey.say("CONFIG SET rdbcompression no").startswith("+OK")
        assert stack.valkey.say("SAVE").startswith("+OK")
        worker.send_signal(signal.SIGTERM)
        worker.wait(60)
    logs = b"".join(file.read_bytes() for file in stack.home.glob("*.log"))
    assert b"debug" in logs
    assert b"A job failed by a defect of this software." in logs
    assert b"Traceback" in logs
    assert b"A provider call failed" in logs
    database = b"".join(file.read_bytes() for file in stack.home.glob("backchannel.db*"))
    redis = b"".join(commands) + (stack.valkey.folder / "dump.rdb").read_bytes()
    assert b"PUBLISH" in redis
    assert b"canary-prompt-0" in database, "so the search can find something"
    places = {
        "redis": redis,
        "logs": logs,
        "flower": b"".join(pages),
        "answers": b"".join(answers),
        "processes": about_processes,
    }
    found = {
        (place, canary)
        for place, text in {**places, "database": database}.items()
        for canary in (*KEYS.values(), "sk-canary-before-rotation", *PROMPTS)
        if canary.encode() in text
    }
    prompts_in_database = {("database", prompt) for prompt in PROMPTS}
    assert found - OWN_CHOICE == prompts_in_database


# What the operator gave the processes in their environment himself.
OWN_CHOICE = {("processes", KEYS["environment"]), ("processes", KEYS["setting"])}


def spoil(job_id: str, database_url: str) -> None:
    """Have a job end in a defect: messages that no API would accept."""
    database = make_url(database_url).database
    assert database is not None
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "UPDATE job_requests SET messages = ? WHERE job_id = ?",
            (json.dumps([17, PROMPTS[0]]), job_id),
        )
