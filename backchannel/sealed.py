"""Secrets at rest: sealed with the master key, from the environment or a file only its owner reads.

Fernet (https://github.com/fernet/spec): AES-128-CBC with HMAC-SHA256. Of several master keys the
first seals and all open, so one can be replaced while the rest is sealed again.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from backchannel.errors import SetupError
from backchannel.settings import Settings

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet

FILE = "master.key"
MAKE_ONE = "openssl rand -base64 32 | tr '+/' '-_'"


def seal(settings: Settings, text: str) -> bytes:
    """The text, readable with the master key only; the first use makes the key's file.

    Raises:
        SetupError: The master key is not one.
    """
    return _keys(settings, make=True).encrypt(text.encode())


def unseal(settings: Settings, data: bytes) -> str:
    """What was sealed.

    Raises:
        SetupError: There is no master key here, or it is not the one that sealed this.
    """
    from cryptography.fernet import InvalidToken

    try:
        return _keys(settings, make=False).decrypt(data).decode()
    except InvalidToken:
        raise SetupError(
            "It was sealed with another master key. Give every worker, and the shell where keys "
            "are set, the same BACKCHANNEL_MASTER_KEY, or store the key again."
        ) from None


def _keys(settings: Settings, *, make: bool) -> MultiFernet:
    from cryptography.fernet import Fernet, MultiFernet

    file = settings.home_path / FILE
    if settings.master_key is not None:
        name, text = "BACKCHANNEL_MASTER_KEY", settings.master_key.get_secret_value()
    else:
        name, text = str(file), _read(file, make=make)
    try:
        return MultiFernet([Fernet(key.strip()) for key in text.split(",") if key.strip()])
    except ValueError:
        raise SetupError(
            f"{name} is no master key: 32 random bytes in URL-safe base64. Make one: {MAKE_ONE}"
        ) from None


def _read(file: Path, *, make: bool) -> str:
    if make and not file.exists():
        _make(file)
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        if mode & 0o077:
            raise SetupError(f"{file} can be read by others. Type: chmod 600 {file}")
        return file.read_text(encoding="ascii")
    except FileNotFoundError:
        raise SetupError(
            f"There is no master key: neither BACKCHANNEL_MASTER_KEY nor {file}. Set the one that "
            "the keys were stored with."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"The master key {file} cannot be read: {error}") from None


def _make(file: Path) -> None:
    from cryptography.fernet import Fernet

    file.parent.mkdir(parents=True, exist_ok=True)
    # written aside and linked: a process that looks meanwhile sees no file or the whole of it, and
    # of two that make one at once the first stays
    descriptor, draft = tempfile.mkstemp(prefix=f"{FILE}.", dir=file.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as writing:
            writing.write(Fernet.generate_key())
            writing.flush()
            os.fsync(writing.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, file)
    finally:
        os.unlink(draft)
