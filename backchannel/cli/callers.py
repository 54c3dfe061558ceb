"""``backchannel callers``: who may ask; their keys are made, listed and revoked in the database."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sqlalchemy import Connection

EPILOGUE = """\
\b
Examples:
  backchannel callers add alice
  backchannel callers add nightly --scope batches --model 'groq:*' --expires 30d --tag team=pets
  backchannel callers revoke nightly
"""
ADD_EPILOGUE = """\
\b
Examples:
  backchannel callers add alice
  backchannel callers add nightly --scope batches --model 'groq:*' --expires 30d --tag team=pets
"""
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_UNIT_S = {"m": 60, "h": 3_600, "d": 86_400}

callers = typer.Typer(
    help="Make, list and revoke callers' keys, in the database itself.",
    no_args_is_help=True,
    epilog=EPILOGUE,
    rich_markup_mode=None,
)


@callers.command(epilog=ADD_EPILOGUE)
def add(
    name: Annotated[
        str,
        typer.Argument(help="Whose key it is; they see what others of this name made, only that."),
    ],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCOPE",
            help="jobs:write, jobs:read, batches, usage:read or admin, which is all of them; "
            "default: all but admin. May be given more than once.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Only models like this one, as in 'groq:*'. May be given more than once.",
        ),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="Minutes, hours or days from now: 30d.")
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A note to find it by.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and show it, this once. The first one closes an API that was open."""
    from backchannel import keys
    from backchannel.cli.screen import misuse, say, show, show_json

    if not _NAME.fullmatch(name):
        misuse(f"'{name}' is no name: 1 to 64 letters, digits and .-_@, the first no sign.")
    if wrong := [each for each in scope or () if each not in keys.SCOPES]:
        misuse(f"There is no scope '{wrong[0]}'. Type one of: {', '.join(keys.SCOPES)}")
    if wrong := [each for each in model or () if ":" not in each and "*" not in each]:
        misuse(f"No model is like '{wrong[0]}': they are provider:model. Type: '*:{wrong[0]}'")
    lasts = None if expires is None else _seconds(expires)
    new = keys.NewKey(name, scope or keys.USUAL, model or None, lasts, _tags(tag or []))
    with _database() as connection:
        before = keys.listed(connection)
        key_id, key = keys.add(connection, new)
        row = next(each for each in keys.listed(connection) if each.id == key_id)
    if as_json:
        show_json({"key": key, **_shown(row)})
        return
    show(key)
    say(f"This is the key of {name}, {key_id}. It is not shown again: keep it as you keep money.")
    say("Programs send it as 'Authorization: Bearer …' or 'x-api-key: …', the commands of this")
    say(f"program when you type: export BACKCHANNEL_API_KEY={row.prefix}…")
    if not before:
        say("It is the first: within seconds every request needs a key. What was made without one")
        say(f"belongs to the caller {keys.LOCAL}: backchannel callers add {keys.LOCAL}")
    elif same := [each for each in before if each.name == name]:
        say(f"{name} has had {len(same)} before; they see the same jobs.")


@callers.command("list", epilog="\b\nExample:\n  backchannel callers list --json")
def list_callers(as_json: AsJson = False) -> None:
    """List every key that was ever made, newest first; never the keys themselves."""
    from backchannel import keys
    from backchannel.cli.screen import show_json, show_table

    with _database() as connection:
        found = [_shown(row) for row in keys.listed(connection)]
    if as_json:
        show_json({"object": "list", "data": found})
        return
    columns = ("ID", "NAME", "KEY", "STATE", "SCOPES", "MODELS", "EXPIRES", "LAST USED", "TAGS")
    show_table(columns, map(_row, found))


@callers.command(epilog="\b\nExample:\n  backchannel callers revoke alice")
def revoke(
    who: Annotated[
        str, typer.Argument(metavar="NAME|ID", help="A caller, for all their keys; or one key.")
    ],
) -> None:
    """End a key, within five seconds. Jobs that were accepted with it go on."""
    from backchannel import keys
    from backchannel.cli.screen import Failure, say, show

    with _database() as connection:
        ended = keys.revoke(connection, who)
        left = keys.any_active(connection)
    if not ended:
        raise Failure(f"No key of '{who}' is active. Type: backchannel callers list")
    show(f"{', '.join(ended)} revoked.")
    if not left:
        say("That was the last one: nobody is let in now. Type: backchannel callers add NAME")


@contextmanager
def _database() -> Iterator[Connection]:
    """One transaction; the first command of an installation makes its tables."""
    from backchannel.db import create, migrate
    from backchannel.logs import configure
    from backchannel.settings import get_settings

    settings = get_settings()
    configure(settings, "callers")
    url = settings.database
    migrate(url)
    engine = create(url)
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def _seconds(text: str) -> int:
    from backchannel.cli.screen import misuse

    found = re.fullmatch(r"([1-9]\d{0,5})([mhd])", text)
    if found is None:
        misuse(f"--expires {text} is no time. Type minutes, hours or days: 90m, 12h or 30d")
    return int(found[1]) * _UNIT_S[found[2]]


def _tags(given: list[str]) -> dict[str, str]:
    from backchannel.cli.screen import misuse

    pairs = [each.partition("=") for each in given]
    if wrong := [name for name, sign, _ in pairs if not (name and sign)]:
        misuse(f"--tag {wrong[0]} has no value. Type: --tag {wrong[0] or 'team'}=…")
    return {name: value for name, _, value in pairs}


def _shown(row: Any) -> dict[str, Any]:
    from backchannel.schemas import rfc3339

    moments = {
        f"{name}_at": None if (ms := row._mapping[f"{column}_ms"]) is None else rfc3339(ms)
        for name, column in (
            ("created", "created"), ("expires", "expires"), ("revoked", "revoked"),
            ("last_used", "used"),
        )
    }  # fmt: skip
    return {
        "id": row.id,
        "name": row.name,
        "prefix": row.prefix,
        "active": bool(row.active),
        "scopes": row.scopes,
        "models": row.models,
        "tags": row.tags,
        **moments,
    }


def _row(caller: dict[str, Any]) -> list[object]:
    ended = "revoked" if caller["revoked_at"] else "expired"
    return [
        caller["id"],
        caller["name"],
        f"{caller['prefix']}…",
        "active" if caller["active"] else ended,
        " ".join(caller["scopes"]),
        "all" if caller["models"] is None else " ".join(caller["models"]),
        caller["expires_at"],
        caller["last_used_at"],
        " ".join(f"{name}={value}" for name, value in caller["tags"].items()),
    ]
