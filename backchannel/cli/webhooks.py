"""``backchannel webhooks``: who is told of what has ended, and how the telling went."""

from __future__ import annotations

from typing import Annotated, Any

import typer

EPILOGUE = """\
\b
Examples:
  backchannel webhooks
  backchannel webhooks add https://example.com/hooks --event batch.completed
  backchannel webhooks deliveries wh_… --state dead
"""
WebhookId = Annotated[str, typer.Argument(metavar="ID", help="A webhook's id.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, as the API answers it.")]
Limit = Annotated[int, typer.Option(min=1, max=100, help="How many.")]

webhooks = typer.Typer(
    help="List webhooks, newest first; or add, test, rotate, remove or replay.",
    invoke_without_command=True,
    epilog=EPILOGUE,
    rich_markup_mode=None,
)


@webhooks.callback()
def _bare(
    context: typer.Context,
    limit: Limit = 20,
    after: Annotated[str | None, typer.Option(help="Go on after this webhook id.")] = None,
    as_json: AsJson = False,
) -> None:
    if context.invoked_subcommand is None:
        _list(limit, after, as_json)


@webhooks.command("list", epilog="\b\nExample:\n  backchannel webhooks list")
def list_webhooks(
    limit: Limit = 20,
    after: Annotated[str | None, typer.Option(help="Go on after this webhook id.")] = None,
    as_json: AsJson = False,
) -> None:
    """List webhooks, newest first: the same as without a command."""
    _list(limit, after, as_json)


def _list(limit: int, after: str | None, as_json: bool) -> None:
    from backchannel.cli.client import call
    from backchannel.cli.screen import say, show_json, show_table

    asked = {"limit": limit} | ({"after": after} if after else {})
    page = call("GET", "/v1/webhooks", params=asked)
    if as_json:
        show_json(page)
        return
    rows = [
        [each["id"], "yes" if each["enabled"] else "no", each["url"], each["name"],
         " ".join(each["event_types"])]
        for each in page["data"]
    ]  # fmt: skip
    show_table(["ID", "ENABLED", "URL", "NAME", "EVENTS"], rows)
    if page["has_more"]:
        say(f"More: backchannel webhooks --after {page['last_id']}")


@webhooks.command(
    epilog="\b\nExample:\n"
    "  backchannel webhooks add https://example.com/hooks --event job.succeeded --event job.failed"
)
def add(
    url: Annotated[str, typer.Argument(metavar="URL", help="https://…", show_default=False)],
    event: Annotated[
        list[str] | None,
        typer.Option(help="Of what to tell; may be given more than once. Default: everything."),
    ] = None,
    name: Annotated[str, typer.Option(help="For you to know it by.")] = "",
    as_json: AsJson = False,
) -> None:
    """Add a webhook and show its signing secret, this once."""
    from backchannel.cli.client import call

    asked = {"url": url, "name": name} | ({"event_types": event} if event else {})
    _show(call("POST", "/v1/webhooks", json=asked), as_json)


@webhooks.command(epilog="\b\nExample:\n  backchannel webhooks show wh_…")
def show(webhook_id: WebhookId, as_json: AsJson = False) -> None:
    """Show a webhook."""
    from backchannel.cli.client import call

    _show(call("GET", f"/v1/webhooks/{webhook_id}"), as_json)


@webhooks.command(epilog="\b\nExample:\n  backchannel webhooks enable wh_…")
def enable(webhook_id: WebhookId, as_json: AsJson = False) -> None:
    """Switch a webhook on again, which was switched off when its receiver answered 410."""
    from backchannel.cli.client import call

    _show(call("PATCH", f"/v1/webhooks/{webhook_id}", json={"enabled": True}), as_json)


@webhooks.command(
    "test", epilog="\b\nExample:\n  backchannel webhooks test wh_… --event batch.completed"
)
def send_test(
    webhook_id: WebhookId,
    event: Annotated[str | None, typer.Option(help="Which; default: its first.")] = None,
    as_json: AsJson = False,
) -> None:
    """Send a webhook one event now; exit code 1 unless its receiver answers 2xx."""
    from backchannel.cli.client import call
    from backchannel.cli.screen import Failure, show_json
    from backchannel.cli.screen import show as line

    result = call("POST", f"/v1/webhooks/{webhook_id}/test", json={"event_type": event})
    if as_json:
        show_json(result)
    elif not result["error"]:
        line(f"It answered {result['status_code']} to {result['event_type']}.")
    if result["error"]:
        raise Failure(result["error"])


@webhooks.command(epilog="\b\nExample:\n  backchannel webhooks rotate wh_…")
def rotate(webhook_id: WebhookId, as_json: AsJson = False) -> None:
    """Make a new signing secret and show it, this once; for a day the old one signs as well."""
    from backchannel.cli.client import call

    _show(call("POST", f"/v1/webhooks/{webhook_id}/rotate"), as_json)


@webhooks.command(epilog="\b\nExample:\n  backchannel webhooks remove wh_…")
def remove(webhook_id: WebhookId, as_json: AsJson = False) -> None:
    """Remove a webhook, with its deliveries."""
    from backchannel.cli.client import call
    from backchannel.cli.screen import show as line
    from backchannel.cli.screen import show_json

    removed = call("DELETE", f"/v1/webhooks/{webhook_id}")
    if as_json:
        show_json(removed)
    else:
        line(f"{removed['id']} is removed.")


@webhooks.command(epilog="\b\nExample:\n  backchannel webhooks deliveries wh_… --state dead")
def deliveries(
    webhook_id: WebhookId,
    state: Annotated[str | None, typer.Option(help="pending, delivered or dead.")] = None,
    limit: Limit = 20,
    after: Annotated[str | None, typer.Option(help="Go on after this delivery id.")] = None,
    as_json: AsJson = False,
) -> None:
    """List what a webhook was told or is being told, newest subjects first."""
    from backchannel.cli.client import call
    from backchannel.cli.screen import say, show_json, show_table

    asked = {"limit": limit, "state": state, "after": after}
    page = call(
        "GET",
        f"/v1/webhooks/{webhook_id}/deliveries",
        params={name: value for name, value in asked.items() if value is not None},
    )
    if as_json:
        show_json(page)
        return
    names = ("id", "event_type", "subject", "state", "tries", "status_code", "error")
    show_table(
        [name.upper() for name in names], [[d[name] for name in names] for d in page["data"]]
    )
    if page["has_more"]:
        say(f"More: backchannel webhooks deliveries {webhook_id} --after {page['next']}")


@webhooks.command(epilog="\b\nExample:\n  backchannel webhooks replay wh_… evt_…")
def replay(
    webhook_id: WebhookId,
    delivery_id: Annotated[
        str | None, typer.Argument(metavar="DELIVERY", help="Default: all that are dead.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send a delivery once more, or all that were given up."""
    from backchannel.cli.client import call
    from backchannel.cli.screen import show as line
    from backchannel.cli.screen import show_json

    one = f"{delivery_id}/" if delivery_id else ""
    answer = call("POST", f"/v1/webhooks/{webhook_id}/deliveries/{one}replay")
    if as_json:
        show_json(answer)
    else:
        line(f"{1 if delivery_id else answer['replayed']} will be sent once more.")


def _show(webhook: dict[str, Any], as_json: bool) -> None:
    from backchannel.cli.screen import say, show_json
    from backchannel.cli.screen import show as line

    if as_json:
        show_json(webhook)
        return
    for name in ("id", "url", "name", "enabled", "disabled_reason", "signing_secret"):
        if webhook.get(name) not in (None, ""):
            line(f"{name:<16} {webhook[name]}")
    line(f"{'event_types':<16} {' '.join(webhook['event_types'])}")
    if "signing_secret" in webhook:
        say("Keep the secret now: it is not shown again.")
