"""A batch's counts and the order of its finished lines: once per batch and transaction."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, update

from backchannel.pricing import Tokens
from backchannel.tables import batch_lines, batches


class LineEnd(NamedTuple):
    """A line whose job is over, and what its last attempt spent, if it called a provider."""

    batch_id: str
    line: int
    ok: bool
    called: bool = False
    tokens: Tokens | None = None
    cost_nanousd: int | None = None


_SUMS = (
    "completed", "failed", "last_seq", "input_tokens", "cached_tokens", "output_tokens",
    "reasoning_tokens", "cost_nanousd", "unknown_tokens", "unknown_price",
)  # fmt: skip
_ADD = (
    update(batches)
    .where(batches.c.id == bindparam("batch"))
    .values({name: batches.c[name] + bindparam(f"more_{name}") for name in _SUMS})
    .returning(batches.c.last_seq)
)
_PLACE = (
    update(batch_lines)
    .where(batch_lines.c.batch_id == bindparam("batch"), batch_lines.c.line == bindparam("its"))
    .values(done_seq=bindparam("seq"), ok=bindparam("is_ok"))
)


def count(connection: Connection, ends: list[LineEnd]) -> None:
    """Count finished lines and give them their places; call it through `db.at_end`.

    A batch's row is locked from here to the commit, so whoever sees a place sees all before it.
    """
    # always in the same order: two processes that finish lines of two batches must not deadlock
    for batch_id, group in groupby(sorted(ends, key=_batch), key=_batch):
        lines = list(group)
        known = [line.tokens for line in lines if line.tokens is not None]
        more = {
            "completed": sum(line.ok for line in lines),
            "failed": sum(not line.ok for line in lines),
            "last_seq": len(lines),
            "input_tokens": sum(tokens.input for tokens in known),
            "cached_tokens": sum(tokens.cached for tokens in known),
            "output_tokens": sum(tokens.output for tokens in known),
            "reasoning_tokens": sum(tokens.reasoning for tokens in known),
            "cost_nanousd": sum(line.cost_nanousd or 0 for line in lines),
            "unknown_tokens": sum(line.called and line.tokens is None for line in lines),
            "unknown_price": sum(line.called and line.cost_nanousd is None for line in lines),
        }
        last = connection.execute(
            _ADD, {"batch": batch_id, **{f"more_{name}": value for name, value in more.items()}}
        ).scalar_one()
        first = last - len(lines) + 1
        connection.execute(
            _PLACE,
            [
                {"batch": batch_id, "its": line.line, "seq": first + number, "is_ok": line.ok}
                for number, line in enumerate(lines)
            ],
        )


def _batch(end: LineEnd) -> str:
    return end.batch_id
