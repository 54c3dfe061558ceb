"""What a batch would cost: read from its file, line by line, without asking anybody."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from backchannel import files
from backchannel.batch_input import (
    EMPTY,
    MAX_FAULTS,
    Asked,
    Fault,
    Head,
    ask,
    check_lines,
    duplicate,
    too_long,
)
from backchannel.db import Database
from backchannel.errors import InvalidRequest
from backchannel.files import Chunk
from backchannel.pricing import Tokens, price
from backchannel.registry import Registry
from backchannel.tokens import CHARS_PER_TOKEN, TOKENS_PER_MESSAGE, chars_of

# An answer without a cap of its own: a sentence at least, a long page at most.
SHORT_ANSWER, LONG_ANSWER = 50, 2_000
METHOD = (
    "Input: a token for every 5 (low) or 3 (high) characters of text and tools, and 4 a message. "
    "Output: 50 tokens (low), and the line's own cap or 2,000 (high). Images, cached input and "
    "retries are not in it. Prices are today's."
)


_encode = msgspec.json.Encoder().encode


@dataclass
class ModelEstimate:
    """What the lines for one model would use."""

    lines: int = 0
    chars: int = 0
    messages: int = 0
    low_output: int = 0
    high_output: int = 0

    def add(
        self, system: str | None, messages: list[dict[str, Any]], parameters: dict[str, Any]
    ) -> None:
        """Count a chat's input."""
        self.lines += 1
        self.messages += len(messages)
        self.chars += len(system or "") + sum(map(chars_of, messages))
        for name in ("tools", "response_format"):
            self.chars += len(_encode(parameters[name])) if name in parameters else 0

    def input_tokens(self, pace: str = "likely") -> int:
        """The input, at a number of characters per token."""
        return int(self.chars / CHARS_PER_TOKEN[pace]) + TOKENS_PER_MESSAGE * self.messages


class Seen:
    """The custom_ids so far: in a file without a name, since a million take 100 MB in memory."""

    def __init__(self) -> None:
        # used by one thread at a time, though not always by the same
        self._ids = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._ids.execute("PRAGMA journal_mode = OFF")
        self._ids.execute("CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID")

    def add(self, heads: Iterable[Head]) -> list[Fault]:
        """Remember some lines; what is wrong with those whose custom_id was there before."""
        add = "INSERT OR IGNORE INTO ids VALUES (?)"
        self._ids.execute("BEGIN")
        faults = [
            duplicate(*head)
            for head in heads
            if not self._ids.execute(add, (head.custom_id,)).rowcount
        ]
        self._ids.execute("COMMIT")
        return faults

    def close(self) -> None:
        """Forget them all."""
        self._ids.close()


@dataclass
class Estimate:
    """What a file would use, per model; and what is wrong with it."""

    registry: Registry
    seen: Seen
    allowed: Sequence[str] | None = None  # models; None: all
    lines: int = 0
    bad_lines: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)
    faults_count: int = 0
    models: dict[str, ModelEstimate] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The estimate as it crosses HTTP; a model of unknown price makes the sums unknown."""
        models = {model: self._of(model, each) for model, each in sorted(self.models.items())}
        costs = [each["cost_usd"] for each in models.values()]
        known = all(cost["low"] is not None for cost in costs)
        return {
            "lines": self.lines,
            "lines_that_would_fail": self.bad_lines,
            "input_tokens": sum(each["input_tokens"] for each in models.values()),
            "output_tokens": {
                bound: sum(each["output_tokens"][bound] for each in models.values())
                for bound in ("low", "high")
            },
            "cost_usd": {
                bound: sum(cost[bound] for cost in costs) if known else None
                for bound in ("low", "high")
            },
            "models": models,
            "method": METHOD,
        }

    def _of(self, model: str, each: ModelEstimate) -> dict[str, Any]:
        provider_id, _, name = model.partition(":")
        provider = self.registry.get(provider_id)
        low = price(provider, name, Tokens(each.input_tokens("low"), each.low_output)).nanousd
        high = price(provider, name, Tokens(each.input_tokens("high"), each.high_output)).nanousd
        return {
            "lines": each.lines,
            "input_tokens": each.input_tokens(),
            "output_tokens": {"low": each.low_output, "high": each.high_output},
            "cost_usd": {
                "low": None if low is None else low / 1e9,
                "high": None if high is None else high / 1e9,
            },
        }

    def add(self, chunk: Chunk, endpoint: str) -> None:
        """Count a chunk's lines."""
        lines = chunk.unpack()
        heads, faults = check_lines(lines, chunk.first_line, endpoint)
        twice = self.seen.add(heads)
        self.add_faults(sorted([*faults, *twice], key=lambda fault: fault.line or 0))
        self.lines += len(heads) - len(twice)
        for head in heads:
            try:
                raw = lines[head.line - chunk.first_line]
                self._add(ask(endpoint, raw, self.registry, self.allowed))
            except InvalidRequest:
                self.bad_lines += 1

    def add_faults(self, faults: list[Fault]) -> None:
        """Remember what is wrong with some lines, or how many they are."""
        self.faults_count += len(faults)
        room = MAX_FAULTS - len(self.faults)
        self.faults += [fault._asdict() for fault in faults[:room]]

    def _add(self, asked: Asked) -> None:
        its = self.models.setdefault(asked.resolved.id, ModelEstimate())
        its.add(asked.order.system, asked.messages, asked.parameters)
        limits = [asked.parameters.get(name) for name in ("max_completion_tokens", "max_tokens")]
        cap = next((limit for limit in limits if isinstance(limit, int)), LONG_ANSWER)
        its.low_output += min(SHORT_ANSWER, cap)
        its.high_output += cap


async def estimate(
    db: Database,
    registry: Registry,
    file_id: str,
    endpoint: str,
    allowed: Sequence[str] | None = None,
) -> Estimate:
    """Read a file, a chunk at a time, and say what it would cost."""
    with closing(Seen()) as seen:
        found, n = Estimate(registry, seen, allowed), 0
        while (chunk := await db.read(lambda c: files.chunk(c, file_id, n))) is not None:  # noqa: B023
            last = await db.read(lambda c: files.is_last(c, file_id, n))  # noqa: B023
            if not last and chunk.is_torn():
                found.add_faults([too_long(chunk.first_line + chunk.lines)])
            else:
                await asyncio.to_thread(found.add, chunk, endpoint)
            n += 1
    if not found.lines and not found.faults_count:
        found.add_faults([EMPTY])
    return found
