"""``make bench``: measure, print the tables, write docs/performance.md and its chart."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import structlog

from benchmarks import (
    backlog,
    batch,
    first_text,
    memory,
    page,
    posts,
    publishing,
    readers,
    startup,
    streams,
)
from benchmarks.ceiling import ceiling, provider
from benchmarks.installation import serving
from benchmarks.processes import ROOT, cores, pin
from benchmarks.progress import say, seconds
from benchmarks.targets import Results

Figures = dict[str, float]
Part = Callable[[str], Figures]  # of the provider's URL
BOTH = ("sqlite", "postgresql")


def serving_quick(url: str) -> Figures:
    """On one installation; memory first, while its worker is fresh."""
    with serving("sqlite", url) as home:
        return (
            memory.run(home)
            | batch.run(home, 1_000)
            | first_text.run(home, {1: 10})
            | readers.run(home, 500)
            | batch.lines(home, 100_000)
        )


def serving_full(url: str) -> Figures:
    """As `serving_quick` with more of everything, and the batch on PostgreSQL too."""
    with serving("sqlite", url) as home:
        figures = (
            memory.run(home)
            | batch.run(home, 5_000)
            | first_text.run(home, {1: 10, 50: 1, 200: 1, 1000: 1})
            | readers.run(home, 2_000)
            | batch.lines(home, 100_000)
        )
    with serving("postgresql", url) as home:
        return figures | batch.run(home, 5_000)


QUICK: dict[str, Part] = {
    "startup": lambda url: startup.run(1, url),
    "publishing": lambda _: publishing.run(),
    "posts": lambda url: posts.run(1, 1.0, url, BOTH[:1]),
    "serving": serving_quick,
    "backlog": lambda _: backlog.run(100_000, 3, BOTH[:1]),
}
FULL: dict[str, Part] = {
    "startup": lambda url: startup.run(2, url) | startup.unused_sdks(url),
    "publishing": lambda _: publishing.run(),
    "posts": lambda url: posts.run(5, 0.5, url, BOTH),
    "serving": serving_full,
    "backlog": lambda _: backlog.run(100_000, 5, BOTH),
}


def main() -> None:
    """Measure what was asked for; a partial run writes no page."""
    parser = argparse.ArgumentParser(
        prog="make bench",
        description="Measure Backchannel beside a bare loop and the usual designs.",
        epilog="Example: make bench QUICK=1 ARGS='--only posts --json posts.json'",
    )
    parser.add_argument("--quick", action="store_true", help="Less of everything: under 2 minutes.")
    parser.add_argument(
        "--only", action="append", choices=["streams", *FULL], help="A part; again for more."
    )
    parser.add_argument("--json", type=Path, help="Write every round there as well.")
    arguments = parser.parse_args()

    # as Ctrl-C: whatever was started is stopped on the way out
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # standard output is for the tables
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    pin([os.getpid()], cores()[0])
    parts = QUICK if arguments.quick else FULL
    results = Results()
    with provider() as child:
        url = child.readline().strip()
        results.figures |= ceiling(child, url)
        say(f"the provider's own ceiling: {results.figures['ceiling.tokens_per_s']:,.0f} tokens/s")
        chosen = arguments.only or ["streams", *parts]
        if "streams" in chosen:
            plans = streams.QUICK if arguments.quick else streams.FULL
            results.table = streams.run(plans, 1 if arguments.quick else 5, url)
            keep(arguments.json, results)
        for name, part in parts.items():
            if name in chosen:
                results.figures |= part(url)
                keep(arguments.json, results)

    print("\n\n".join((page.targets(results), page.streams(results), page.figures(results))))
    if not arguments.only:
        command = f"make bench{' QUICK=1' if arguments.quick else ''}"
        page.write(ROOT / "docs", results, command, seconds())
    say("done")


def keep(file: Path | None, results: Results) -> None:
    """Write all that was measured so far, if asked to."""
    if file is None:
        return
    cells = [
        {"work": work, "contender": who, "rounds": [asdict(each) for each in cell.rounds]}
        for (work, who), cell in results.table.items()
    ]
    whole = {"machine": page.machine(), "figures": results.figures, "streams": cells}
    file.write_text(json.dumps(whole, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
