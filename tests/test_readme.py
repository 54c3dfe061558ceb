"""What the documents say can be typed, opened and set: commands, paths, settings, routes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.main import create_app
from backchannel.cli.main import answer
from backchannel.settings import ProviderSettings, Settings
from backchannel.tiers import TIERS

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]
)
FOLDERS = ("api", "backchannel", "workers", "tests", "docs", "examples", ".ci")
PARAMETER = re.compile(r"\{\w+\}|(?:(?:job|session|batch)_|file-)…|(?<=/providers/)gateway")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The fenced blocks of a page in these languages."""
    text = page.read_text(encoding="utf-8")
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language in languages:
            yield body


def typed(page: Path) -> Iterator[str]:
    """Every line a reader would type, continued lines joined."""
    for body in blocks(page, "bash"):
        yield from body.replace("\\\n", " ").splitlines()
    for body in blocks(page, "console", "text"):
        yield from (line.removeprefix("$ ") for line in body.splitlines() if line.startswith("$ "))
    text = page.read_text(encoding="utf-8")
    yield from re.findall(r"`((?:\.venv/bin/)?backchannel [a-z][^`]*)`", text)


def commands(page: Path) -> Iterator[list[str]]:
    """The words after ``backchannel`` of every command on a page."""
    for line in typed(page):
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words):
            if word in ("backchannel", ".venv/bin/backchannel"):
                yield list(words[place + 1 :])


@every_page
def test_every_command_exists_with_its_options(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in commands(page):
        # --help is answered only after every command and option before it was understood
        code = answer([*words, "--help"])
        assert code == 0, f"{words}: {capsys.readouterr().err}"


def test_the_documents_show_commands_at_all() -> None:
    shown = {words[0] for page in PAGES for words in commands(page)}
    assert {"run", "up", "api", "worker", "flower", "jobs", "usage", "doctor"} <= shown


@every_page
def test_every_habit_is_in_the_makefile(page: Path) -> None:
    habits = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines = [line for body in blocks(page, "bash", "console") for line in body.splitlines()]
    lines += re.findall(r"`(make [^`]*)`", page.read_text(encoding="utf-8"))
    asked = [match[1] for line in lines if (match := re.match(r"(?:\$ )?make ([a-z]+)", line))]
    assert set(asked) <= set(habits)


@every_page
def test_every_path_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]
    for link in links:
        if link and "://" not in link:
            assert (page.parent / link).exists(), link
    for path in re.findall(
        rf"(?<![\w./-])((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*)", text
    ):
        assert (ROOT / path.rstrip(".")).exists(), path


@every_page
def test_every_setting_exists(page: Path) -> None:
    known = {f"BACKCHANNEL_{name.upper()}" for name in Settings.model_fields}
    own = {name.upper() for name in ProviderSettings.model_fields}
    tiers = {tier.upper() for tier in TIERS}
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"BACKCHANNEL_[A-Z0-9_<>]*[A-Z0-9>]", text):
        setting, *parts = name.split("__")
        assert setting in known, name
        inside = tiers if setting.endswith("_TIERS") else own if "_PROVIDERS" in setting else set()
        assert not parts or parts[-1] in inside, name


@every_page
def test_every_address_is_a_route(page: Path) -> None:
    app = create_app(Settings())
    known = {PARAMETER.sub("{}", path) for path in app.openapi()["paths"]}
    known.add("/v1")  # what an SDK is given
    text = page.read_text(encoding="utf-8").partition("## Not yet")[0]
    asked = re.findall(r"(?:GET|POST|PATCH|:8000) ?(/[\w{}/…-]+)", text)
    # "/v1" alone is where an SDK is pointed to
    assert {PARAMETER.sub("{}", path) for path in asked} - {"/v1"} <= known


@every_page
def test_every_example_in_json_or_python_can_be_read(page: Path) -> None:
    for body in blocks(page, "json"):
        for line in body.splitlines():
            json.loads(line)
    for body in blocks(page, "python"):
        compile(body, name_of(page), "exec")
    for body in blocks(page, "http"):
        _, _, after = body.partition("\n\n")
        if after.startswith("{"):
            json.loads(after)


def test_the_example_lines_of_the_readme_can_be_run(tmp_path: Path) -> None:
    from backchannel.cli.lines import Line, read_lines

    shown = list(blocks(ROOT / "README.md", "json"))
    file = tmp_path / "lines.jsonl"
    file.write_text(shown[0], encoding="utf-8")
    with file.open("rb") as lines:
        found = list(read_lines(lines))
    assert [type(line) for line in found] == [Line] * 3


def test_the_result_line_of_the_readme_is_what_a_run_writes() -> None:
    from backchannel.batch_input import CHAT
    from backchannel.batch_output import answer
    from backchannel.cli.lines import Line
    from backchannel.cli.results import record_of
    from tests.backchannel.test_batch_input import job

    shown = json.loads(list(blocks(ROOT / "README.md", "json"))[1])
    body = shown["response"]["body"]
    row = job(
        job_id=shown["response"]["request_id"], provider="echo", model="echo-1",
        message={"role": "assistant", "content": "One"}, meta={"custom_id": "a"},
        input_tokens=1, cached_tokens=0, output_tokens=1, reasoning_tokens=0, cost_nanousd=0,
    )  # fmt: skip
    response = {**shown["response"], "body": answer(CHAT, row) | {"created": body["created"]}}
    line = Line(1, "a", None, {"prompt": "One", "metadata": {"custom_id": "a"}})
    assert record_of(line.id, shown | {"response": response}) == shown
