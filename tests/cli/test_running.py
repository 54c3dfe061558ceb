"""What runs in a home folder, and which ports are left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from backchannel.cli.client import api_url
from backchannel.cli.running import (
    Running,
    choose_port,
    is_loopback,
    only_one,
    read_running,
    write_running,
)
from backchannel.cli.screen import Failure
from backchannel.settings import Settings


def test_a_stack_says_where_it_is_while_it_runs(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    running = Running(os.getpid(), "http://127.0.0.1:4711", None)
    with only_one(settings):
        assert api_url(settings) == "http://127.0.0.1:8000"
        write_running(settings, running)
        assert read_running(settings) == running
        assert api_url(settings) == "http://127.0.0.1:4711"
        assert api_url(Settings(home=tmp_path, api_url="http://queue/")) == "http://queue"
    assert read_running(settings) is None


def test_what_a_killed_stack_left_behind_is_not_believed(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_running(settings, Running(gone.pid, "http://127.0.0.1:4711", None))
    assert read_running(settings) is None
    (tmp_path / "up.json").write_text("{")
    assert read_running(settings) is None


def test_a_second_stack_in_the_same_home_is_told_where_the_first_is(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    with only_one(settings):
        write_running(settings, Running(os.getpid(), "http://127.0.0.1:4711", None))
        with pytest.raises(Failure, match=r"its API is at http://127\.0\.0\.1:4711"):
            only_one(settings).__enter__()
        assert read_running(settings) is not None
    with only_one(settings):
        pass


def test_a_port_in_use_comes_with_a_free_one_to_type() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Failure, match=rf"Port {port} is in use\. Type: --port \d+") as failure:
            choose_port("127.0.0.1", port, "--port")
    assert failure.value.code == 2
    assert choose_port("127.0.0.1", port, "--port") == port
    assert choose_port("127.0.0.1", 0, "--port") > 0


@pytest.mark.parametrize(
    ("place", "here"),
    [
        ("127.0.0.1", True),
        ("http://127.0.0.2:8000", True),
        ("http://localhost:8000", True),
        ("http://[::1]:8000", True),
        ("0.0.0.0", False),
        ("https://127.0.0.1.example.com", False),
    ],
)
def test_loopback_is_known_in_every_spelling(place: str, here: bool) -> None:
    assert is_loopback(place) is here
