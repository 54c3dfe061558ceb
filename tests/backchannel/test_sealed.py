"""Secrets at rest: one master key however many processes start, and any of several opens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from backchannel.errors import SetupError
from backchannel.sealed import seal, unseal
from backchannel.settings import Settings

ROOT = Path(__file__).parents[2]


def with_keys(*keys: bytes) -> Settings:
    return Settings(master_key=SecretStr(",".join(key.decode() for key in keys)))


def test_the_key_of_the_home_folder_is_made_once_and_for_its_owner(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    sealed = seal(settings, "whsec_ü")
    assert b"whsec" not in sealed
    assert unseal(settings, sealed) == "whsec_ü"
    (file,) = (tmp_path / "home").iterdir()
    assert file.name == "master.key"
    assert file.stat().st_mode & 0o777 == 0o600
    before = file.read_bytes()
    assert unseal(settings, seal(settings, "again")) == "again"
    assert file.read_bytes() == before
    assert "whsec" not in repr(settings)


def test_processes_that_start_together_make_one_key(tmp_path: Path) -> None:
    code = (
        "from backchannel.sealed import seal; from backchannel.settings import Settings;"
        "import sys; sys.stdin.read(); print(seal(Settings(), 'x').decode())"
    )
    env = {**os.environ, "BACKCHANNEL_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(4)
    ]
    sealed = [each.communicate()[0].strip() for each in processes]
    assert [unseal(Settings(home=tmp_path), each) for each in sealed] == ["x"] * 4
    assert [each.name for each in tmp_path.iterdir()] == ["master.key"]


def test_a_key_is_rotated_by_putting_a_new_one_before_it() -> None:
    old, new = Fernet.generate_key(), Fernet.generate_key()
    sealed = seal(with_keys(old), "x")
    assert unseal(with_keys(new, old), sealed) == "x"
    assert Fernet(new).decrypt(seal(with_keys(new, old), "y")) == b"y"
    with pytest.raises(SetupError, match="another master key"):
        unseal(with_keys(new), sealed)


def test_a_key_that_cannot_be_one_and_a_key_that_is_not_there_are_said(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="openssl rand"):
        seal(with_keys(b"short"), "x")
    with pytest.raises(SetupError, match="There is no master key"):
        unseal(Settings(home=tmp_path), b"x")
    assert list(tmp_path.iterdir()) == []
