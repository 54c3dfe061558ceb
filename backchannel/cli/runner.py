"""A run: a file becomes a batch, and every line the batch has answered a line of results."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from backchannel.cli import results
from backchannel.cli.choice import Choice, choose_model, real_model_is_meant
from backchannel.cli.lines import BadLine, Line, read_lines, same_content
from backchannel.cli.progress import Progress, Tally
from backchannel.cli.screen import Failure
from backchannel.cli.sender import Batch, Sender
from backchannel.settings import Settings
from backchannel.tables import BATCH_TERMINAL, FAILED

PAGE = 1_000  # lines of results asked for at once
QUICK_LOOK_S = 0.2  # at first, so that a short file is not waited for
SLOW_LOOK_S = 1.0
WINDOW = "7d"  # a large file on a slow provider; Ctrl-C and `--retry-failed` are there before

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Order:
    """What `backchannel run` was asked to do."""

    results: Path
    errors: Path
    model: str | None
    in_order: bool
    retry_failed: bool


class Runner:
    """One run over one file. `run` it once."""

    def __init__(
        self, settings: Settings, order: Order, lines: BinaryIO, progress: Progress
    ) -> None:
        self.tally: Tally = progress.tally
        self.choice: Choice | None = None
        self.interrupted = False
        self.failure: Failure | None = None
        self.own_stack = False  # started for this run, stopped with it
        self.sender = Sender(settings, progress.say)
        self._settings = settings
        self._order = order
        self._lines = lines
        self._progress = progress
        # the first look without a key is not the answer once a real model is meant
        real = real_model_is_meant(order.model, settings)
        self._results = results.open_results(order.results, echo_counts=not real)
        self._errors = results.open_errors(order.errors)
        self._in_file: list[str] = []  # custom ids in the order of the file
        self._needed: dict[str, str] = {}  # custom ids without a result, and the ids of their lines
        self._refused: set[str] = set()  # needed ones whose last answer is an error
        self._failed: set[str] = set()  # keys of this run's failures
        self._changed = 0
        self._says = hashlib.sha256()  # all good lines
        self._model_matters = False  # some name none themselves
        self._stop = asyncio.Event()
        self._whole_file = False

    async def run(self) -> None:
        """Send and collect until every line is settled, or a signal or an absent API ends it."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt)
        work = asyncio.create_task(self._work(), name="run-work")
        stopped = asyncio.create_task(self._stop.wait(), name="run-stop")
        try:
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            self.interrupted = self._stop.is_set() and not work.done()
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
        except Failure as failure:
            self.failure = failure
        finally:
            self._tidy()
            self.own_stack = self.sender.stack.running
            if self.interrupted and self.own_stack:
                self._progress.say(
                    "Stopping; running answers may finish. Press Ctrl-C again not to wait."
                )
            await self.sender.stack.stop()
            await self.sender.close()

    def _interrupt(self) -> None:
        if self._stop.is_set():
            self.sender.stack.hurry()
        self._stop.set()

    async def _work(self) -> None:
        await self._read()
        if self._needed:
            await self._connected()
            await self._answer_needed()
        self._whole_file = True

    async def _read(self) -> None:
        """Find the lines that have no result yet, and name those that cannot be sent."""
        for number, line in enumerate(read_lines(self._lines)):
            if number % 500 == 499:
                await asyncio.sleep(0)  # a signal is heard, the progress is shown
            if isinstance(line, BadLine):
                self.tally.failed += 1
                self.tally.bad += 1
                self._failed.add(results.bad_key(line.number))
                self._errors.add(results.bad_key(line.number), results.bad(line))
                continue
            self._says.update(line.digest.encode())
            self._model_matters |= line.model is None
            if self._order.in_order:
                self._in_file.append(line.custom_id)
            known = self._results.done.get(line.custom_id)
            if known is not None and same_content(known, line):
                self.tally.skipped += 1
                self._errors.drop(line.custom_id)
                continue
            if known is not None:
                self._changed += 1
            self._needed[line.custom_id] = line.id

    async def _connected(self) -> None:
        """The API, and the model for lines that name none."""
        await self.sender.find()
        providers = await self.sender.providers()
        self.choice = await choose_model(
            self._order.model, self._settings, providers, self.sender.url
        )
        self.tally.started = time.monotonic()  # the pace is that of the jobs, not of a start
        self._progress.say(f"API {self.sender.url}" + self._watched())
        self._progress.say(self.choice.why)

    def _watched(self) -> str:
        return f", Flower {self.sender.flower_url}" if self.sender.flower_url else ""

    # ------------------------------------------------------------ batches

    async def _answer_needed(self) -> None:
        """Follow the batch of this file, the one an earlier run made or a new one; then another
        for lines that were not in it, because they had their results by then."""
        assert self.choice is not None
        # the same for the same lines and model, whenever they are sent
        seed = _digest(self._says.hexdigest(), self.choice.model if self._model_matters else "")
        while self._needed:
            key = f"run:{seed}"
            batch = await self.sender.made_with(key) or await self._send(key)
            await self._follow_all(batch)
            seed = _digest(seed, *sorted(self._needed))

    async def _follow_all(self, batch: Batch) -> None:
        """Follow a batch and the retries of it that there are; and one more if that was asked."""
        retried = False
        while True:
            await self._follow(batch)
            key = f"retry-of:{batch['id']}"
            again = await self.sender.made_with(key)
            if again is None and self._order.retry_failed and self._refused and not retried:
                retried = True
                again = await self.sender.make(f"/v1/batches/{batch['id']}/retry", key)
            if again is None:
                break
            batch = again
        for custom_id in self._refused:
            del self._needed[custom_id]
        self._failed |= self._refused
        self._refused.clear()

    async def _send(self, key: str) -> Batch:
        """Upload the lines that are needed, as a batch's input, and start it."""
        assert self.choice is not None
        with tempfile.TemporaryFile() as file:
            self._lines.seek(0)
            for number, line in enumerate(read_lines(self._lines)):
                if number % 500 == 499:
                    await asyncio.sleep(0)
                if isinstance(line, Line) and line.custom_id in self._needed:
                    file.write(_encode(line.batch_line(self.choice.model)) + b"\n")
            file.seek(0)
            file_id = await self.sender.upload(f"{self._order.results.name}.input", file)
        asked = {
            "input_file_id": file_id,
            "endpoint": "/v1/chat/completions",
            "completion_window": WINDOW,
            "metadata": {"made_by": "backchannel run"},
        }
        return await self.sender.make("/v1/batches", key, asked)

    async def _follow(self, batch: Batch) -> None:
        """Take a batch's results as they come, to its end."""
        begun = time.monotonic()
        seen = {"output": 0, "error": 0}
        while True:
            # looked at before its files: when it was over then, they are whole
            batch = (await self.sender.get(f"/v1/batches/{batch['id']}")).json()
            counts = batch["request_counts"]
            self.tally.running = counts["total"] - counts["completed"] - counts["failed"]
            for kind in seen:
                if batch[f"{kind}_file_id"] is not None:
                    seen[kind] = await self._take(batch[f"{kind}_file_id"], seen[kind])
            if batch["status"] in BATCH_TERMINAL:
                break
            quick = time.monotonic() - begun < 10
            await asyncio.sleep(QUICK_LOOK_S if quick else SLOW_LOOK_S)
        self.tally.running = 0
        if batch["status"] == FAILED:
            first = batch["errors"]["data"][0]
            raise Failure(f"The batch was refused: line {first['line']}: {first['message']}")

    async def _take(self, file_id: str, after: int) -> int:
        """The lines of a batch's file behind a place; the place of the last one."""
        while True:
            path = f"/v1/files/{file_id}/content"
            lines = (await self.sender.get(path, after=after, limit=PAGE)).content.splitlines()
            for line in lines:
                found = json.loads(line)
                after = found["seq"]
                self._settle(found)
            if len(lines) < PAGE:
                return after

    def _settle(self, found: dict[str, Any]) -> None:
        custom_id = found["custom_id"]
        line_id = self._needed.get(custom_id)
        if line_id is None:
            return
        record = results.record_of(line_id, found)
        response = found["response"] or {}
        body = response.get("body", {})
        if "usage" in body:
            self.tally.count(body["usage"])
        if response.get("status_code") == results.DONE_STATUS:
            self.tally.done += 1
            self.tally.failed -= custom_id in self._refused
            self._refused.discard(custom_id)
            del self._needed[custom_id]
            self._results.add(custom_id, record)
            self._errors.drop(custom_id)
        else:
            self.tally.failed += custom_id not in self._refused
            self._refused.add(custom_id)
            self._errors.add(custom_id, record)

    def _tidy(self) -> None:
        """Make the files last, and leave nothing in them that is no longer so."""
        if self._whole_file and not self.interrupted and self.failure is None:
            for key in self._errors.keys():  # noqa: SIM118
                if key not in self._failed:
                    self._errors.drop(key)
        self._results.close(self._in_file if self._order.in_order else None)
        self._errors.close()
        if self._changed:
            self._progress.say(
                f"{self._changed} lines say something else than when they were answered; they "
                "were sent again, and their new results replace the old."
            )


def _digest(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()
