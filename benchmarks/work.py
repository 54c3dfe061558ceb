"""What is asked of a contender: how many answers of how many tokens, at what pace.

The pace travels to the provider as the model's name, ``t128-f100-d20``: 128 tokens, the first after
100 ms, 20 ms between two. An ``s`` behind it stamps every token with its time, not only the first.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache

# What the provider puts into a token: when it was sent, on the clock that all processes of a
# machine share (CLOCK_MONOTONIC), and how long the provider itself took to the first token.
STAMP = re.compile(rb"@(\d+)\+(\d+) ")


@dataclass(frozen=True, slots=True)
class Pace:
    """How one answer comes."""

    tokens: int
    first_ms: int = 0
    each_ms: int = 0
    stamped: bool = False

    @property
    def model(self) -> str:
        """As the provider reads it."""
        return f"t{self.tokens}-f{self.first_ms}-d{self.each_ms}{'-s' if self.stamped else ''}"

    @property
    def paced(self) -> bool:
        """Whether any time passes."""
        return bool(self.first_ms or self.each_ms)


@lru_cache
def pace_of(model: str) -> Pace:
    """The pace that a model's name asks for."""
    numbers = {word[0]: word[1:] for word in model.split("-")}
    return Pace(int(numbers["t"]), int(numbers["f"]), int(numbers["d"]), "s" in numbers)


def stamp(sent_ns: int, own_ns: int) -> bytes:
    """The mark inside a token."""
    return b"@%d+%d " % (sent_ns, own_ns)


def unstamp(text: str | bytes) -> tuple[int, int] | None:
    """When the token was sent and the provider's own part of the wait, in ns; None: no mark."""
    found = STAMP.search(text.encode() if isinstance(text, str) else text)
    return (int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True, slots=True)
class Work:
    """One measured piece of work.

    Attributes:
        jobs: Answers in all.
        concurrency: Answers in flight at most.
        starts_per_s: The jobs are asked for at this rate; 0: all in one instant.
        gathering: All answers end soon after the last one begins, none is longer than `pace`.
    """

    pace: Pace
    jobs: int
    concurrency: int
    starts_per_s: int = 0
    gathering: bool = False
    dialect: str = "openai"

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(self.pace_of(number).tokens for number in range(self.jobs))

    def start_s(self, number: int) -> float:
        """When a job is asked for."""
        return number / self.starts_per_s if self.starts_per_s else 0.0

    def pace_of(self, number: int) -> Pace:
        """How a job's answer comes."""
        if not self.gathering:
            return self.pace
        left_ms = 1000 * (self.start_s(self.jobs) - self.start_s(number))
        tokens = 2 + math.ceil(left_ms / self.pace.each_ms)
        return replace(self.pace, tokens=min(tokens, self.pace.tokens))

    @property
    def name(self) -> str:
        """In a word, for the table."""
        streams = f"{self.concurrency:,} {'gathering ' * self.gathering}stream"
        how = f"{self.pace.each_ms} ms apart" if self.pace.paced else "unpaced"
        other = "" if self.dialect == "openai" else f", {self.dialect}"
        tokens = f"{'up to ' * self.gathering}{self.pace.tokens} token"
        plural = "s" * (self.concurrency > 1), "s" * (self.pace.tokens > 1)
        return f"{streams}{plural[0]}, {tokens}{plural[1]} {how}{other}"


REALISTIC = Pace(128, first_ms=100, each_ms=20)
AT_ONCE = Pace(128)
SHORT = Pace(1)
WARM_UP = Work(Pace(1, first_ms=200), 50, 50)  # long enough that each process of a pool gets one
PATIENCE_S = 600.0  # of the SDKs, to connect too: a drowned loop must finish, not fail
STARTS_PER_S = 500  # at most: a thousand users do not press Enter in the same instant

# A thousand realistic streams are 50,000 tokens a second, more than the floor can take on one core.
# At this pace, a large model's, they are 10,000: what a first token waits for is not the others.
UNHURRIED_MS = 100
UNHURRIED_PER_S = 200


def realistic(streams: int, dialect: str = "openai") -> Work:
    """One wave of streams."""
    return Work(REALISTIC, streams, streams, STARTS_PER_S, dialect=dialect)


def unhurried(streams: int) -> Work:
    """Slow streams that come one by one; at the end all of them are there."""
    pace = Pace(128, first_ms=100, each_ms=UNHURRIED_MS)
    return Work(pace, streams, streams, UNHURRIED_PER_S, gathering=True)
