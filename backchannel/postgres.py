"""PostgreSQL connections on which nobody waits for ever, whatever lies on the way to the server."""

from __future__ import annotations

from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus

RV = TypeVar("RV")

# The server's own limits, from which it answers with an error; and for the sessions of clients it
# has lost, whose locks would stand in everybody's way for as long as its keep-alive takes: two
# hours. Sources: "Client Connection Defaults" in PostgreSQL's manual, libpq's parameters.
LIMITS = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "options": "-c statement_timeout=8000 -c lock_timeout=5000"
    " -c idle_in_transaction_session_timeout=8000",
}
# Longer than any statement may take, and with a new connection (5 s) below the fence (15 s).
SILENCE_S = 9.0


class LimitedConnection(psycopg.Connection[Any]):
    """A connection that is closed when the server has not answered a statement for `SILENCE_S`.

    Keep-alive notices a path that swallows packets, but not a proxy that is dead and whose kernel
    still answers for it, nor a server that is frozen.
    """

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """Every answer of the server is waited for here."""
        try:
            return super().wait(gen, interval, timeout or SILENCE_S)
        except psycopg.OperationalError as error:
            if self.pgconn.transaction_status != TransactionStatus.ACTIVE:
                raise
            self.pgconn.finish()  # an answer that comes later would be taken for another's
            raise psycopg.OperationalError(f"no answer for {SILENCE_S:.0f} s") from error
