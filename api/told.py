"""What a session's next turn is told before its own words, where its model depends on that."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, and_, or_, select

from api.deps import Resources
from backchannel.history import Message, Turn, budget_of, fit
from backchannel.tables import CANCELLED, QUEUED, RUNNING, SUCCEEDED, jobs, sessions, turns

# as the claim will find it, if what has not ended succeeds
_TOLD = or_(
    jobs.c.state.in_([SUCCEEDED, QUEUED, RUNNING]),
    and_(jobs.c.state == CANCELLED, jobs.c.interrupted_by.is_not(None)),
)


async def told_before(
    its: Resources, caller: str, session_id: str, model: str, messages: list[Message]
) -> list[Message]:
    """The history that a model is told with these messages, within the session's budget for it."""
    own = and_(sessions.c.id == session_id, sessions.c.caller == caller)
    session = select(sessions.c.system, sessions.c.history).where(own)
    said = (
        select(turns.c.job_id, turns.c.message)
        .join(sessions, sessions.c.id == turns.c.session_id)
        .join(jobs, jobs.c.id == turns.c.job_id)
        .where(own, _TOLD)
        .order_by(turns.c.seq)
    )

    def read(connection: Connection) -> list[Message]:
        row: Any = connection.execute(session).first()
        by_job: dict[str, Turn] = {}
        for each in connection.execute(said):
            by_job.setdefault(each.job_id, []).append(each.message)
        budget = None if row is None else budget_of(row.history, model)
        before = list(by_job.values())
        if budget is not None:
            system = [{"role": "system", "content": row.system}] if row.system else []
            before = fit(before, [*system, *messages], budget).turns
        return [message for turn in before for message in turn]

    return await its.db.read(read)
