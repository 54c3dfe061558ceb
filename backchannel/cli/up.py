"""``backchannel up``: broker, API, workers and Flower in one terminal, with one log."""

from __future__ import annotations

from typing import Annotated

import typer

EPILOGUE = """\
\b
Examples:
  backchannel up
  OPENAI_API_KEY=sk-… backchannel up --processes 4 --no-flower
"""


def up(
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Port of the API; 0 takes a free one.")
    ] = 8000,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; one per core is right.")
    ] = None,
    jobs_in_flight: Annotated[
        int | None, typer.Option(min=1, help="Jobs each worker process runs at once.")
    ] = None,
    flower: Annotated[
        bool, typer.Option("--flower/--no-flower", help="Show the workers in Flower.")
    ] = True,
    flower_port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Port of Flower; 0 takes a free one.")
    ] = 5555,
    log: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the log there; default: stderr.")
    ] = None,
) -> None:
    """Start everything on this machine: broker, API, workers, Flower. Ctrl-C drains."""
    from backchannel.cli.stack import Plan, run_stack

    run_stack(Plan(port, processes, jobs_in_flight, flower_port if flower else None, log))
