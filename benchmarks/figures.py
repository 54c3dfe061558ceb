"""Numbers: medians over rounds, percentiles over delays, and what one round of a contender took."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


def median(values: Sequence[float]) -> float:
    """The middle one; NaN of nothing."""
    return statistics.median(values) if values else math.nan


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all is not above; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


@dataclass(frozen=True, slots=True)
class Round:
    """One contender's one go at one piece of work.

    Attributes:
        cpu_s: User and system seconds of each role; "worker" is the one that talks to the provider.
        delays_ms: From the provider's sending of a first token to the contender's having it.
    """

    jobs: int
    tokens: int
    seconds: float
    cpu_s: dict[str, float]
    delays_ms: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Cell:
    """All rounds of one contender at one piece of work."""

    rounds: list[Round] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Spent in all."""
        return sum(each.seconds for each in self.rounds)

    @property
    def roles(self) -> list[str]:
        """Whose CPU time was read."""
        return list(self.rounds[0].cpu_s)

    def per_token_us(self, role: str | None = None) -> float:
        """CPU microseconds a token, of one role or of all."""
        return median([_cpu(each, role) * 1e6 / each.tokens for each in self.rounds])

    def per_job_ms(self, role: str | None = None) -> float:
        """CPU milliseconds a job, of one role or of all."""
        return median([_cpu(each, role) * 1e3 / each.jobs for each in self.rounds])

    def tokens_per_s(self) -> float:
        """By the clock on the wall."""
        return median([each.tokens / each.seconds for each in self.rounds])

    def jobs_per_s(self) -> float:
        """By the clock on the wall."""
        return median([each.jobs / each.seconds for each in self.rounds])

    def delay_ms(self, share: float) -> float:
        """A percentile of the added first-token delays of all rounds."""
        return percentile([delay for each in self.rounds for delay in each.delays_ms], share)


def _cpu(each: Round, role: str | None) -> float:
    return sum(each.cpu_s.values()) if role is None else each.cpu_s[role]
