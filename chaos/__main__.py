"""``make chaos``: run the cases, check the invariants after each, one JSON line a case."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from chaos import broker, database, provider, streams, workers  # noqa: F401  they register
from chaos.cases import CASES, Case
from chaos.invariants import check
from chaos.report import write_report
from chaos.world import World
from tests.servers import postgres, valkey


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
    arguments = parser.parse_args()
    full = arguments.profile == "full"
    chosen = [
        (case, kind)
        for case in CASES
        if arguments.only in case.name and (full or case.quick)
        for kind in (case.databases if full else case.databases[:1])
    ]

    def one(pair: tuple[Case, str]) -> dict[str, Any]:
        line = run(*pair, full=full)
        print(json.dumps(line), flush=True)
        return line

    with ThreadPoolExecutor(arguments.side_by_side) as threads:
        lines = list(threads.map(one, chosen))
    if arguments.report:
        write_report(Path("docs/reliability.md"), arguments.profile, lines)
    bad = [line["case"] for line in lines if not line["passed"]]
    print(f"{len(lines) - len(bad)} passed, {len(bad)} failed", flush=True)
    sys.exit(1 if bad or not lines else 0)


def run(case: Case, kind: str, *, full: bool) -> dict[str, Any]:
    """One case on one kind of database, from an empty folder to its verdict."""
    started = time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="chaos-"))
    line: dict[str, Any] = {"case": case.name, "database": kind}
    with valkey() as broker_:
        try:
            with postgres() if kind == "postgresql" else nullcontext() as server:
                url = server.create("chaos") if server else f"sqlite:///{home}/chaos.db"
                line |= _harm(World(home, broker_, server, url, case.settings), case, full)
        finally:
            if line.get("passed"):
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
        figures = asyncio.run(case.harm(world, full))
    except AssertionError as error:
        wrong = str(error)[:2000] or "an assertion failed"
    try:
        breaches = check(world)
    finally:
        world.close()
    return {
        "passed": not wrong and not any(breaches.values()),
        "jobs": len(world.accepted),
        **figures,
        "breaches": breaches,
        **({"wrong": wrong} if wrong else {}),
    }


if __name__ == "__main__":
    main()
