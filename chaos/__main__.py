"""``make chaos``: run the cases, check the invariants after each, one JSON line a case."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from chaos import broker, database, provider, streams, workers  # noqa: F401  they register
from chaos.cases import CASES, Case
from chaos.invariants import check
from chaos.report import write_report
from chaos.stage import NotPossible, stage
from chaos.world import World


def main() -> None:
    """Exit 1 on any breach."""
    parser = argparse.ArgumentParser(
        prog="make chaos",
        description="Break the system on purpose and count what it promised.",
        epilog="Example: make chaos ARGS='--only broker'",
    )
    parser.add_argument("--profile", choices=("quick", "full"), default="quick")
    parser.add_argument("--only", default="", help="Cases whose name contains this.")
    parser.add_argument("--report", action="store_true", help="Write docs/reliability.md.")
    parser.add_argument("--side-by-side", type=int, default=2, help="Cases at a time; they wait.")
    parser.add_argument(
        "--again", type=Path, help="What an earlier run printed: what passed there is not run."
    )
    arguments = parser.parse_args()
    full = arguments.profile == "full"
    chosen = [
        (case, kind)
        for case in CASES
        if arguments.only in case.name and (full or case.quick)
        for kind in (case.databases if full else case.databases[:1])
    ]

    passed_before = _passed(arguments.again) if arguments.again else {}

    def one(pair: tuple[Case, str]) -> dict[str, Any]:
        case, kind = pair
        line = passed_before.get((case.name, kind)) or run(case, kind, full=full)
        print(json.dumps(line), flush=True)
        return line

    with ThreadPoolExecutor(arguments.side_by_side) as threads:
        lines = list(threads.map(one, chosen))
    if arguments.report:
        write_report(Path("docs/reliability.md"), arguments.profile, lines)
    bad = [line["case"] for line in lines if not line["passed"]]
    skipped = sum("skipped" in line for line in lines)
    passed = len(lines) - len(bad) - skipped
    print(f"{passed} passed, {len(bad)} failed, {skipped} skipped", flush=True)
    sys.exit(1 if bad or not lines else 0)


def _passed(earlier: Path) -> dict[tuple[str, str], dict[str, Any]]:
    lines = [line for line in earlier.read_text().splitlines() if line.startswith('{"case"')]
    found = [json.loads(line) for line in lines]
    return {(line["case"], line["database"]): line for line in found if line["passed"]}


def run(case: Case, kind: str, *, full: bool) -> dict[str, Any]:
    """One case on one kind of database, from an empty folder to its verdict, whatever happens."""
    started = time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="chaos-"))
    line: dict[str, Any] = {"case": case.name, "database": kind, "passed": False, "jobs": 0}
    line["breaches"] = {}
    try:
        with ExitStack() as stack:
            line |= _harm(stage(case, kind, home, stack, full=full), case, full)
    except NotPossible as reason:
        line |= {"passed": True, "skipped": str(reason)}
    except Exception as error:
        traceback.print_exc()
        line |= {"passed": False, "wrong": f"{type(error).__name__}: {error}"[:2000]}
    if line["passed"]:
        shutil.rmtree(home, ignore_errors=True)
    else:
        line["logs"] = str(home)
    line["seconds"] = round(time.monotonic() - started, 1)
    return line


def _harm(world: World, case: Case, full: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    wrong = ""
    try:
        world.stack.api()
        world.listen()
        figures = asyncio.run(_in_time(case.harm(world, full), world))
    except AssertionError as error:
        wrong = str(error)[:2000] or "an assertion failed"
    except Exception as error:  # one broken case must not take the others' lines with it
        wrong = f"{type(error).__name__}: {error}"[:2000]
        traceback.print_exc()
    breaches = check(world)
    return {
        "passed": not wrong and not any(breaches.values()),
        "jobs": len(world.accepted),
        **({"kills": world.kills} if world.kills else {}),
        **figures,
        "breaches": breaches,
        **({"wrong": wrong} if wrong else {}),
    }


async def _in_time(harm: Awaitable[dict[str, Any]], world: World) -> dict[str, Any]:
    limit = asyncio.timeout(world.ends - time.monotonic())
    try:
        async with limit:
            return await harm
    except TimeoutError:
        assert not limit.expired(), "the case did not come to its end in time"
        raise


if __name__ == "__main__":
    main()
