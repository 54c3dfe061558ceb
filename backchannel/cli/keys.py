"""``backchannel keys``: the stored keys of providers; written here, read by workers only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from backchannel.db import Database
    from backchannel.registry import Registry
    from backchannel.settings import Settings

EPILOGUE = """\
\b
Examples:
  backchannel keys set groq
  backchannel keys set gateway < /run/secrets/gateway-key
"""
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ProviderId = Annotated[
    str, typer.Argument(metavar="PROVIDER", help="A provider's id.", show_default=False)
]

keys = typer.Typer(
    help="List, store, replace or remove providers' keys. A key is never printed.",
    invoke_without_command=True,
    epilog=EPILOGUE,
    rich_markup_mode=None,
)


@keys.callback()
def _list_by_default(context: typer.Context, as_json: AsJson = False) -> None:
    """List, store, replace or remove providers' keys. A key is never printed."""
    if context.invoked_subcommand is None:
        list_keys(as_json)


@keys.command("list", epilog="\b\nExample:\n  backchannel keys list")
def list_keys(as_json: AsJson = False) -> None:
    """List where each provider's key is taken from, by this shell's environment."""
    from backchannel.cli.screen import show_json, show_table

    with _books() as (_, database, registry):
        stored = {row["provider"]: row for row in database.read_now(_stored)}
    found = [
        {
            "provider": each.id,
            "source": registry.key_source(each),
            "needed": each.needs_key,
            "stored_at": stored.pop(each.id, {}).get("stored_at"),
        }
        for each in registry.providers.values()
    ]
    # of a provider that is set aside, or that an older version left behind
    found += [
        {"provider": name, "source": "stored", "needed": None, "stored_at": row["stored_at"]}
        for name, row in stored.items()
    ]
    if as_json:
        show_json({"object": "list", "data": found})
        return
    rows = [
        [each["provider"], each["source"] or ("missing" if each["needed"] else "none needed"),
         each["stored_at"]]
        for each in found
    ]  # fmt: skip
    show_table(["PROVIDER", "KEY", "STORED"], rows)


@keys.command("set", epilog="\b\nExample:\n  backchannel keys set groq < groq-key.txt")
def set_key(provider_id: ProviderId) -> None:
    """Store a provider's key: asked for on a terminal, else read from stdin; never an argument."""
    from backchannel.cli.screen import Failure, say

    with _books() as (settings, database, registry):
        _known(registry, provider_id)
        if provider_id in registry.stored:
            raise Failure(
                f"'{provider_id}' has a stored key. To put another in its place, type: "
                f"backchannel keys rotate {provider_id}"
            )
        _store(settings, database, provider_id)
        hidden = _hidden(registry, provider_id)
        say(f"Stored, sealed. Workers use it from their next job on.{hidden}")


@keys.command(
    epilog="""\
\b
Examples:
  backchannel keys rotate groq < new-key.txt
  BACKCHANNEL_MASTER_KEY=NEW,OLD backchannel keys rotate --master
"""
)
def rotate(
    provider_id: Annotated[
        str | None, typer.Argument(metavar="PROVIDER", help="Whose key.", show_default=False)
    ] = None,
    master: Annotated[
        bool,
        typer.Option("--master", help="Seal all stored keys again, with the first master key."),
    ] = False,
) -> None:
    """Replace a stored key: running answers finish with the old one, the next jobs use the new."""
    from backchannel.cli.screen import Failure, misuse, say

    if (provider_id is None) != master:
        misuse("Name a provider, or say --master.")
    with _books() as (settings, database, registry):
        if provider_id is None:
            say(f"Sealed again: {_seal_again(settings, database)} keys.")
            return
        if provider_id not in registry.stored:
            raise Failure(
                f"'{provider_id}' has no stored key. Type: backchannel keys set {provider_id}"
            )
        _store(settings, database, provider_id)
        say(f"Replaced. Workers use it from their next job on.{_hidden(registry, provider_id)}")


@keys.command(epilog="\b\nExample:\n  backchannel keys remove groq")
def remove(provider_id: ProviderId) -> None:
    """Forget a provider's stored key; one in the environment stays where it is."""
    from backchannel import stored_keys
    from backchannel.cli.screen import Failure, say

    def work(connection: Connection) -> bool:
        return stored_keys.remove(connection, provider_id)

    with _books() as (_, database, _registry):
        if not database.write_now(work):
            raise Failure(f"'{provider_id}' has no stored key. Type: backchannel keys list")
    say(f"Removed the stored key of '{provider_id}'.")


# ---------------------------------------------------------------- how


@contextmanager
def _books() -> Iterator[tuple[Settings, Database, Registry]]:
    """The database itself: the API has no way to a key, so none goes through it."""
    from backchannel import custom_providers
    from backchannel.db import Database, migrate
    from backchannel.settings import get_settings

    settings = get_settings()
    migrate(settings.database)
    database = Database(settings.database, name="keys")
    try:
        found = database.read_now(custom_providers.load)
        yield settings, database, custom_providers.registry_of(found, settings)
    finally:
        database.close()


def _known(registry: Registry, provider_id: str) -> None:
    from backchannel.cli.screen import Failure

    if provider_id not in registry.providers and provider_id not in registry.set_aside:
        known = ", ".join(sorted(registry.providers))
        raise Failure(f"There is no provider '{provider_id}'. Known providers: {known}.")


def _store(settings: Settings, database: Database, provider_id: str) -> None:
    from backchannel import stored_keys
    from backchannel.sealed import seal

    sealed = seal(settings, _ask())
    database.write_now(lambda c: stored_keys.put(c, provider_id, sealed))


def _ask() -> str:
    from backchannel.cli.screen import misuse
    from backchannel.stored_keys import MAX_KEY_CHARS

    if sys.stdin.isatty():
        key = typer.prompt("Key", hide_input=True, err=True)
    else:
        key = sys.stdin.read(MAX_KEY_CHARS + 2)
    key = key.strip()
    if not key or len(key) > MAX_KEY_CHARS or not key.isascii() or not key.isprintable():
        misuse(
            f"A key is one line of at most {MAX_KEY_CHARS} plain characters. Nothing was stored."
        )
    return str(key)


def _hidden(registry: Registry, provider_id: str) -> str:
    """What goes before a stored key, as far as this shell can see."""
    provider = registry.providers.get(provider_id)
    source = registry.key_source(provider) if provider else None
    if source in (None, "stored"):
        return ""
    return f" But where this shell's variables hold, its key comes from there ({source})."


def _seal_again(settings: Settings, database: Database) -> int:
    from backchannel import stored_keys
    from backchannel.sealed import seal, unseal

    def work(connection: Connection) -> int:
        old = stored_keys.sealed(connection)
        again = {name: seal(settings, unseal(settings, data)) for name, data in old.items()}
        stored_keys.seal_again(connection, again)
        return len(again)

    return database.write_now(work)


def _stored(connection: Connection) -> list[dict[str, Any]]:
    from backchannel.schemas import rfc3339
    from backchannel.stored_keys import PREFIX, listed

    return [
        {"provider": row.name.removeprefix(PREFIX), "stored_at": rfc3339(row.updated_ms)}
        for row in listed(connection)
    ]
