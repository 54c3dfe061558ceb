"""A run: every line of a file becomes a job, every finished job a line of results."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from backchannel.cli import results
from backchannel.cli.choice import Choice, choose_model, real_model_is_meant
from backchannel.cli.lines import BadLine, Line, read_lines, same_content
from backchannel.cli.progress import Progress, Tally
from backchannel.cli.screen import Failure
from backchannel.cli.sender import Job, Sender
from backchannel.settings import Settings
from backchannel.tables import SUCCEEDED, TERMINAL

# Jobs sent and not yet collected: enough to keep ten worker processes busy, few enough that
# stopping leaves little behind that was not asked for.
OUTSTANDING = 2_000
SENDERS = 24
COLLECTORS = 100
WAIT_S = 20.0  # for one job, while there is a collector for each
TURN_S = 2.0  # for one job, while others wait for a collector


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
        self._failed: set[str] = set()  # keys of this run's failures
        self._changed = 0
        self._ready = asyncio.Lock()
        self._stop = asyncio.Event()
        self._todo: asyncio.Queue[Line] = asyncio.Queue(maxsize=2 * SENDERS)
        self._sent: asyncio.Queue[tuple[Line, str]] = asyncio.Queue()
        self._room = asyncio.Semaphore(OUTSTANDING)
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
        except* Failure as failures:
            self.failure = _first(failures)
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
        async with asyncio.TaskGroup() as group:
            helpers = [
                group.create_task(make(), name=f"run-{make.__name__.strip('_')}-{number}")
                for make, count in (
                    (self._send_forever, SENDERS),
                    (self._collect_forever, COLLECTORS),
                )
                for number in range(count)
            ]
            await self._feed()
            self._whole_file = True
            await self._todo.join()
            await self._sent.join()
            for helper in helpers:
                helper.cancel()

    async def _feed(self) -> None:
        for line in self._needed():
            await self._connected()
            await self._room.acquire()
            self.tally.running += 1
            await self._todo.put(line)

    def _needed(self) -> Iterator[Line]:
        """The good lines whose result is not there yet."""
        for number, line in enumerate(read_lines(self._lines)):
            if number % 1000 == 999:
                self._progress.refresh()
            if isinstance(line, BadLine):
                self.tally.failed += 1
                self.tally.bad += 1
                self._fail(results.bad_key(line.number), results.bad(line))
                continue
            if self._order.in_order:
                self._in_file.append(line.custom_id)
            known = self._results.done.get(line.custom_id)
            if known is not None and same_content(known, line):
                self.tally.skipped += 1
                self._errors.drop(line.custom_id)
                continue
            if known is not None:
                self._changed += 1
            yield line

    async def _connected(self) -> None:
        """Before the first job: the API, and the model for lines that name none."""
        if self.choice is not None:
            return
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

    # ------------------------------------------------------------ sending

    async def _send_forever(self) -> None:
        while True:
            line = await self._todo.get()
            await self._send(line)
            self._todo.task_done()

    async def _send(self, line: Line) -> None:
        assert self.choice is not None
        model = self.choice.model
        answer = await self.sender.post("/v1/jobs", line.key(model), line.body(model))
        while answer.is_success:
            job: Job = answer.json()
            again = self._order.retry_failed and "Idempotent-Replay" in answer.headers
            if job["state"] not in TERMINAL:
                self._sent.put_nowait((line, job["id"]))
                return
            if job["state"] == SUCCEEDED or not again:
                self._settle(line, job)
                return
            # it failed in an earlier run; what retried it then may have failed as well
            answer = await self.sender.post(f"/v1/jobs/{job['id']}/retry", f"retry-of:{job['id']}")
        self._settle_refused(line, answer.status_code, _body(answer.text))

    # ------------------------------------------------------------ collecting

    async def _collect_forever(self) -> None:
        while True:
            line, job_id = await self._sent.get()
            crowded = self._sent.qsize() > 0 or self.tally.running > COLLECTORS
            job = await self.sender.wait(job_id, TURN_S if crowded else WAIT_S)
            if job["state"] in TERMINAL:
                self._settle(line, job)
            else:
                self._sent.put_nowait((line, job_id))
            self._sent.task_done()

    def _settle(self, line: Line, job: Job) -> None:
        self._room.release()
        self.tally.running -= 1
        self.tally.count(job["usage"])
        if job["state"] == SUCCEEDED:
            self.tally.done += 1
            self._results.add(line.custom_id, results.success(line, job))
            self._errors.drop(line.custom_id)
        else:
            self.tally.failed += 1
            self._fail(line.custom_id, results.failure(line, job))

    def _settle_refused(self, line: Line, status: int, body: object) -> None:
        self._room.release()
        self.tally.running -= 1
        self.tally.failed += 1
        self._fail(line.custom_id, results.refusal(line, status, body))

    def _fail(self, key: str, record: dict[str, object]) -> None:
        self._failed.add(key)
        self._errors.add(key, record)

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


def _first(failures: BaseExceptionGroup[Failure]) -> Failure:
    for failure in failures.exceptions:
        return _first(failure) if isinstance(failure, BaseExceptionGroup) else failure
    raise AssertionError("a group of nothing")


def _body(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return {"error": {"message": text[:300], "code": "not_json"}}
