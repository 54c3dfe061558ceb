"""``backchannel run FILE``: every line answered, whatever happens on the way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

if TYPE_CHECKING:
    from backchannel.cli.runner import Runner

EPILOGUE = """\
\b
Examples:
  backchannel run prompts.jsonl
  backchannel run prompts.jsonl --model openai:gpt-5-mini --in-order -o answers.jsonl
  echo '{"prompt": "Hello"}' | backchannel run -

\b
A line is an OpenAI batch line or {"prompt": "…"}, with "system", "model", "custom_id" and the
parameters of chat completions beside it. Run it again to go on where it stopped.
"""


def run(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="JSON lines; - is stdin.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="OUT", help="Default: FILE's name.results.jsonl, here."
        ),
    ] = None,
    errors: Annotated[
        Path | None, typer.Option(metavar="ERR", help="Default: FILE's name.errors.jsonl, here.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="For lines that name none themselves.")
    ] = None,
    in_order: Annotated[
        bool, typer.Option("--in-order", help="At the end, put OUT into the order of FILE.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Send lines again that failed before.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Send nothing if any line cannot be sent.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as one JSON object.")
    ] = False,
) -> None:
    """Answer every line of a file; starts what is missing, and continues what was stopped."""
    import asyncio
    import contextlib

    from backchannel.cli.lines import count_lines
    from backchannel.cli.progress import Progress, Tally
    from backchannel.cli.runner import Order, Runner
    from backchannel.settings import get_settings

    stem = "stdin" if file == "-" else Path(file).stem
    order = Order(
        results=out or Path(f"{stem}.results.jsonl"),
        errors=errors or Path(f"{stem}.errors.jsonl"),
        model=model,
        in_order=in_order,
        retry_failed=retry_failed,
    )
    with contextlib.closing(_open(file)) as lines:
        _check_paths(file, order.results, order.errors)
        tally = Tally(count_lines(lines))
        if strict:
            _check_lines(lines)
        progress = Progress(tally)

        async def go() -> Runner:
            runner = Runner(get_settings(), order, lines, progress)
            async with progress.shown():
                await runner.run()
            return runner

        runner = asyncio.run(go())
    raise typer.Exit(_conclude(file, order.results, order.errors, runner, as_json))


def _open(file: str) -> BinaryIO:
    import shutil
    import sys
    import tempfile

    from backchannel.cli.screen import misuse

    if file != "-":
        try:
            return Path(file).open("rb")
        except OSError as error:
            misuse(f"{file} cannot be read: {error.strerror}. Type: backchannel run FILE")
    # read to its end first: the number of lines is part of the progress
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    shutil.copyfileobj(sys.stdin.buffer, copy)
    copy.seek(0)
    return copy


def _check_paths(file: str, out: Path, errors: Path) -> None:
    from backchannel.cli.screen import misuse

    if out.resolve() == errors.resolve():
        misuse("OUT and ERR are the same file. Give two with -o and --errors.")
    for path in (out, errors):
        if file != "-" and path.exists() and path.samefile(file):
            misuse(f"{path} is the input itself. Give another with -o and --errors.")
        if path.is_dir() or not path.parent.is_dir():
            misuse(f"{path} cannot be written. Give a file in a folder that is there.")


def _check_lines(lines: BinaryIO) -> None:
    from backchannel.cli.lines import BadLine, read_lines
    from backchannel.cli.screen import misuse, say

    bad = [line for line in read_lines(lines) if isinstance(line, BadLine)]
    for line in bad[:20]:
        say(f"Line {line.number}: {line.message}")
    if bad:
        misuse(
            f"{len(bad)} lines cannot be sent, so nothing was. Correct them, or type the same "
            "without --strict."
        )
    lines.seek(0)


def _conclude(file: str, out: Path, errors: Path, runner: Runner, as_json: bool) -> int:
    from backchannel.cli.screen import complain, show_json

    tally = runner.tally
    left = tally.lines - tally.settled
    complete = left == 0 and tally.failed == 0
    code = 130 if runner.interrupted else 0 if complete else 1
    if runner.failure is not None:
        complain(runner.failure.sentence)
        code = runner.failure.code
    if as_json:
        show_json(_summary(out, errors, runner, left))
    else:
        _tell(file, out, errors, runner, left)
    return code


def _summary(out: Path, errors: Path, runner: Runner, left: int) -> dict[str, Any]:
    tally = runner.tally
    return {
        "lines": tally.lines,
        "done": tally.done,
        "failed": tally.failed,
        "bad": tally.bad,
        "skipped": tally.skipped,
        "left": left,
        "input_tokens": tally.tokens_in,
        "output_tokens": tally.tokens_out,
        "unknown_usage": tally.unknown_usage,
        "cost_usd": tally.cost_nanousd / 1e9,
        "cost_nanousd": tally.cost_nanousd,
        "unknown_price": tally.unknown_cost,
        "seconds": round(tally.seconds, 3),
        "output_tokens_per_s": round(tally.tokens_per_s, 1),
        "model": runner.choice.model if runner.choice else None,
        "api_url": runner.sender.url or None,
        "flower_url": runner.sender.flower_url,
        "results": str(out),
        "errors": str(errors) if errors.exists() else None,
        "interrupted": runner.interrupted,
    }


def _tell(file: str, out: Path, errors: Path, runner: Runner, left: int) -> None:
    from backchannel.cli.screen import show

    tally = runner.tally
    counts = f"{tally.done} done, {tally.failed} failed, {tally.skipped} done before"
    show(f"{counts}, {left} left" if left else counts)
    unknown = f", {tally.unknown_usage} jobs of unknown usage" if tally.unknown_usage else ""
    show(
        f"{tally.tokens_in:,} tokens in, {tally.tokens_out:,} out{unknown}; {tally.cost}; "
        f"{tally.seconds:.1f} s, {tally.tokens_per_s:,.0f} tokens/s"
    )
    if out.exists():
        show(f"Results: {out}")
    if tally.failed:
        show(f"Errors: {errors}")
    if left:
        goes_on = "" if runner.own_stack else " and goes on"
        show(f"What was sent is stored{goes_on}. Go on with: {_again(file)}")
    elif tally.failed > tally.bad:
        show(f"Try those that failed once more: {_again(file)} --retry-failed")
    elif tally.bad:
        show(f"Correct the {tally.bad} lines named in {errors}, and type: {_again(file)}")
    else:
        show("Watch jobs and workers in the browser next time: backchannel up")


def _again(file: str) -> str:
    import shlex

    return f"backchannel run {shlex.quote(file)}"
