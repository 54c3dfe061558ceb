"""The page of a chaos run, for people: the headline first, then every case and what it means."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chaos.cases import CASES, percentiles

_COLUMNS = {"case", "database", "passed", "jobs", "breaches", "seconds", "wrong", "logs"}
_MEANING = {
    "lost": "a job answered with 202 that did not finish",
    "double_charged": "a job billed twice",
    "uncharged": "a provider call that is not on the books",
    "stream_ends": "a stream without exactly one end, the last event, or whose numbers do not rise",
    "end_not_row": "an end event that says something else than the job's row",
    "writes_after_fence": "a write of a worker that had lost its job",
    "outbox": "a finish without its notice, or a notice without its finish",
    "calls_over_attempts": "a provider call that was never put on record",
    "usage_not_oracle": "tokens on the books that the provider did not count",
}


def write_report(file: Path, profile: str, lines: list[dict[str, Any]]) -> None:
    """Write the Markdown page; it is generated, never edited."""
    when = datetime.now(UTC).date().isoformat()
    where = f"{platform.system()} {platform.machine()} with {os.cpu_count()} cores"
    meanings = "\n".join(f"- `{kind}`: {_MEANING[kind]}" for kind in lines[0]["breaches"])
    file.write_text(
        f"""# Reliability

*Made by `make chaos PROFILE={profile} ARGS=--report` on {when}, on {where}: run it
yourself.*

Real processes are killed with `kill -9`, frozen, starved and lied to while jobs run; the provider
is a fake on loopback that keeps its own record of every call. After each case one checker compares
the database, the streams and that record.

{_table(("What was measured", "Result"), _headline(lines), right=1)}

Leases are shortened to 4 s in these runs (20 s by default): with the default a job of a killed
worker waits up to 16 s longer.

## What counts as a breach

{meanings}

## The cases

{_table(("Case", "What happens", "Database", "Jobs", "Breaches", "Figures"), _cases(lines))}
""",
        encoding="utf-8",
    )


def _headline(lines: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The few numbers that people ask for; a number nobody measured is left out."""
    yield "Jobs accepted", f"{sum(line['jobs'] for line in lines):,}"
    yield "Processes killed", f"{sum(line.get('kills', 0) for line in lines):,}"
    yield "Breaches of a promise", f"{sum(map(_breaches, lines)):,}"
    hurt = [line for line in lines if line["case"].startswith("workers.")]
    waits = [wait for line in hurt for wait in line.get("_recovery_s", ())]
    if waits:
        p50, p95, most = percentiles(waits)
        words = "From a worker's death or freeze to the end of a job it had: p50 / p95 / max"
        yield words, f"{p50} / {p95} / {most} s"
    shot = [line for line in lines if "extra_calls_per_kill" in line and line["kills"]]
    if shot:
        extra = sum(line["extra_calls_per_kill"] * line["kills"] for line in shot)
        kills = sum(line["kills"] for line in shot)
        yield "Provider calls made again per kill", f"{extra / kills:.1f}"
    accepts = [line["accept_p99_s"] for line in lines if line["case"].startswith("broker.")
               and "accept_p99_s" in line]  # fmt: skip
    if accepts:
        yield "Accepting a job while the broker is dead, frozen or full, p99", f"{max(accepts)} s"


def _cases(lines: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    meant = {case.name: (case.harm.__doc__ or "").splitlines()[0] for case in CASES}
    for line in lines:
        shown = {k: v for k, v in line.items() if k not in _COLUMNS and not k.startswith("_")}
        figures = ", ".join(_figure(*each) for each in shown.items())
        yield (
            f"`{line['case']}`", meant[line["case"]], line["database"], f"{line['jobs']:,}",
            str(_breaches(line)), figures,
        )  # fmt: skip


def _figure(name: str, value: Any) -> str:
    """A figure in words: the unit at the end of its name goes behind the number."""
    words = name.split("_")
    unit = {"s": " s", "mb": " MB"}.get(words[-1], "")
    return f"{' '.join(words[:-1] if unit else words)} {value}{unit}"


def _breaches(line: dict[str, Any]) -> int:
    return sum(line["breaches"].values()) + bool(line.get("wrong"))


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]], right: int = 0) -> str:
    marks = ["---"] * (len(head) - right) + ["---:"] * right
    cells = [head, tuple(marks), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
