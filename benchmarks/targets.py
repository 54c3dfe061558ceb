"""What was promised, beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.contenders.who import FLOOR, ON_POSTGRES, ON_SQLITE, SDK_LOOP
from benchmarks.figures import Cell
from benchmarks.streams import Table
from benchmarks.work import SHORT, Work, realistic, unhurried


@dataclass(slots=True)
class Results:
    """Everything one run found out: cells of the streams, and figures by dotted names."""

    table: Table = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def cell(self, work: Work, who: str) -> Cell | None:
        """A contender's rounds at a piece of work, if it did them."""
        # by name up to the number of jobs, which differs between the quick run and the full one
        return self.table.get((work.name, who))

    def figure(self, name: str) -> float:
        """A figure; NaN if it was not measured."""
        return self.figures.get(name, math.nan)


class Target(NamedTuple):
    """One promise. `limit` is the most, or with `at_least` the least."""

    what: str
    measured: Callable[[Results], float]
    limit: float
    unit: str
    at_least: bool = False

    def reached(self, value: float) -> bool | None:
        """Whether it is kept; None if it was not measured."""
        if math.isnan(value):
            return None
        return value >= self.limit if self.at_least else value <= self.limit


def _token_ratio(to: str) -> Callable[[Results], float]:
    def ratio(results: Results) -> float:
        ours = results.cell(realistic(1000), ON_SQLITE)
        theirs = results.cell(realistic(1000), to)
        if not ours or not theirs:
            return math.nan
        return ours.per_token_us("worker") / theirs.per_token_us("worker")

    return ratio


def _delay(share: float) -> Callable[[Results], float]:
    def delay(results: Results) -> float:
        cell = results.cell(unhurried(1000), ON_SQLITE)
        return cell.delay_ms(share) if cell else math.nan

    return delay


def _job_beyond_floor(who: str) -> Callable[[Results], float]:
    def cost(results: Results) -> float:
        work = Work(SHORT, 0, 50)
        ours, floor = results.cell(work, who), results.cell(work, FLOOR)
        if not ours or not floor:
            return math.nan
        return ours.per_job_ms("worker") - floor.per_job_ms("worker")

    return cost


def _figure(name: str) -> Callable[[Results], float]:
    return lambda results: results.figure(name)


def _growth(kind: str) -> Callable[[Results], float]:
    return lambda results: (
        results.figure(f"backlog.{kind}.deep_us") / results.figure(f"backlog.{kind}.shallow_us")
    )


TARGETS = (
    Target("worker CPU a token, against the floor's", _token_ratio(FLOOR), 1.6, "×"),
    Target("worker CPU a token, against the SDK loop's", _token_ratio(SDK_LOOP), 0.25, "×"),
    Target("added first-token delay with 1,000 streams, p50", _delay(0.5), 20, "ms"),
    Target("added first-token delay with 1,000 streams, p99", _delay(0.99), 150, "ms"),
    Target("worker CPU a job beyond the floor's, SQLite", _job_beyond_floor(ON_SQLITE), 2, "ms"),
    Target(
        "worker CPU a job beyond the floor's, PostgreSQL",
        _job_beyond_floor(ON_POSTGRES),
        2,
        "ms",
    ),
    Target("publishing a token with 1,000 streams", _figure("publishing.us_per_token"), 15, "µs"),
    Target("single POSTs on one API process", _figure("posts.sqlite.per_s"), 2500, "/s", True),
    Target("lines of a batch file, accepted", _figure("lines.per_s"), 20_000, "/s", True),
    Target("memory a file's length costs, API and worker", _figure("lines.growth_mb"), 30, "MB"),
    Target(
        "durable jobs of a batch of short prompts, SQLite",
        _figure("batch.sqlite.jobs_per_s"),
        400,
        "/s",
        True,
    ),
    Target("resident memory a job in flight", _figure("memory.kb_per_job"), 60, "KB"),
    Target("`backchannel --help`", _figure("startup.help_s"), 0.3, "s"),
    Target("API ready", _figure("startup.api_s"), 2, "s"),
    Target("worker ready", _figure("startup.worker_s"), 3, "s"),
    Target("provider SDKs loaded and not used", _figure("startup.unused_sdks"), 0, ""),
    Target("next job, deep against shallow backlog, SQLite", _growth("sqlite"), 1.25, "×"),
    Target(
        "next job, deep against shallow backlog, PostgreSQL",
        _growth("postgresql"),
        1.25,
        "×",
    ),
)
