"""Forget: what a finished job asked and answered is gone; what it cost stays on the books."""

from __future__ import annotations

from sqlalchemy import Connection, bindparam, delete, exists, null, select, update

from backchannel.events import END, pack_log, unpack_log
from backchannel.tables import jobs, requests, results, turns

DELETED = "deleted"  # the kind of a job that no face shows any more

_LOG = select(results.c.log).where(results.c.job_id == bindparam("job"))
_later = turns.alias("later")
# Turns that others were answered after belong to their conversation as well.
_TURNS = delete(turns).where(
    turns.c.job_id == bindparam("job"),
    ~exists().where(
        _later.c.session_id == turns.c.session_id,
        _later.c.seq > turns.c.seq,
        _later.c.job_id != turns.c.job_id,
    ),
)


def forget(connection: Connection, job_id: str) -> None:
    """Remove a finished job's request, answer and stream; its row, attempts and usage stay.

    Its turns in a session go too, unless the conversation has gone on after them.
    """
    job = {"job": job_id}
    log = unpack_log(connection.execute(_LOG, job).scalar_one())
    ends = pack_log([event for event in log if event.type == END])
    connection.execute(_TURNS, job)
    connection.execute(
        update(requests)
        .where(requests.c.job_id == job_id)
        .values(messages=[], parameters={}, asked=null(), instructions=None)
    )
    connection.execute(
        update(results).where(results.c.job_id == job_id).values(message=null(), log=ends)
    )
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(kind=DELETED, meta={}))
