"""What a case plays on: fresh servers, and where it asks for them a proxy or a small disk."""

from __future__ import annotations

import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

from sqlalchemy import make_url

from chaos.cases import Case
from chaos.proxy import Proxy
from chaos.world import World
from tests.servers import Postgres, postgres, valkey

SMALL_DISK_MB = 8
LIMIT_S = 300.0  # no quick case takes a minute
FULL_LIMIT_S = 1_500.0  # the longest waits ten minutes for its jobs


class NotPossible(Exception):
    """This machine does not allow what the case needs; the message says what."""


def stage(case: Case, kind: str, home: Path, stack: ExitStack, *, full: bool) -> World:
    """Put up a case's servers and world; the stack takes them down.

    Raises:
        NotPossible: The case cannot be played here.
    """
    broker = stack.enter_context(valkey(tcp=case.through == "broker"))
    server = stack.enter_context(postgres()) if kind == "postgresql" else None
    folder = _small_disk(home, stack) if case.small_disk else home
    url = server.create("chaos") if server else f"sqlite:///{folder}/chaos.db"
    settings = dict(case.settings)
    proxy = None
    if case.through == "broker":
        proxy = Proxy(socket.AF_INET, ("127.0.0.1", broker.port))
        settings["BACKCHANNEL_REDIS_URL"] = f"redis://127.0.0.1:{proxy.port}/0"
    elif case.through == "database":
        assert server is not None, "SQLite has no path that could swallow packets"
        proxy = Proxy(socket.AF_UNIX, _socket_of(server))
        settings["BACKCHANNEL_DATABASE_URL"] = (
            make_url(url)
            .set(host="127.0.0.1", port=proxy.port, query={})
            .render_as_string(hide_password=False)
        )
    if proxy is not None:
        stack.callback(proxy.close)
    limit_s = FULL_LIMIT_S if full else LIMIT_S
    world = World(home, broker, server, url, settings, proxy=proxy, limit_s=limit_s)
    stack.callback(world.close)
    return world


def _socket_of(server: Postgres) -> str:
    return str(server.folder / ".s.PGSQL.5432")


def _small_disk(home: Path, stack: ExitStack) -> Path:
    """A file system of a few MB in memory. Only root may mount, and in a container not even root.

    There is no other way to a full disk that holds everywhere: a limit on the size of files
    (RLIMIT_FSIZE) is another error to SQLite, and quotas need a prepared disk.
    """
    folder = home / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_MB}m", "chaos", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NotPossible("There is no mount command to make a small disk with.") from error
    if done.returncode != 0:
        raise NotPossible(f"Making a small disk is not permitted: {done.stderr.strip()}")
    stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
    return folder
