"""The embedded Redis: where it listens, that it keeps what it has, and which versions will do."""

from __future__ import annotations

import contextlib
import os
import socketserver
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backchannel.cli import valkey
from backchannel.errors import SetupError, Unavailable
from backchannel.settings import Settings
from tests.servers import Valkey


@pytest.fixture
def settings(valkey_server: Valkey, tmp_path: Path) -> Settings:
    """Of a home whose path is short enough for a socket."""
    folder = valkey_server.folder / tmp_path.name
    folder.mkdir()
    return Settings(home=folder)


@contextlib.contextmanager
def started(settings: Settings) -> Iterator[Path]:
    """The server of a home folder; killed hard at the end."""
    child = valkey.child(settings, rank=0)
    path = valkey.socket_of(settings)
    assert child is not None
    assert path is not None
    process = subprocess.Popen(child.command, stdout=subprocess.DEVNULL)
    try:
        give_up = time.monotonic() + 30
        while not valkey.answers(path):
            assert time.monotonic() < give_up
            time.sleep(0.01)
        yield path
    finally:
        process.kill()
        process.wait()


def test_it_listens_on_a_socket_of_this_users_only_and_keeps_what_it_has(
    settings: Settings,
) -> None:
    with started(settings) as path:
        assert path == settings.home_path / "valkey.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert valkey.say(path, "CONFIG GET port").startswith("*2")
        assert valkey.say(path, "SET kept yes") == "+OK"
        assert valkey.check_redis(settings).startswith("Valkey 9.")
        time.sleep(1.1)  # fsync every second
    assert not valkey.answers(path)
    with started(settings) as path:
        assert valkey.say(path, "EXISTS kept") == ":1"


def test_a_server_that_already_answers_is_used_as_it_is(settings: Settings) -> None:
    with started(settings):
        again = valkey.child(settings, rank=0)
        assert again is not None
        assert again.already_served is not None
        assert again.already_served()
    assert not again.already_served()


def test_a_named_redis_is_not_ours_to_start(redis_url: str) -> None:
    assert valkey.child(Settings(redis_url=redis_url), rank=0) is None


@pytest.mark.parametrize("home", ["x" * 90, "with space", "ümlaut", "100%"])
def test_a_home_that_cannot_hold_a_socket_gets_a_folder_that_can(home: str, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / home)
    path = valkey.socket_of(settings)
    assert path is not None
    assert len(os.fsencode(path)) <= 100
    assert not path.is_relative_to(tmp_path)
    assert path == valkey.socket_of(Settings(home=tmp_path / home))
    assert path != valkey.socket_of(Settings(home=tmp_path / f"{home}2"))
    try:
        with started(settings):
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert valkey.check_redis(settings).startswith("Valkey")
        path.parent.chmod(0o755)
        with pytest.raises(SetupError, match="open to others"):
            valkey.prepare(settings)
    finally:
        for file in path.parent.iterdir():
            file.unlink()
        path.parent.rmdir()


class _Old(socketserver.StreamRequestHandler):
    """A Redis of another age: answers HELLO with an error, INFO with its version."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            words = [self._word() for _ in range(int(line[1:]))]
            if words[0].upper() == b"INFO":
                said = b"# Server\r\nredis_version:5.0.7\r\n"
                self.wfile.write(b"$%d\r\n%s\r\n" % (len(said), said))
            else:
                self.wfile.write(b"+OK\r\n")

    def _word(self) -> bytes:
        length = int(self.rfile.readline()[1:])
        return self.rfile.read(length + 2)[:-2]


def test_a_redis_that_is_too_old_is_refused_with_its_version() -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Old) as server:
        thread = threading.Thread(target=server.serve_forever, name="old-redis")
        thread.start()
        url = f"redis://127.0.0.1:{server.server_address[1]}/0?protocol=2"
        with pytest.raises(SetupError, match=r"version 5\.0\.7; Backchannel needs 6\.2"):
            valkey.check_redis(Settings(redis_url=url))
        server.shutdown()
        thread.join()


def test_a_redis_that_does_not_answer_is_named_without_its_password() -> None:
    settings = Settings(redis_url="redis://user:secret@127.0.0.1:1/0")
    with pytest.raises(Unavailable, match="BACKCHANNEL_REDIS_URL") as error:
        valkey.check_redis(settings)
    assert "secret" not in error.value.message
    said: list[str] = []
    valkey.warn_unless_redis(settings, said.append)
    assert "jobs wait in the database" in said[0]
