"""What Celery and Flower are told of an attempt."""

from __future__ import annotations

from dataclasses import dataclass

from backchannel.books import Spent
from backchannel.lifecycle import Claim


@dataclass(frozen=True, slots=True)
class Report:
    """Where an attempt went and what it cost, no content."""

    job_id: str
    state: str
    model: str
    tokens: str = ""
    cost: str = ""

    def __str__(self) -> str:
        words = (self.job_id, self.state, self.model, self.tokens, self.cost)
        return " · ".join(word for word in words if word)


def report(claim: Claim, state: str, spent: Spent | None) -> Report:
    """The report of an attempt that ended like this."""
    model = f"{claim.provider}:{claim.model}"
    if spent is None or spent.tokens is None:
        return Report(claim.job_id, state, model)
    cost = "price unknown" if spent.cost_nanousd is None else f"${spent.cost_nanousd / 1e9:.6f}"
    tokens = f"{spent.tokens.input}+{spent.tokens.output} tokens"
    return Report(claim.job_id, state, model, tokens, cost)
