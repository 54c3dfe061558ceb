"""``backchannel usage``: tokens and dollars, from the books."""

from __future__ import annotations

from typing import Annotated, Any

import typer

EPILOGUE = """\
\b
Examples:
  backchannel usage --by model
  backchannel usage --by provider --by day --since 2026-11-01T00:00:00Z --json
"""
GROUPS = ("model", "model_reason", "provider", "session", "lane", "day")


def usage(
    by: Annotated[
        list[str] | None,
        typer.Option(metavar="|".join(GROUPS), help="Group by; may be given more than once."),
    ] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="From then on.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Before then.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, as the API answers it.")
    ] = False,
) -> None:
    """Show what was used and what it cost, by model unless told otherwise."""
    from backchannel.cli.client import call
    from backchannel.cli.screen import misuse, show_json, show_table

    groups = by or ["model"]
    if wrong := [group for group in groups if group not in GROUPS]:
        misuse(f"There is no grouping by '{wrong[0]}'. Type one of: --by {' --by '.join(GROUPS)}")
    asked: dict[str, Any] = {"group_by": ",".join(groups)}
    asked |= {name: value for name, value in (("since", since), ("until", until)) if value}
    found = call("GET", "/v1/usage", params=asked)
    if as_json:
        show_json(found)
        return
    columns = ["JOBS", "IN", "CACHED", "OUT", "REASONING", "COST", "NOT BILLED", "NOTE"]
    rows = [[row.get(group) for group in groups] + _figures(row) for row in found["data"]]
    total = ["total", *[""] * (len(groups) - 1), *_figures(found["total"])]
    show_table([*(group.upper() for group in groups), *columns], [*rows, total])


def _figures(row: dict[str, Any]) -> list[object]:
    from backchannel.cli.screen import dollars

    notes = [
        f"{row[name]} with {words}"
        for name, words in (
            ("unknown_tokens", "unknown usage"),
            ("unknown_price", "unknown price"),
        )
        if row.get(name)
    ]
    tokens = [row[f"{kind}_tokens"] for kind in ("input", "cached", "output", "reasoning")]
    unbilled = row["unbilled"]["cost_usd"]
    return [row["jobs"], *tokens, dollars(row["cost_usd"]), dollars(unbilled), "; ".join(notes)]
