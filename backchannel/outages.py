"""What a database's refusal means: an outage, a conflict that goes again, or a fault of ours."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from backchannel.errors import Unavailable


def is_conflict(error: BaseException) -> bool:
    """Two PostgreSQL transactions met: serialization failure or deadlock; one goes again."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) in {"40001", "40P01"}


def is_held_up(error: BaseException) -> bool:
    """A lock was not to be had in time, or a statement took too long (PostgreSQL)."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) in {"55P03", "57014"}


# PostgreSQL's own words for "not now": read-only (a failover), shutting down, out of resources,
# connection lost (https://www.postgresql.org/docs/current/errcodes-appendix.html).
_NOT_NOW = ("25006", "25P03", "57P", "53", "08")
# And SQLite's: busy, locked, out of memory, read-only, I/O error, full, cannot open, protocol
# (https://www.sqlite.org/rescode.html).
_SQLITE_NOT_NOW = {5, 6, 7, 8, 10, 13, 14, 15}
_FULL = ("53100", 13)


def _code(error: BaseException) -> str | int | None:
    """What the database itself calls it, if it said anything."""
    original = getattr(error, "orig", None)
    sqlite_code: int | None = getattr(original, "sqlite_errorcode", None)
    if sqlite_code is not None:
        return sqlite_code & 0xFF  # the rest is detail
    sqlstate: str | None = getattr(original, "sqlstate", None)
    return sqlstate


def is_outage(error: BaseException) -> bool:
    """The database's fault and not the statement's: whatever else is asked now fails too."""
    match _code(error):
        case str(sqlstate):
            return sqlstate.startswith(_NOT_NOW)
        case int(sqlite_code):
            return sqlite_code in _SQLITE_NOT_NOW
        case _:  # it said nothing: there is no connection
            return isinstance(error, OperationalError | PoolTimeout) or (
                isinstance(error, DBAPIError) and error.connection_invalidated
            )


def translated(error: BaseException) -> BaseException:
    """What the one who asked is told: `Unavailable`, or the error itself."""
    cause = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
    if _code(error) in _FULL:
        return Unavailable(
            f"The database's disk is full ({cause}). Free some space: nothing else need be done.",
            code="disk_full",
        )
    if is_conflict(error) or is_held_up(error):
        return busy(cause)
    if is_outage(error):
        return unavailable(f"The database does not answer: {cause}")
    return error


def busy(cause: str) -> Unavailable:
    """Others are in the way."""
    return unavailable(f"The database is held up: {cause}")


def unavailable(sentence: str) -> Unavailable:
    """There is no answer, or not in time."""
    return Unavailable(sentence, code="database_unavailable")


def closed() -> Unavailable:
    """Nobody is there to do it any more."""
    return Unavailable("The database was closed: this process is stopping.")
