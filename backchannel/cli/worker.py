"""``backchannel worker``: the processes that talk to providers."""

from __future__ import annotations

from typing import Annotated

import typer

EPILOGUE = """\
\b
Examples:
  backchannel worker --processes 4
  BACKCHANNEL_DATABASE_URL=postgresql://… BACKCHANNEL_REDIS_URL=redis://… backchannel worker
"""


def worker(
    processes: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; one per core is right.")
    ] = None,
    jobs_in_flight: Annotated[
        int | None, typer.Option(min=1, help="Jobs each process runs at once.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Only tell, by the exit code, if one lives on this host."),
    ] = False,
) -> None:
    """Run jobs until a SIGTERM or Ctrl-C drains it; a second one does not wait for answers."""
    import structlog

    from backchannel.cli.valkey import warn_unless_redis
    from backchannel.logs import configure
    from backchannel.settings import get_settings

    settings = get_settings()
    if check:
        raise typer.Exit(_check())
    slots = jobs_in_flight or settings.jobs_in_flight
    count = processes or settings.processes
    configure(settings, "worker")
    warn_unless_redis(settings, structlog.get_logger().warning)
    if count > 1:
        raise typer.Exit(_supervise(count, slots))
    from workers.main import run

    raise typer.Exit(run(jobs_in_flight=slots))


def _supervise(processes: int, slots: int) -> int:
    import asyncio
    import sys

    from backchannel.cli.stack import worker_children
    from backchannel.cli.supervise import Log, Supervisor
    from backchannel.settings import get_settings

    async def keep() -> None:
        supervisor = Supervisor(Log(sys.stderr))
        supervisor.listen_to_signals()
        for child in worker_children(get_settings(), processes, slots):
            supervisor.start(child)
        await supervisor.run_until_stopped()

    asyncio.run(keep())
    return 0


def _check() -> int:
    """0 if a worker of this host had a heartbeat lately: three may be missed."""
    import socket

    from sqlalchemy import func, select

    from backchannel.cli.screen import Failure, show
    from backchannel.db import create, now_ms
    from backchannel.settings import get_settings
    from backchannel.tables import workers

    settings = get_settings()
    oldest = now_ms() - int(3 * settings.heartbeat_s * 1000)
    alive = (
        select(func.count())
        .select_from(workers)
        .where(workers.c.host == socket.gethostname(), workers.c.seen_ms > oldest)
    )
    engine = create(settings.database)
    try:
        with engine.connect().execution_options(reading=True) as connection:
            count = connection.execute(alive).scalar_one()
    except Exception as error:
        cause = str(error).strip().splitlines()[0]
        raise Failure(f"The database does not tell about workers: {cause}") from error
    finally:
        engine.dispose()
    if not count:
        raise Failure("No worker of this host is alive. Type: backchannel worker")
    show(f"{count} worker processes are alive on this host.")
    return 0
