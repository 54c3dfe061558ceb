"""Every command: its help, its way to fail, and that nothing heavy is loaded to say so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from backchannel import __version__
from backchannel.cli import main
from backchannel.cli.main import answer, app
from backchannel.errors import SetupError

HEAVY = {
    "aiohttp", "alembic", "anthropic", "api", "celery", "cryptography", "fastapi", "flower",
    "httpx2", "openai", "pydantic", "redis", "rich", "sqlalchemy", "sqlmodel", "stamina",
    "structlog", "uvicorn", "workers",
}  # fmt: skip


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, each in getattr(command, "commands", {}).items():
        yield from _commands(each, (*path, name))


COMMANDS = list(_commands(typer.main.get_command(app)))


def test_the_nouns_are_all_there() -> None:
    assert {path[0] for path in COMMANDS if path} == {
        "run", "up", "api", "worker", "flower", "jobs", "sessions", "usage", "providers", "keys",
        "callers", "doctor", "webhooks",
    }  # fmt: skip
    assert {path[1] for path in COMMANDS if path[:1] == ("jobs",) and len(path) > 1} == {
        "show", "cancel", "retry", "watch",
    }  # fmt: skip


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_has_an_example(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert answer([*path, "--help"]) == 0
    said = capsys.readouterr().out
    _, _, examples = said.partition("Example")
    assert " ".join(["backchannel", *path]) in examples
    assert "\x1b" not in said


def test_no_command_is_help_and_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer([]) == 2
    assert "Usage: backchannel" in capsys.readouterr().err
    assert answer(["--version"]) == 0
    assert capsys.readouterr().out == f"backchannel {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["upp"], "No such command 'upp'. Did you mean 'up'. Type: backchannel --help"),
        (["up", "--port", "x"], "Type: backchannel up --help"),
        (["run"], "Missing argument 'FILE'. Type: backchannel run --help"),
        (["run", "no-such-file.jsonl"], "no-such-file.jsonl cannot be read"),
        (["jobs", "--limit", "0"], "Type: backchannel jobs --help"),
        (["usage", "--by", "moon"], "--by model"),
        (["flower", "--host", "0.0.0.0"], "FLOWER_PASSWORD=… backchannel flower --host 0.0.0.0"),
    ],
)
def test_misuse_is_one_sentence_with_what_to_type(
    typed: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(typed) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_wrong_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BACKCHANNEL_PROCESSES", "many")
    assert answer(["worker", "--check"]) == 2
    assert capsys.readouterr().err.startswith("BACKCHANNEL_PROCESSES cannot be used: ")


def test_an_error_of_ours_is_its_sentence_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SetupError("The installation needs you. Type: this")

    monkeypatch.setattr(main, "app", fail)
    assert answer(["up"]) == 1
    assert capsys.readouterr().err == "The installation needs you. Type: this\n"


@pytest.mark.parametrize(
    "typed", [["jobs"], ["jobs", "show", "x"], ["sessions"], ["usage"], ["providers"]]
)
def test_without_an_api_it_says_how_to_start_one(
    typed: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BACKCHANNEL_HOME", str(tmp_path))
    monkeypatch.setenv("BACKCHANNEL_API_URL", "http://127.0.0.1:1")
    assert answer(typed) == 1
    assert "Type: backchannel up" in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from backchannel.cli.main import answer; answer(['--help']);"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert set(said.splitlines()[-1].split()) & HEAVY == set()


def test_python_m_is_the_command() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "backchannel", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert said.stdout == f"backchannel {__version__}\n"
