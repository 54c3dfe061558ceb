"""Secrets at rest: sealed for the database with the installation's master key, and opened again."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from backchannel.errors import SetupError
from backchannel.settings import Settings

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

FILE = "master.key"


def seal(settings: Settings, text: str) -> bytes:
    """Encrypt a secret with the newest master key.

    Raises:
        SetupError: The master key cannot be used.
    """
    from cryptography.fernet import MultiFernet

    return MultiFernet(_keys(settings, make=True)).encrypt(text.encode())


def unseal(settings: Settings, data: bytes) -> str:
    """Decrypt a secret with whichever master key it was sealed with.

    Raises:
        SetupError: It was sealed with a key that is not here.
    """
    from cryptography.fernet import InvalidToken, MultiFernet

    try:
        return MultiFernet(_keys(settings, make=False)).decrypt(bytes(data)).decode()
    except InvalidToken as error:
        raise SetupError(
            "A secret in the database was sealed with another master key. Give every process the "
            f"same BACKCHANNEL_MASTER_KEY, or the same {FILE} in its home folder."
        ) from error


def _keys(settings: Settings, *, make: bool) -> list[Fernet]:
    from cryptography.fernet import Fernet

    text = settings.master_key.get_secret_value() or _of_file(settings.home_path / FILE, make)
    try:
        return [Fernet(key.strip()) for key in text.split(",")]
    except ValueError as error:
        raise SetupError(
            f"The master key (BACKCHANNEL_MASTER_KEY, or {FILE} in the home folder) is not 32 "
            "bytes in URL-safe base64. Make one: openssl rand -base64 32 | tr +/ -_"
        ) from error


def _of_file(path: Path, make: bool) -> str:
    if make and not path.exists():
        _make(path)
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise SetupError(
            f"There is no master key: {path} cannot be read. Set BACKCHANNEL_MASTER_KEY to the one "
            "that the database's secrets were sealed with."
        ) from error


def _make(path: Path) -> None:
    from cryptography.fernet import Fernet

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{FILE}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(Fernet.generate_key())
            file.flush()
            os.fsync(file.fileno())
        # a link appears with its whole content, and not over one that another process made
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
    finally:
        part.unlink(missing_ok=True)
