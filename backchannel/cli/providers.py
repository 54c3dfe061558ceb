"""``backchannel providers``: who could answer; adding, trying and changing some of one's own."""

from __future__ import annotations

from typing import Annotated

import typer

from backchannel.cli.provider_words import limits_of, show_provider, why, words_of

EPILOGUE = """\
\b
Examples:
  backchannel providers
  backchannel providers add "Attic Ollama" --url http://127.0.0.1:11435/v1 --model llama3.2
"""
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, as the API answers it.")]
ProviderId = Annotated[
    str, typer.Argument(metavar="ID", help="A provider's id.", show_default=False)
]
Url = typer.Option("--url", help="Root of its API, as https://llm.example.com/v1.")
Model = typer.Option("--model", help="The model of a job that names none.")
Models = typer.Option("--models", help="A model to list; may be repeated.")
Can = typer.Option("--can", help="images, schemas or tools; may be repeated.")
Cannot = typer.Option("--cannot", help="images, schemas or tools; may be repeated.")
Price = typer.Option("--price", help="MODEL=IN,OUT in dollars per million tokens; * is any model.")
Requests = typer.Option(
    "--requests-per-minute", min=0, help="Of all workers together; 0: no limit."
)
Tokens = typer.Option("--tokens-per-minute", min=0, help="Of all workers together; 0: no limit.")
Concurrency = typer.Option(
    "--concurrency", min=0, help="Calls at once, of all workers together; 0: no limit."
)
NeedsKey = typer.Option("--needs-key/--no-key", help="Whether it is of no use without a key.")
MaxTokens = typer.Option("--max-tokens-field", help="max_tokens or max_completion_tokens.")
StreamUsage = typer.Option(
    "--stream-usage/--no-stream-usage", help="Whether it takes stream_options.include_usage."
)

providers = typer.Typer(
    help="List providers; add, show, test, edit or remove some of your own.",
    invoke_without_command=True,
    epilog=EPILOGUE,
    rich_markup_mode=None,
)


@providers.callback()
def _list_by_default(context: typer.Context, as_json: AsJson = False) -> None:
    """List providers; add, show, test, edit or remove some of your own."""
    if context.invoked_subcommand is None:
        list_providers(as_json)


@providers.command("list", epilog="\b\nExample:\n  backchannel providers list")
def list_providers(as_json: AsJson = False) -> None:
    """List the providers the API knows, and which version of the list each process runs with."""
    from backchannel.cli.client import call
    from backchannel.cli.screen import say, show_json, show_table

    found = call("GET", "/v1/providers")
    if as_json:
        show_json(found)
        return
    rows = [
        [each["id"], "yes" if each["available"] else "no", why(each),
         f"{each['id']}:{each['default_model']}" if "default_model" in each else "",
         each.get("base_url", "")]
        for each in found["data"]
    ]  # fmt: skip
    show_table(["ID", "AVAILABLE", "WHY", "DEFAULT MODEL", "BASE URL"], rows)
    runs = [
        f"{each['kind']} {each['pid']} on {each['host']} runs "
        + ("it" if each["version"] == found["version"] else f"version {each['version']}")
        for each in found["processes"]
    ]
    say(f"Version {found['version']} of the list; {', '.join(runs)}.")


@providers.command(epilog="\b\nExample:\n  backchannel providers show attic-ollama")
def show(provider_id: ProviderId, as_json: AsJson = False) -> None:
    """Show all that is known of a provider; never its key."""
    from backchannel.cli.client import call

    show_provider(call("GET", f"/v1/providers/{provider_id}"), as_json)


@providers.command(
    epilog="""\
\b
Examples:
  backchannel providers add "Attic Ollama" --url http://127.0.0.1:11435/v1 --model llama3.2
  backchannel providers add Gateway --url https://llm.example.com/v1 --model gpt-5 --can images
"""
)
def add(
    name: Annotated[str, typer.Argument(help="1 to 50 characters; its id is made of it.")],
    url: Annotated[str, Url],
    model: Annotated[str, Model],
    kind: Annotated[
        str, typer.Option("--type", help="openai-compatible or anthropic.")
    ] = "openai-compatible",
    models: Annotated[list[str] | None, Models] = None,
    can: Annotated[list[str] | None, Can] = None,
    cannot: Annotated[list[str] | None, Cannot] = None,
    price: Annotated[list[str] | None, Price] = None,
    requests_per_minute: Annotated[int | None, Requests] = None,
    tokens_per_minute: Annotated[int | None, Tokens] = None,
    concurrency: Annotated[int | None, Concurrency] = None,
    needs_key: Annotated[bool | None, NeedsKey] = None,
    max_tokens_field: Annotated[str | None, MaxTokens] = None,
    stream_usage: Annotated[bool | None, StreamUsage] = None,
    as_json: AsJson = False,
) -> None:
    """Add a provider: any server that speaks OpenAI's or Anthropic's protocol."""
    from backchannel.cli.client import call
    from backchannel.cli.screen import say

    limits = limits_of(requests_per_minute, tokens_per_minute, concurrency)
    said = words_of(
        url, model, models, can, cannot, price, limits, needs_key, max_tokens_field, stream_usage
    )
    made = call("POST", "/v1/providers", json={"name": name, "type": kind, **said})
    show_provider(made, as_json)
    say(f"Try it: backchannel providers test {made['id']}")
    if made["needs_key"] and not made["available"]:
        say(f"Its key first: backchannel keys set {made['id']}")


@providers.command(epilog="\b\nExample:\n  backchannel providers edit attic-ollama --model qwen3")
def edit(
    provider_id: ProviderId,
    url: Annotated[str | None, Url] = None,
    model: Annotated[str | None, Model] = None,
    models: Annotated[list[str] | None, Models] = None,
    can: Annotated[list[str] | None, Can] = None,
    cannot: Annotated[list[str] | None, Cannot] = None,
    price: Annotated[list[str] | None, Price] = None,
    requests_per_minute: Annotated[int | None, Requests] = None,
    tokens_per_minute: Annotated[int | None, Tokens] = None,
    concurrency: Annotated[int | None, Concurrency] = None,
    needs_key: Annotated[bool | None, NeedsKey] = None,
    max_tokens_field: Annotated[str | None, MaxTokens] = None,
    stream_usage: Annotated[bool | None, StreamUsage] = None,
    as_json: AsJson = False,
) -> None:
    """Change a provider that was added; what is not named stays as it is."""
    from backchannel.cli.client import call

    limits = limits_of(requests_per_minute, tokens_per_minute, concurrency)
    said = words_of(
        url, model, models, can, cannot, price, limits, needs_key, max_tokens_field, stream_usage
    )
    show_provider(call("PATCH", f"/v1/providers/{provider_id}", json=said), as_json)


@providers.command("test", epilog="\b\nExample:\n  backchannel providers test attic-ollama")
def try_provider(
    provider_id: ProviderId,
    model: Annotated[str | None, typer.Option(help="Another than its default model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Send a chat of one token through the queue; exit code 1 if no answer came."""
    from backchannel.cli.client import call
    from backchannel.cli.screen import complain, show_json
    from backchannel.cli.screen import show as line

    found = call(
        "POST", f"/v1/providers/{provider_id}/test", json={"model": model} if model else {},
        timeout=60,
    )  # fmt: skip
    if as_json:
        show_json(found)
    elif found["ok"]:
        line(found["message"])
    else:
        complain(found["message"])
    if not found["ok"]:
        raise typer.Exit(1)


@providers.command(epilog="\b\nExample:\n  backchannel providers discover attic-ollama --save")
def discover(
    provider_id: ProviderId,
    save: Annotated[
        bool, typer.Option("--save", help="Have them listed as its models from now on.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Ask a provider which models it has; a job may name any other all the same."""
    from backchannel.cli.client import call
    from backchannel.cli.screen import show as line
    from backchannel.cli.screen import show_json

    found = call("POST", f"/v1/providers/{provider_id}/discover")
    if save:
        call("PATCH", f"/v1/providers/{provider_id}", json={"models": found["models"]})
    if as_json:
        show_json(found)
        return
    for name in found["models"]:
        line(f"{provider_id}:{name}")


@providers.command(epilog="\b\nExample:\n  backchannel providers remove attic-ollama")
def remove(provider_id: ProviderId, as_json: AsJson = False) -> None:
    """Remove a provider that was added, and its stored key."""
    from backchannel.cli.client import call
    from backchannel.cli.screen import say, show_json

    gone = call("DELETE", f"/v1/providers/{provider_id}")
    if as_json:
        show_json(gone)
    else:
        say(f"Removed {provider_id}, and its key if one was stored.")


@providers.command(epilog="\b\nExample:\n  backchannel providers reset")
def reset(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove every provider that was added, with its stored key; the built-in ones stay."""
    from backchannel.cli.client import call
    from backchannel.cli.screen import say, show_json

    if not yes:
        typer.confirm("Remove all providers that were added, and their keys?", abort=True, err=True)
    gone = call("DELETE", "/v1/providers?confirm=true")
    if as_json:
        show_json(gone)
    else:
        say(f"Removed: {', '.join(gone['removed']) or 'none, there were none'}.")
