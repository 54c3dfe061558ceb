"""``backchannel jobs``: list, show, cancel, retry and watch them."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

EPILOGUE = """\
\b
Examples:
  backchannel jobs --state failed --limit 50
  backchannel jobs show job_…
"""
JobId = Annotated[str, typer.Argument(metavar="ID", help="A job's id.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, as the API answers it.")]

jobs = typer.Typer(
    help="List jobs, newest first; or show, cancel, retry or watch one.",
    invoke_without_command=True,
    epilog=EPILOGUE,
    rich_markup_mode=None,
)


@jobs.callback()
def list_jobs(
    context: typer.Context,
    state: Annotated[str | None, typer.Option(help="queued, running, succeeded, …")] = None,
    lane: Annotated[str | None, typer.Option(help="interactive or batch.")] = None,
    model: Annotated[str | None, typer.Option(help="As in openai:gpt-5-mini.")] = None,
    provider: Annotated[str | None, typer.Option(help="A provider's id.")] = None,
    session: Annotated[str | None, typer.Option(help="A session's id.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 20,
    after: Annotated[str | None, typer.Option(help="Go on after this job id.")] = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first; or show, cancel, retry or watch one."""
    if context.invoked_subcommand is not None:
        return
    from backchannel.cli.client import call
    from backchannel.cli.screen import say, show_json, show_table

    asked = {
        "state": state, "lane": lane, "model": model, "provider": provider, "session": session,
        "limit": limit, "after": after,
    }  # fmt: skip
    page = call("GET", "/v1/jobs", params={k: v for k, v in asked.items() if v is not None})
    if as_json:
        show_json(page)
        return
    columns = ("ID", "STATE", "MODEL", "IN", "OUT", "COST", "CREATED", "ERROR")
    show_table(columns, map(_row, page["data"]))
    if page["has_more"]:
        say(f"More: backchannel jobs --after {page['next']}")


@jobs.command(epilog="\b\nExample:\n  backchannel jobs show job_…")
def show(job_id: JobId, as_json: AsJson = False) -> None:
    """Show where a job stands, what it answered and what it cost."""
    from backchannel.cli.client import call

    _show(call("GET", f"/v1/jobs/{job_id}"), as_json)


@jobs.command(epilog="\b\nExample:\n  backchannel jobs cancel job_…")
def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """Cancel a job; a running one stops within a second."""
    from backchannel.cli.client import call

    _show(call("POST", f"/v1/jobs/{job_id}/cancel"), as_json)


@jobs.command(epilog="\b\nExample:\n  backchannel jobs retry job_…")
def retry(job_id: JobId, as_json: AsJson = False) -> None:
    """Do a finished job again, as a new job."""
    from backchannel.cli.client import call

    _show(call("POST", f"/v1/jobs/{job_id}/retry"), as_json)


@jobs.command(epilog="\b\nExample:\n  backchannel jobs watch job_…")
def watch(
    job_id: JobId,
    as_json: Annotated[bool, typer.Option("--json", help="Print one event a line.")] = False,
) -> None:
    """Stream a job's answer, from its beginning, live; a lost connection resumes."""
    from backchannel.cli.watch import follow

    raise typer.Exit(follow(job_id, as_json=as_json))


def _show(job: dict[str, Any], as_json: bool) -> None:
    from backchannel.cli.screen import dollars, show_json
    from backchannel.cli.screen import show as line

    if as_json:
        show_json(job)
        return
    facts: list[tuple[str, object]] = [
        (name, job.get(name))
        for name in (
            "id", "state", "model", "model_reason", "fallback_from", "lane", "session",
            "turns_dropped", "interrupted_by", "parent_id", "created_at", "started_at",
            "finished_at", "attempt", "retries", "crashes", "finish_reason",
        )
    ]  # fmt: skip
    facts.insert(4, ("fallbacks", ", ".join(job["fallbacks"])))
    facts += [("metadata", ", ".join(f"{k}={v}" for k, v in job["metadata"].items()))]
    if usage := job["usage"]:
        facts += [
            ("tokens", f"{usage['input_tokens']} in, {usage['output_tokens']} out"),
            ("cost", dollars(usage["cost_usd"])),
        ]
    if error := job["error"]:
        facts += [("error", f"{error['code']}: {error['message']}")]
    for name, value in facts:
        if value not in (None, ""):
            line(f"{name:<14} {value}")
    message = job["message"] or {}
    if message.get("content"):
        line()
        line(message["content"])
    for each in message.get("tool_calls") or []:
        line(f"{each['function']['name']}({each['function']['arguments']})")
    sys.stdout.flush()


def _row(job: dict[str, Any]) -> list[object]:
    from backchannel.cli.screen import dollars

    usage = job["usage"] or {}
    cost = dollars(usage["cost_usd"]) if usage else None
    tokens = [usage.get("input_tokens"), usage.get("output_tokens")]
    error = (job["error"] or {}).get("code")
    return [job["id"], job["state"], job["model"], *tokens, cost, job["created_at"], error]
