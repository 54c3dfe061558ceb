"""The heart of it: every contender does the same work, in turn, round after round."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import uvloop

from benchmarks.contenders.who import (
    ALL,
    FLOOR,
    ON_POSTGRES,
    ON_SQLITE,
    SDK_LOOP,
    Contender,
    contender,
    measure,
    one_turn,
)
from benchmarks.figures import Cell, Round
from benchmarks.progress import say
from benchmarks.work import AT_ONCE, SHORT, WARM_UP, Work, realistic, unhurried

SHORTLIST = (FLOOR, SDK_LOOP, ON_SQLITE)
ON_ONE_DATABASE = tuple(name for name in ALL if name != ON_POSTGRES)


class Plan(NamedTuple):
    """A piece of work, and who does it."""

    work: Work
    who: tuple[str, ...]


FULL = (
    Plan(realistic(1), ALL),
    Plan(realistic(50), ON_ONE_DATABASE),
    Plan(realistic(200), ON_ONE_DATABASE),
    Plan(realistic(1000), ON_ONE_DATABASE),
    Plan(unhurried(1000), (ON_SQLITE,)),
    Plan(realistic(50, "anthropic"), (FLOOR, ON_SQLITE)),
    Plan(Work(AT_ONCE, 200, 200), ON_ONE_DATABASE),
    Plan(Work(SHORT, 300, 50), ALL),
)
# The usual designs, which take 10 s to start, and all variants: a full run.
QUICK = (
    Plan(realistic(50), SHORTLIST),
    Plan(realistic(1000), SHORTLIST),
    Plan(unhurried(1000), (ON_SQLITE,)),
    Plan(Work(SHORT, 500, 50), SHORTLIST),
)


Table = dict[tuple[str, str], Cell]


def run(plans: Iterable[Plan], rounds: int, provider: str) -> Table:
    """Start everybody, do the rounds, stop everybody."""
    plans = tuple(plans)
    names = [name for name in ALL if any(name in plan.who for plan in plans)]
    say(f"starting {len(names)} contenders")
    with ExitStack() as stack:
        with ThreadPoolExecutor() as pool:
            starting: dict[str, Future[Contender]] = {}
            for name in names:
                own = stack.enter_context(ExitStack())
                starting[name] = pool.submit(own.enter_context, contender(name, provider))
        who = {name: started.result() for name, started in starting.items()}
        return uvloop.run(_rounds(plans, rounds, who))


async def _rounds(plans: tuple[Plan, ...], rounds: int, who: dict[str, Contender]) -> Table:
    for dialect in sorted({plan.work.dialect for plan in plans}):
        names = {name for plan in plans if plan.work.dialect == dialect for name in plan.who}
        await asyncio.gather(*[who[name].go(replace(WARM_UP, dialect=dialect)) for name in names])
    table: Table = {(plan.work.name, name): Cell() for plan in plans for name in plan.who}
    for number in range(1, rounds + 1):
        done: dict[tuple[str, Work], Round] = {}  # of this round: nothing is done twice
        for plan in plans:
            say(f"round {number} of {rounds}: {plan.work.name}")
            turns = {name: one_turn(who[name], plan.work) for name in plan.who}
            ahead = [(name, turn) for name, turn in turns.items() if (name, turn) not in done]
            # one stream each disturbs nobody: side by side
            group = len(ahead) if plan.work.concurrency == 1 else 1
            for start in range(0, len(ahead), group):
                now = ahead[start : start + group]
                results = await asyncio.gather(*[measure(who[name], turn) for name, turn in now])
                done.update(zip(now, results, strict=True))
            for name, turn in turns.items():
                table[plan.work.name, name].rounds.append(done[name, turn])
    return table
