"""``backchannel sessions``: conversations, and what was said in them."""

from __future__ import annotations

from typing import Annotated

import typer

EPILOGUE = """\
\b
Examples:
  backchannel sessions
  backchannel sessions show session_…
"""
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, as the API answers it.")]

sessions = typer.Typer(
    help="List sessions, newest first; or show one with its messages.",
    invoke_without_command=True,
    epilog=EPILOGUE,
    rich_markup_mode=None,
)


@sessions.callback()
def list_sessions(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 20,
    after: Annotated[str | None, typer.Option(help="Go on after this session id.")] = None,
    as_json: AsJson = False,
) -> None:
    """List sessions, newest first; or show one with its messages."""
    if context.invoked_subcommand is not None:
        return
    from backchannel.cli.client import call
    from backchannel.cli.screen import say, show_json, show_table

    asked = {"limit": limit} | ({"after": after} if after else {})
    page = call("GET", "/v1/sessions", params=asked)
    if as_json:
        show_json(page)
        return
    names = ("id", "model", "model_version", "title", "updated_at")
    show_table(
        [name.upper() for name in names], [[s[name] for name in names] for s in page["data"]]
    )
    if page["has_more"]:
        say(f"More: backchannel sessions --after {page['next']}")


@sessions.command(epilog="\b\nExample:\n  backchannel sessions show session_…")
def show(
    session_id: Annotated[
        str, typer.Argument(metavar="ID", help="A session's id.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Show a session's messages in order."""
    from backchannel.cli.client import call
    from backchannel.cli.screen import show as line
    from backchannel.cli.screen import show_json

    session = call("GET", f"/v1/sessions/{session_id}")
    if as_json:
        show_json(session)
        return
    rule = session["model_rule"]
    model = f"{session['model']} (by {rule})" if rule else session["model"]
    line(f"{session['id']}  {model}  {session['title'] or ''}".rstrip())
    for message in session["messages"]:
        marks = [message["model"], "interrupted" if message["interrupted"] else None]
        said = ", ".join(mark for mark in marks if mark)
        who = message["role"] + (f" ({said})" if said else "")
        content = message["content"]
        text = content if isinstance(content, str) else "" if content is None else str(content)
        line(f"\n{who}:\n{text}")
