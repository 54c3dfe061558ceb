"""What runs in a home folder: ``up.json`` says where, a lock says that it does."""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from backchannel.cli.screen import Failure
from backchannel.settings import Settings


@dataclass(frozen=True)
class Running:
    """A stack that `backchannel up` started and that still runs."""

    pid: int
    api_url: str
    flower_url: str | None


def read_running(settings: Settings) -> Running | None:
    """The stack of this home folder, if its process is alive."""
    try:
        found = Running(**json.loads(_file(settings).read_bytes()))
        os.kill(found.pid, 0)
    except (OSError, ValueError, TypeError):
        return None
    return found


def write_running(settings: Settings, running: Running) -> None:
    """Say where the stack is; readers see the whole file or none."""
    part = _file(settings).with_suffix(".part")
    part.write_text(json.dumps(asdict(running)))
    part.replace(_file(settings))


def forget_running(settings: Settings) -> None:
    """The stack has gone."""
    _file(settings).unlink(missing_ok=True)


@contextmanager
def only_one(settings: Settings) -> Iterator[None]:
    """Hold the home folder's lock: two stacks in one folder would fight over everything.

    Raises:
        Failure: Another stack holds it.
    """
    settings.home_path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (settings.home_path / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            running = read_running(settings)
            where = (
                f": its API is at {running.api_url}, its process {running.pid}" if running else ""
            )
            raise Failure(
                f"Backchannel already runs in {settings.home_path}{where}. Use it as it is, stop "
                "it with Ctrl-C where it runs, or set BACKCHANNEL_HOME to another folder."
            ) from None
        forget_running(settings)
        try:
            yield
        finally:
            forget_running(settings)


def _file(settings: Settings) -> Path:
    return settings.home_path / "up.json"


def is_loopback(url_or_host: str) -> bool:
    """Whether only this machine can be meant."""
    host = urlsplit(url_or_host).hostname if "://" in url_or_host else url_or_host
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"


def choose_port(host: str, port: int, option: str) -> int:
    """The port asked for, or a free one for 0.

    Raises:
        Failure: Somebody listens there; the sentence has a free port to type instead.
    """
    if is_free(host, port):
        return port or _free_port(host)
    nearby = range(port + 1, min(port + 100, 65_536))
    other = next((each for each in nearby if is_free(host, each)), 0) or _free_port(host)
    raise Failure(f"Port {port} is in use. Type: {option} {other}", 2)


def is_free(host: str, port: int) -> bool:
    """Whether nobody listens there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            probe.bind((host, port))
            return True
    return False


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
