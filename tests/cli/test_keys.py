"""``backchannel keys``: what it stores, what it refuses, and that it never shows a key."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from backchannel.cli.main import answer
from backchannel.db import Database
from backchannel.sealed import unseal
from backchannel.settings import Settings, get_settings
from tests.makers import rows

KEY = "sk-canary-0123456789"


@pytest.fixture(autouse=True)
def _home(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCHANNEL_HOME", str(tmp_path))
    monkeypatch.setenv("BACKCHANNEL_DATABASE_URL", database_url)
    get_settings.cache_clear()


def typed(monkeypatch: pytest.MonkeyPatch, *words: str, stdin: str = "") -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    return answer(["keys", *words])


def test_a_key_is_stored_sealed_replaced_and_removed(
    database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, "set", "groq", stdin=f"{KEY}\n") == 0
    (row,) = rows(database, "secrets")
    assert row["name"] == "provider:groq"
    assert KEY not in str(row)
    assert unseal(Settings(), bytes(row["sealed"])) == KEY
    assert typed(monkeypatch, "set", "groq", stdin="other") == 1
    assert "backchannel keys rotate groq" in capsys.readouterr().err
    assert typed(monkeypatch, "rotate", "groq", stdin="other") == 0
    (row,) = rows(database, "secrets")
    assert unseal(Settings(), bytes(row["sealed"])) == "other"
    assert typed(monkeypatch, "remove", "groq") == 0
    assert rows(database, "secrets") == []
    assert typed(monkeypatch, "remove", "groq") == 1
    assert [each["version"] for each in rows(database, "versions")] == [4]
    said = capsys.readouterr()
    assert KEY not in said.out + said.err


@pytest.mark.parametrize("wrong", ["", "\n", "two\nlines", "ü", "x" * 5000])
def test_what_is_no_key_is_refused_and_not_shown(
    wrong: str,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert typed(monkeypatch, "set", "groq", stdin=wrong) == 2
    assert "Nothing was stored" in capsys.readouterr().err
    assert rows(database, "secrets") == []


def test_whose_key_must_be_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, "set", "nobody", stdin=KEY) == 1
    assert "There is no provider 'nobody'" in capsys.readouterr().err
    assert typed(monkeypatch, "rotate") == 2
    assert typed(monkeypatch, "rotate", "groq", "--master") == 2
    assert typed(monkeypatch, "rotate", "groq", stdin=KEY) == 1


def test_the_list_says_where_each_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mounted").write_text(KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("BACKCHANNEL_PROVIDERS__GEMINI__API_KEY_FILE", str(tmp_path / "mounted"))
    monkeypatch.setenv("BACKCHANNEL_PROVIDERS__ANTHROPIC__API_KEY", KEY)
    get_settings.cache_clear()
    assert typed(monkeypatch, "set", "groq", stdin=KEY) == 0
    assert typed(monkeypatch, "set", "openai", stdin=KEY) == 0
    assert "(environment)" in capsys.readouterr().err, "what goes before it is said"
    assert typed(monkeypatch, "list", "--json") == 0
    said = capsys.readouterr().out
    assert KEY not in said
    found = {each["provider"]: each for each in json.loads(said)["data"]}
    assert {name: each["source"] for name, each in found.items()} == {
        "anthropic": "settings",
        "openai": "environment",
        "groq": "stored",
        "gemini": "file",
        "ollama": None,
        "lmstudio": None,
        "echo": None,
    }
    assert found["groq"]["stored_at"]
    assert found["openai"]["stored_at"]


def test_all_are_sealed_again_with_a_new_master_key(
    database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from cryptography.fernet import Fernet

    assert typed(monkeypatch, "set", "groq", stdin=KEY) == 0
    old, new = (tmp_path / "master.key").read_text(), Fernet.generate_key().decode()
    monkeypatch.setenv("BACKCHANNEL_MASTER_KEY", f"{new},{old}")
    get_settings.cache_clear()
    assert typed(monkeypatch, "rotate", "--master") == 0
    monkeypatch.setenv("BACKCHANNEL_MASTER_KEY", new)
    (row,) = rows(database, "secrets")
    assert unseal(Settings(), bytes(row["sealed"])) == KEY
