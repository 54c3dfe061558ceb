"""The books: all that a finish drags along - answer, usage, session turn, notice, batch counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, insert, select, update

from backchannel.counts import LineEnd, count
from backchannel.db import NOW
from backchannel.notices import job_end, tell
from backchannel.pricing import Tokens
from backchannel.tables import CANCELLED, QUEUED, SUCCEEDED, attempts, jobs, results, turns, usage
from backchannel.writer import at_end, in_bulk


class Doorbell(NamedTuple):
    """What a ring carries: the job id, and words for Flower. Never a prompt, never a key."""

    job_id: str
    lane: str
    model: str  # provider:model
    attempt: int  # the attempt it asks for
    front: bool = False


def doorbell(row: Any) -> Doorbell:
    return Doorbell(
        row.id, row.lane, f"{row.provider}:{row.model}", row.attempt + 1,
        front=getattr(row, "rank", 1) == 0,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Spent:
    """What one attempt spent, priced. ``tokens`` None: unknown, which is not zero."""

    source: str
    tokens: Tokens | None
    cost_nanousd: int | None = None
    price_date: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The usage object of HTTP and of the end event."""
        known = self.tokens
        return {
            "input_tokens": known and known.input,
            "cached_tokens": known and known.cached,
            "cache_write_tokens": known and known.cache_write,
            "output_tokens": known and known.output,
            "reasoning_tokens": known and known.reasoning,
            "cost_usd": None if self.cost_nanousd is None else self.cost_nanousd / 1e9,
            "cost_nanousd": self.cost_nanousd,
            "price_date": self.price_date,
            "source": self.source,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ends: the row, the answer and the whole stream, written together or not at all."""

    state: str
    log: bytes
    finish_reason: str | None = None
    message: dict[str, Any] | None = None
    error_code: str | None = None
    error_message: str | None = None
    spent: Spent | None = None


class Finished(NamedTuple):
    """The finish was committed; the session's next job may be rung."""

    next: Doorbell | None


_NEXT_IN_SESSION = (
    select(jobs.c.id, jobs.c.lane, jobs.c.provider, jobs.c.model, jobs.c.attempt)
    .where(
        jobs.c.session_id == bindparam("session"),
        jobs.c.session_seq > bindparam("seq"),
        jobs.c.state == QUEUED,
    )
    .order_by(jobs.c.session_seq)
    .limit(1)
)


_KEEP_ANSWERS = in_bulk(insert(results))


def write_finish(connection: Connection, row: Any, outcome: Outcome) -> Finished:
    """Everything that a terminal state drags along, in its transaction."""
    answered = {"job_id": row.id, "message": outcome.message, "log": outcome.log}
    at_end(connection, _KEEP_ANSWERS, answered)
    spent = close_attempt(
        connection, row, outcome.state, outcome.error_code, outcome.error_message, outcome.spent,
        billable=True,
    )  # fmt: skip
    if row.batch_id is not None:
        at_end(connection, count, _line_end(row, outcome.state, spent))
    else:
        at_end(connection, tell, job_end(row, outcome.state, outcome.finish_reason))
    if row.session_id is None:
        return Finished(None)
    if outcome.state == SUCCEEDED:
        _answer_turn(connection, row, outcome.message)
    elif outcome.state == CANCELLED and row.interrupted_by and (partial := _text(outcome.message)):
        _answer_turn(connection, row, partial)
    following = connection.execute(
        _NEXT_IN_SESSION, {"session": row.session_id, "seq": row.session_seq}
    ).first()
    return Finished(doorbell(following) if following else None)


def _line_end(row: Any, state: str, spent: Spent | None) -> LineEnd:
    return LineEnd(
        row.batch_id, row.line, state == SUCCEEDED,
        called=spent is not None,
        tokens=spent.tokens if spent else None,
        cost_nanousd=spent.cost_nanousd if spent else None,
    )  # fmt: skip


def _text(message: dict[str, Any] | None) -> dict[str, Any] | None:
    """What an answer that broke off can be told as: half a tool call would be refused."""
    text = message and message["content"]
    return {"role": "assistant", "content": text} if text else None


def _answer_turn(connection: Connection, row: Any, message: dict[str, Any] | None) -> None:
    asked = (
        select(turns.c.seq).where(turns.c.job_id == row.id).order_by(turns.c.seq.desc()).limit(1)
    )
    connection.execute(
        insert(turns).values(created_ms=NOW),
        {
            "session_id": row.session_id,
            "seq": connection.execute(asked).scalar_one() + 1,
            "job_id": row.id,
            # an answer without a word is one all the same: the next turn follows it
            "message": message or {"role": "assistant", "content": ""},
            "provider": row.provider,
            "model": row.model,
        },
    )


_CLOSE_ATTEMPTS = in_bulk(
    update(attempts)
    .where(
        attempts.c.job_id == bindparam("job"),
        attempts.c.attempt == bindparam("by_attempt"),
        attempts.c.finished_ms.is_(None),
    )
    .values(
        finished_ms=NOW,
        outcome=bindparam("what"),
        error_code=bindparam("code"),
        error_message=bindparam("why"),
    )
)
_CHARGE = in_bulk(insert(usage).values(created_ms=NOW))


def close_attempt(
    connection: Connection,
    row: Any,
    what: str,
    code: str | None,
    why: str | None,
    spent: Spent | None,
    *,
    billable: bool,
) -> Spent | None:
    """Close an attempt and put its usage on the books; a call of unknown outcome is ``unknown``.

    Returns what is on the books now; None if no provider was called.

    Args:
        row: The job's, with `provider_call_ms` of the attempt.
    """
    closing = {
        "job": row.id, "by_attempt": row.attempt, "what": what, "code": code, "why": why,
    }  # fmt: skip
    at_end(connection, _CLOSE_ATTEMPTS, closing)
    if row.provider_call_ms is None:
        return None
    spent = spent or Spent("unknown", None)
    tokens = spent.tokens
    at_end(
        connection,
        _CHARGE,
        {
            "job_id": row.id,
            "attempt": row.attempt,
            "billable": billable,
            "caller": row.caller,
            "provider": row.provider,
            "model": row.model,
            "model_reason": row.model_reason,
            "session_id": row.session_id,
            "lane": row.lane,
            "source": spent.source,
            "input_tokens": tokens and tokens.input,
            "cached_tokens": tokens and tokens.cached,
            "cache_write_tokens": tokens and tokens.cache_write,
            "output_tokens": tokens and tokens.output,
            "reasoning_tokens": tokens and tokens.reasoning,
            "cost_nanousd": spent.cost_nanousd,
            "price_date": spent.price_date,
        },
    )
    return spent
