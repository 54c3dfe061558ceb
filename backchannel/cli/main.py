"""The command ``backchannel``: its nouns, and how every one of them fails."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from backchannel import __version__
from backchannel.cli import api, doctor, flower, run, up, usage, worker
from backchannel.cli.callers import callers
from backchannel.cli.jobs import jobs
from backchannel.cli.keys import keys
from backchannel.cli.providers import providers
from backchannel.cli.screen import Failure, complain, show
from backchannel.cli.sessions import sessions
from backchannel.cli.webhooks import webhooks

app = typer.Typer(
    name="backchannel",
    help="A self-hosted queue for LLM chat jobs: any provider, live streams, exact books.",
    epilog="\b\nExamples:\n  backchannel run prompts.jsonl\n  backchannel up",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=run.EPILOGUE)(run.run)
app.command(epilog=up.EPILOGUE)(up.up)
app.command(epilog=api.EPILOGUE)(api.api)
app.command(epilog=worker.EPILOGUE)(worker.worker)
app.command(epilog=flower.EPILOGUE)(flower.flower)
app.add_typer(jobs, name="jobs")
app.add_typer(sessions, name="sessions")
app.add_typer(webhooks, name="webhooks")
app.command(epilog=usage.EPILOGUE)(usage.usage)
app.add_typer(providers, name="providers")
app.add_typer(keys, name="keys")
app.add_typer(callers, name="callers")
app.command(epilog=doctor.EPILOGUE)(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        show(f"backchannel {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which one.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run a command; whatever goes wrong is one sentence on stderr and an exit code."""
    sys.exit(answer(sys.argv[1:]))


def answer(arguments: list[str]) -> int:
    """`main` with an exit code instead of an exit."""
    try:
        return app(arguments, prog_name="backchannel", standalone_mode=False) or 0
    except Failure as failure:
        complain(failure.sentence)
        return failure.code
    except typer.TyperException as error:  # how the command was typed
        return _misused(error)
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # `backchannel jobs | head`
        sys.stderr.close()
        return 1
    except Exception as error:
        return _explained(error)


def _misused(error: typer.TyperException) -> int:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "backchannel"
    if type(error).__name__ == "NoArgsIsHelpError":
        complain(error.format_message())
    else:
        sentence = error.format_message().rstrip(".?")
        complain(f"{sentence}. Type: {command} --help")
    return error.exit_code


def _explained(error: Exception) -> int:
    from pydantic import ValidationError

    from backchannel.errors import BackchannelError

    if isinstance(error, BackchannelError):
        complain(error.message)
        return 1
    if isinstance(error, ValidationError) and error.title == "Settings":
        first = error.errors()[0]
        name = "__".join(str(part) for part in first["loc"]).upper()
        complain(f"BACKCHANNEL_{name} cannot be used: {first['msg']}. Correct or unset it.")
        return 2
    raise error
