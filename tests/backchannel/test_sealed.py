"""Secrets at rest: who has the master key reads them, nobody else does."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from backchannel.errors import SetupError
from backchannel.sealed import FILE, seal, unseal
from backchannel.settings import Settings

SECRET = "sk-canary-0123456789"
OLD, NEW = Fernet.generate_key().decode(), Fernet.generate_key().decode()


def settings(home: Path, *master: str) -> Settings:
    return Settings(home=home, master_key=SecretStr(",".join(master)) if master else None)


def test_the_first_use_makes_a_key_that_only_its_owner_reads(tmp_path: Path) -> None:
    here = settings(tmp_path / "new")
    sealed = seal(here, SECRET)
    assert SECRET.encode() not in sealed
    assert unseal(here, sealed) == SECRET
    file = tmp_path / "new" / FILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == [FILE]


def test_of_many_that_make_one_at_once_all_have_the_same(tmp_path: Path) -> None:
    here, sealed = settings(tmp_path), list[bytes]()
    together = threading.Barrier(8)

    def work() -> None:
        together.wait()
        sealed.append(seal(here, SECRET))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [unseal(here, each) for each in sealed] == [SECRET] * 8


def test_the_first_of_several_seals_and_all_open(tmp_path: Path) -> None:
    before = seal(settings(tmp_path, OLD), SECRET)
    both = settings(tmp_path, NEW, OLD)
    assert unseal(both, before) == SECRET
    after = seal(both, SECRET)
    assert unseal(settings(tmp_path, NEW), after) == SECRET
    with pytest.raises(SetupError, match="another master key"):
        unseal(settings(tmp_path, OLD), after)
    assert not (tmp_path / FILE).exists()


def test_without_the_key_it_says_what_to_set(tmp_path: Path) -> None:
    sealed = seal(settings(tmp_path, OLD), SECRET)
    with pytest.raises(SetupError, match="There is no master key"):
        unseal(settings(tmp_path), sealed)
    assert not (tmp_path / FILE).exists(), "reading makes no key"


@pytest.mark.parametrize("wrong", ["", "secret", "a,b", "x" * 44])
def test_what_is_no_key_is_refused_without_showing_it(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(SetupError, match="is no master key") as error:
        seal(settings(tmp_path, wrong or ","), SECRET)
    assert not wrong or wrong not in error.value.message


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    seal(settings(tmp_path), SECRET)
    (tmp_path / FILE).chmod(0o640)
    with pytest.raises(SetupError, match="chmod 600"):
        seal(settings(tmp_path), SECRET)
