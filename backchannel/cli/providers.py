"""``backchannel providers``: who could answer, and whether a key is there."""

from __future__ import annotations

from typing import Annotated

import typer

EPILOGUE = """\
\b
Examples:
  backchannel providers
  OPENAI_API_KEY=sk-… backchannel up
"""


def providers(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, as the API answers it.")
    ] = False,
) -> None:
    """List the providers the API knows, and which are available to it."""
    from backchannel.cli.client import call
    from backchannel.cli.screen import show_json, show_table

    found = call("GET", "/v1/providers")
    if as_json:
        show_json(found)
        return
    rows = [
        [each["id"], "yes" if each["available"] else "no", each["reason"],
         f"{each['id']}:{each['default_model']}", each["base_url"]]
        for each in found["data"]
    ]  # fmt: skip
    show_table(["ID", "AVAILABLE", "WHY", "DEFAULT MODEL", "BASE URL"], rows)
