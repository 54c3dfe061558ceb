"""How far a run is: a live bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from backchannel.cli.screen import dollars, say

PLAIN_EVERY_S = 5.0


@dataclass
class Tally:
    """What a run has come to."""

    lines: int
    done: int = 0
    failed: int = 0  # lines that were not sent are among them
    bad: int = 0
    skipped: int = 0
    running: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost_nanousd: int = 0
    unknown_usage: int = 0  # jobs whose tokens nobody knows
    unknown_cost: int = 0  # jobs without a price
    started: float = field(default_factory=time.monotonic)

    def count(self, usage: dict[str, Any] | None) -> None:
        """Add what one answer used; None: nobody knows."""
        if usage is None:
            self.unknown_usage += 1
            self.unknown_cost += 1
            return
        self.tokens_in += usage["prompt_tokens"]
        self.tokens_out += usage["completion_tokens"]
        if usage["cost_usd"] is None:
            self.unknown_cost += 1
        else:
            self.cost_nanousd += round(usage["cost_usd"] * 1e9)

    @property
    def settled(self) -> int:
        """Lines that need nothing more."""
        return self.done + self.failed + self.skipped

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return max(time.monotonic() - self.started, 0.001)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens."""
        return self.tokens_out / self.seconds

    @property
    def cost(self) -> str:
        """In words, with what is not in it."""
        known = dollars(self.cost_nanousd / 1e9)
        return known + (f" and {self.unknown_cost} of unknown price" if self.unknown_cost else "")

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end at the pace so far."""
        own = self.done + self.failed - self.bad
        left = self.lines - self.settled
        return left * self.seconds / own if own else None


class Progress:
    """Shows a tally while a run goes on."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self._bar: Any = None
        self._task_id: Any = None

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Show it until the block ends."""
        showing = asyncio.create_task(self._show_forever(), name="progress")
        try:
            yield
        finally:
            showing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await showing
            self.refresh()
            if self._bar is not None:
                self._bar.stop()

    def say(self, sentence: str) -> None:
        """A sentence beside the progress."""
        if self._bar is not None:
            # ":m:" in a model's name is no emoji
            self._bar.console.print(
                sentence, markup=False, highlight=False, emoji=False, soft_wrap=True
            )
        else:
            say(sentence)

    def refresh(self) -> None:
        """Bring the bar up to date."""
        if self._bar is not None:
            self._bar.update(self._task_id, completed=self.tally.settled, words=self.words())

    def words(self) -> str:
        """The tally in one line."""
        tally = self.tally
        eta = "" if tally.eta_s is None or not tally.running else f" · {_time(tally.eta_s)} left"
        return (
            f"{tally.done} done · {tally.failed} failed · {tally.running} running · "
            f"{tally.tokens_per_s:,.0f} tokens/s · {tally.cost}{eta}"
        )

    async def _show_forever(self) -> None:
        if not sys.stderr.isatty():
            while True:
                await asyncio.sleep(PLAIN_EVERY_S)
                say(f"{self.tally.settled} of {self.tally.lines} lines: {self.words()}")
        self._open_bar()
        while True:
            await asyncio.sleep(0.1)
            self.refresh()

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self._bar = Bar(
            BarColumn(bar_width=max(6, min(24, console.width - 90))),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}", markup=False),
            console=console,
            auto_refresh=False,
        )
        self._task_id = self._bar.add_task("", total=self.tally.lines, words="")
        self._bar.start()


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
