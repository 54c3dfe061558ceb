"""What of a session's history is told to a model: whole turns, the oldest left out first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, bindparam, or_, select, update

from backchannel.tables import CANCELLED, SUCCEEDED, jobs, turns
from backchannel.tokens import tokens_of

Message = dict[str, Any]
Turn = list[Message]  # what was asked, and its answer


class Told(NamedTuple):
    """The turns that are told, and how many older ones are not."""

    turns: list[Turn]
    dropped: int


def budget_of(history: dict[str, Any] | None, model: str) -> int | None:
    """The tokens that a session allows for a model, by its full name; None: as many as there are.

    Args:
        history: ``{"max_tokens": …, "models": {"provider:model": …}}``, either part left out.
    """
    if history is None:
        return None
    budget: int | None = (history.get("models") or {}).get(model, history.get("max_tokens"))
    return budget


def fit(turns: Sequence[Turn], always: Sequence[Message], budget: int) -> Told:
    """The newest turns that fit a budget together with what is always told.

    A turn is told whole or not at all, and results of tools never without the turn that called
    them: where `always` begins with results, the last turn is told too, whatever it costs.

    Args:
        always: The system prompt, and the messages to be answered now.
        budget: Likely tokens of all that is told (backchannel/tokens.py).
    """
    groups: list[list[Turn]] = []
    for turn in turns:
        if groups and _continues(turn):
            groups[-1].append(turn)
        else:
            groups.append([turn])
    needed = bool(groups) and _continues(always)
    left = budget - tokens_of(always)
    kept: list[Turn] = []
    for group in reversed(groups):
        left -= sum(map(tokens_of, group))
        if left < 0 and not needed:
            break
        needed = False
        kept = [*group, *kept]
    return Told(kept, len(turns) - len(kept))


def _continues(messages: Sequence[Message]) -> bool:
    """Whether they begin with the results of tools that the turn before has called."""
    said = (each["role"] for each in messages if each["role"] not in ("system", "developer"))
    return next(said, None) == "tool"


# Turns of jobs that did not succeed stay visible in the session but are not told to the model:
# a question without its answer would be asked twice when it is retried. What was interrupted is
# told: whoever wrote on has read as far as that.
_HISTORY = (
    select(turns.c.job_id, turns.c.message)
    .join(jobs, jobs.c.id == turns.c.job_id)
    .where(
        turns.c.session_id == bindparam("session"),
        turns.c.seq < bindparam("seq"),
        or_(
            jobs.c.state == SUCCEEDED,
            and_(jobs.c.state == CANCELLED, jobs.c.interrupted_by.is_not(None)),
        ),
    )
    .order_by(turns.c.seq)
)
_DROPPED = (
    update(jobs).where(jobs.c.id == bindparam("job")).values(turns_dropped=bindparam("dropped"))
)


def said_before(
    connection: Connection,
    job_id: str,
    row: Any,
    limits: dict[str, Any] | None,
    instructions: str | None,
    messages: list[Message],
) -> list[Message]:
    """What was said before, as far as the session's budget for the job's model goes."""
    said = connection.execute(_HISTORY, {"session": row.session_id, "seq": row.session_seq})
    budget = budget_of(limits, f"{row.provider}:{row.model}")
    if budget is None:
        return [each.message for each in said]
    by_job: dict[str, Turn] = {}
    for each in said:
        by_job.setdefault(each.job_id, []).append(each.message)
    system = [] if instructions is None else [{"role": "system", "content": instructions}]
    told = fit(list(by_job.values()), [*system, *messages], budget)
    connection.execute(_DROPPED, {"job": job_id, "dropped": told.dropped})
    return [message for turn in told.turns for message in turn]
