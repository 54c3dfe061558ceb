"""What commands print: tables and one-sentence errors; plain when nobody is at a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TextIO

import typer


class Failure(Exception):
    """A command ends here: one sentence that says what to type next, and the exit code."""

    def __init__(self, sentence: str, code: int = 1) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.code = code


def misuse(sentence: str) -> NoReturn:
    """End the command because of how it was called."""
    raise Failure(sentence, 2)


def colours(stream: TextIO) -> bool:
    """Whether colours are welcome there (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def say(text: str = "") -> None:
    """A line for a person, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def show(text: str = "") -> None:
    """A line of the result, on stdout."""
    print(text, flush=True)  # noqa: T201


def complain(sentence: str) -> None:
    """An error, in red where there is colour."""
    say(typer.style(sentence, fg="red") if colours(sys.stderr) else sentence)


def show_json(value: Any) -> None:
    """A result for a script."""
    show(json.dumps(value, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on a terminal; otherwise a heading and one line a row, separated by tabs."""
    texts = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for line in [list(columns), *texts]:
            show("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in line))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for line in texts:
        table.add_row(*(Text(cell) for cell in line))
    Console().print(table)


def dollars(cost: float | None) -> str:
    """A cost to read: ``$0.0123``, or ``unknown``: an unknown price is not zero."""
    if cost is None:
        return "unknown"
    return f"${cost:,.2f}" if cost >= 1 or cost == 0 else f"${cost:.6f}".rstrip("0")
