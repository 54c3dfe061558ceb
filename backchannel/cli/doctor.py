"""``backchannel doctor``: what works, what does not, and what to type about it."""

from __future__ import annotations

from typing import Annotated

import typer

EPILOGUE = """\
\b
Examples:
  backchannel doctor
  backchannel doctor --json
"""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check this installation; exit code 1 if something that is needed does not work."""
    from backchannel.cli.checks import examine
    from backchannel.cli.screen import colours, show, show_json
    from backchannel.settings import get_settings

    findings = list(examine(get_settings()))
    if as_json:
        show_json({"ok": all(each.ok or not each.needed for each in findings),
                   "checks": [each._asdict() for each in findings]})  # fmt: skip
    else:
        import sys

        for each in findings:
            mark = "✓" if each.ok else "✗" if each.needed else "–"
            colour = "green" if each.ok else "red" if each.needed else "yellow"
            mark = typer.style(mark, fg=colour) if colours(sys.stdout) else mark
            show(f"{mark} {each.what:<10} {each.found}")
            if each.advice:
                show(f"{'':<12} {each.advice}")
    if not all(each.ok or not each.needed for each in findings):
        raise typer.Exit(1)
