"""The life of one attempt: claim, call on record, stream, finish; the one place that retries."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import Any, TypeVar

import structlog
from msgspec.structs import astuple
from sqlalchemy.exc import SQLAlchemyError

from backchannel import books, events, faults, lifecycle
from backchannel.bus import Stream
from backchannel.errors import (
    BUSY,
    UNWELL,
    BackchannelError,
    ProviderError,
    Unavailable,
    falls_back,
)
from backchannel.events import end_fields
from backchannel.lifecycle import Ask, Claim
from backchannel.limits import Place
from backchannel.pricing import Tokens, price
from backchannel.registry import Provider
from backchannel.tables import CANCELLED, EXPIRED, FAILED, INTERACTIVE, SUCCEEDED
from backchannel.writer import Work
from workers.answer import Answer
from workers.backoff import retry_delay_s
from workers.circuit import Circuit, Passage
from workers.fallback import first_model, may_pass, next_model
from workers.process import Process
from workers.providers import ChatRequest, Finish, adapter_for
from workers.report import Report, report
from workers.stops import End, Stop, Stopped, stopped

log = structlog.get_logger()
T = TypeVar("T")

MAX_LAG_S = 0.2  # a loop this late takes no more jobs: overload would become connect timeouts
# Jobs that wait in their slots for the last chance, so that one follows the other at once: whoever
# is turned away is rung for again after 5 s.
MAX_HOPING = 4
MOST_TOKENS = 2**53  # what a provider reports beyond this, or below 0, is not a count


async def run(
    process: Process, job_id: str, provider_id: str | None = None, lane: str = INTERACTIVE
) -> Report | None:
    """Run one job's next attempt to its end; None means there was nothing to do, or it must wait.

    Args:
        provider_id: Whose limits to look at first; None: the job's, whoever that is.
    """
    way = provider_id, lane
    last = max(process.settings.max_crashes - 1, 1)
    done, claimed = await _attempt(process, job_id, way, crashes_below=last)
    if not claimed and process.hoping < MAX_HOPING:
        process.hoping += 1
        try:
            async with process.last_chance:
                most = lifecycle.PATIENCE * (last + 1)
                done, _ = await _attempt(process, job_id, way, crashes_below=most)
        finally:
            process.hoping -= 1
    return done


async def _attempt(
    process: Process, job_id: str, way: tuple[str | None, str], *, crashes_below: int
) -> tuple[Report | None, bool]:
    """Claim and run, if the provider takes calls; also tells whether there was anything to do."""
    if process.watchdog.lag_s > MAX_LAG_S:
        await process.watchdog.caught_up(MAX_LAG_S)
    if process.draining:
        return None, False
    if way[0] in process.gate.open:
        return await _claimed(process, job_id, way[0], None, crashes_below)
    place = await process.gate.enter(job_id, *way)
    if place is None:
        return None, True
    try:
        return await _claimed(process, job_id, way[0], place, crashes_below)
    finally:
        await process.gate.leave(place)


async def _claimed(
    process: Process, job_id: str, provider_id: str | None, place: Place | None, crashes_below: int
) -> tuple[Report | None, bool]:
    asked = time.monotonic()
    try:
        claim = await process.db.write(
            lambda c: lifecycle.claim(
                c, job_id, process.owner, process.settings.lease_s, crashes_below, provider_id
            )
        )
    except Unavailable as error:
        log.warning("A job could not be claimed; it is rung again.", job=job_id, error=str(error))
        return None, False
    if claim is None:
        return None, False
    if faults.ARMED:
        faults.hit("claim.committed", f"{claim.provider}:{claim.model}")
    this = Run(process, claim, asked, place)
    process.runs[job_id, claim.attempt] = this
    try:
        return await this.go(), True
    finally:
        del process.runs[job_id, claim.attempt]


class Run:
    """One attempt in flight."""

    def __init__(
        self, process: Process, claim: Claim, claimed_at: float, place: Place | None = None
    ) -> None:
        self.process = process
        self.claim = claim
        self.place = place  # what was taken of the provider's limits, where it has any
        self.answer = Answer(claim.job_id)
        self.provider: Provider | None = None
        self.called = False
        self.written = False  # its end is: from here on nobody can take the attempt away
        self._circuit: Circuit | None = None
        self._stop: Stop | None = None
        self._calling: asyncio.Task[Finish] | None = None
        # monotonic; infinite until the call is made: a process's first call imports its SDK before
        self._asked = self._heard = math.inf
        self._renewed = claimed_at
        self._expires = claimed_at + claim.left_ms / 1000
        self.stream: Stream | None = None

    # ------------------------------------------------------------ what others do to a run

    def stop(self, reason: Stop) -> None:
        """End the provider call; the first reason stands. After the call it changes nothing."""
        if self.written:
            return
        self._stop = self._stop or reason
        if reason == "lost" and self.stream is not None:
            self.stream.fenced = True
        self._cancel_if_stopped()

    def _cancel_if_stopped(self) -> None:
        if self._stop is not None and self._calling is not None:
            self._calling.cancel()

    def renew(self, at: float) -> None:
        """The lease was renewed by a statement sent at this monotonic time."""
        self._renewed = at
        if self.stream is not None:
            self.stream.valid_until = at + self.process.settings.fence_s

    def check(self, now: float) -> None:
        """Look at the fence and the deadlines; called a few times a second for all runs."""
        settings = self.process.settings
        content = settings.idle_s if self.answer.begun else settings.first_byte_s
        if now - self._renewed > settings.fence_s:
            self.stop("lost")
        elif now > self._expires:
            self.stop("expired")
        elif self._calling is None:
            return
        elif now - self._asked > settings.attempt_s:
            self.stop("too_long")
        elif now - self._heard > content:
            self.stop("stalled")

    # ------------------------------------------------------------ its own life

    async def go(self) -> Report | None:
        """Stream the answer and write the one finish; None if the attempt was no longer ours."""
        process, claim = self.process, self.claim
        self.stream = await process.publisher.open(claim.job_id, claim.attempt, claim.age_ms)
        self.renew(self._renewed)
        first = events.STARTED if claim.attempt == 1 else events.RESET
        self.stream.add(first, attempt=claim.attempt, model=f"{claim.provider}:{claim.model}")
        try:
            finish = await self._call()
        except ProviderError as error:
            return await self._after_error(error)
        except Unavailable:
            # the database stayed away before the call: not the job's fault
            return await self._after_stop("handed_back")
        except BackchannelError as error:
            if (ask := next_model(self.claim, error)) is not None:
                return await self._fall_back(error, ask)
            return await self._finish(FAILED, error_code=error.code, error_message=error.message)
        except Stopped as end:
            return await self._after_stop(end.reason)
        except Exception as error:
            # a defect of ours: the job ends with it rather than loop, the log has where, not what
            log.exception("A job failed by a defect of this software.", job=claim.job_id)
            return await self._finish(
                FAILED, error_code="internal_error", error_message=type(error).__name__
            )
        return await self._finish(SUCCEEDED, finish_reason=finish.reason)

    async def _call(self) -> Finish:
        """Get the client, put the call on record, make it, and take its events as they come."""
        clients = self.process.clients
        if self.claim.registry_version != self.process.registry.version:
            await self.process.roster.refresh()
        self.provider = provider = self.process.registry.get(self.claim.provider)
        if provider.id not in self.process.gate.open:
            self._check_hold(provider)
        self._circuit = clients.circuit(provider)
        with self._circuit.passage(self.claim.job_id) as passage:
            # before the record: a process's first client imports its SDK, 1-2 s without a call
            async with clients.use(provider) as client:
                await self._put_on_record()
                answering = self._answer(client, provider, passage)
                self._calling = asyncio.create_task(answering, name=self.claim.job_id)
                self._cancel_if_stopped()  # a stop that came while the call was put on record
                try:
                    return await self._calling
                except asyncio.CancelledError:
                    if self._stop is None:
                        raise
                    raise stopped(self._stop) from None
                finally:
                    self._calling = None

    def _check_hold(self, provider: Provider) -> None:
        """Not called, also not by who has fallbacks and did not wait for the end of the hold."""
        left_s = self.process.gate.held_s(provider)
        if self.place is not None:
            left_s = max(left_s, self.place.held_s)
        if left_s > 0:
            raise ProviderError(
                f"Provider '{provider.id}' has asked to be left alone for now.",
                code="rate_limited",
                retry_after_s=left_s,
            )

    async def _put_on_record(self) -> None:
        if self._stop is not None:
            raise stopped(self._stop)
        self._fault("call.before_mark")
        if not await self.process.persist(lambda c: lifecycle.mark_call(c, self.claim)):
            raise Stopped("lost")
        self._fault("call.marked")
        self.called = True
        if self.place is not None:
            self.place.called_at = time.monotonic()

    async def _answer(self, client: Any, provider: Provider, passage: Passage) -> Finish:
        claim, settings = self.claim, self.process.settings
        request = ChatRequest(
            provider=provider,
            model=claim.model,
            messages=claim.messages,
            parameters=claim.parameters,
            # also when nobody can watch: content is what the watchdog hears, and what a broken
            # attempt has spent is known only from its stream
            stream=True,
            line_cap=settings.max_line_bytes,
            answer_cap=settings.max_answer_bytes,
        )
        chat = adapter_for(provider)
        take = self.answer.taker(self.stream if claim.stream else None)
        async with contextlib.aclosing(chat(client, request)) as said:  # type: ignore[type-var]
            self._asked = self._heard = time.monotonic()
            async for event in said:
                self._heard = time.monotonic()
                if type(event) is Finish:
                    passage.well()
                    return event
                take(event)
                if self.answer.begun and not passage.answered:
                    passage.well()
                if faults.ARMED and self.answer.begun:
                    self._fault("answer.first_delta")
        raise ProviderError("The adapter ended without a finish.", code="truncated")

    async def _after_error(self, error: ProviderError) -> Report | None:
        claim = self.claim
        if self.called:
            log.info(
                "A provider call failed.",
                job=claim.job_id,
                attempt=claim.attempt,
                code=error.code,
                error=error.message,
            )
            if error.code in BUSY and error.retry_after_s and self.provider is not None:
                await self.process.gate.hold(self.provider, error.retry_after_s)
            circuit = self._circuit
            if error.code in UNWELL and circuit and not circuit.blames(claim.job_id):
                error.excuse(circuit.wait_s())
        ask = None
        if claim.fallbacks and not self.answer.begun:
            if (ask := next_model(claim, error)) is not None:
                return await self._fall_back(error, ask)
            ask = first_model(claim) if await self._may_begin_again(error) else None
        left_s = self._expires - time.monotonic()
        delay_s = retry_delay_s(error, claim, self.process.settings, left_s)
        if delay_s is None:
            return await self._finish(FAILED, error_code=error.code, error_message=error.message)
        await self._say_retrying(error, delay_s)
        spent = self._spent(complete=False)
        kept = await self._write(
            lambda c: lifecycle.retry_later(
                c,
                claim,
                delay_s=delay_s,
                burns_attempt=error.policy.burns_attempt,
                error_code=error.code,
                error_message=error.message,
                spent=spent,
                ask=ask,
            )
        )
        return report(self.claim, f"retrying after {error.code}", spent) if kept else None

    async def _say_retrying(self, error: BackchannelError, delay_s: float) -> None:
        assert self.stream is not None
        self.stream.add(
            events.RETRYING,
            attempt=self.claim.attempt,
            code=error.code,
            message=error.message,
            delay_ms=int(delay_s * 1000),
        )
        # sent before the job is free: the next attempt may begin at once, and fences this one off
        await self.process.publisher.try_flush()

    async def _fall_back(self, error: BackchannelError, ask: Ask) -> Report | None:
        """Leave the job to its next model, at once."""
        await self._say_retrying(error, 0)
        spent = self._spent(complete=False)
        bell = await self._write(
            lambda c: lifecycle.fall_back(
                c, self.claim, ask, error_code=error.code, error_message=error.message, spent=spent
            )
        )
        if bell is None:
            return None
        await self.process.ring(bell)
        return report(self.claim, f"falling back after {error.code}", spent)

    async def _may_begin_again(self, error: ProviderError) -> bool:
        """Whether the job, of whose models none has answered, goes on with its first one.

        By the usual rules of a retry. What the last one said for good is not the last word, if
        another of them said "later".
        """
        if error.retryable or not falls_back(error):
            return error.retryable
        met: set[str] = set()
        with contextlib.suppress(Unavailable):
            met = await self.process.persist(lambda c: lifecycle.errors_met(c, self.claim.job_id))
        if may_pass(met):
            error.policy = error.policy._replace(retryable=True)
        return error.policy.retryable

    async def _after_stop(self, reason: End) -> Report | None:
        match reason:
            case "lost" | "handed_back":
                spent = self._spent(complete=False)
                back = await self._write(lambda c: lifecycle.hand_back(c, self.claim, spent))
                return report(self.claim, "handed back", spent) if back else None
            case "cancelled":
                return await self._finish(CANCELLED)
            case "expired":
                return await self._finish(
                    EXPIRED, error_code="expired", error_message="The job's deadline passed."
                )

    async def _finish(
        self,
        state: str,
        *,
        finish_reason: str | None = None,
        error_code: str | None = None,
        error_message: str | None = None,
        bare: bool = False,
    ) -> Report | None:
        """The one finish; `bare` leaves out what the provider said, because it cannot be stored."""
        spent = self._spent(complete=state == SUCCEEDED)
        if bare and spent is not None:
            spent = books.Spent("unknown", None)
        assert self.stream is not None
        end = end_fields(
            state, finish_reason, spent.as_json() if spent else None, error_code, error_message
        )
        closed = self.stream.closing(end)
        outcome = books.Outcome(
            state=state,
            log=events.pack_log(closed),
            finish_reason=finish_reason,
            message=None if bare else self.answer.message(),
            error_code=error_code,
            error_message=error_message,
            spent=spent,
        )
        self._fault("finish.before")
        try:
            finished = await self._write(lambda c: lifecycle.finish(c, self.claim, outcome))
        except SQLAlchemyError:
            if bare:
                raise
            # or the job would run again, and be paid again, until it counts as poison
            log.exception("The database refused a finish.", job=self.claim.job_id)
            return await self._finish(
                FAILED,
                error_code="internal_error",
                error_message="The database refused the answer.",
                bare=True,
            )
        if not finished:
            return None
        self._fault("finish.committed")
        self.stream.end(closed)
        await self.process.ring(finished.next)
        return report(self.claim, state, spent)

    async def _write(self, work: Work[T]) -> T | None:
        """Write what ends the attempt; a database that stays away leaves it to the reaper."""
        try:
            written = await self.process.persist(work)
            # the commit has just proved whose attempt it is: its last event may still go out
            self.renew(time.monotonic())
            self.written = bool(written)
            return written
        except Unavailable as error:
            log.error(
                "An attempt's end could not be written; its job runs again when the lease is over.",
                job=self.claim.job_id,
                error=str(error),
            )
            return None

    def _fault(self, point: str) -> None:
        if faults.ARMED:
            faults.hit(point, f"{self.claim.provider}:{self.claim.model}")

    def _spent(self, *, complete: bool) -> books.Spent | None:
        """What the attempt spent; None if no call was made, ``unknown`` if nobody told."""
        if not self.called:
            return None
        usage = self.answer.usage
        if usage is None or self.provider is None:
            return books.Spent("unknown", None)
        if not all(0 <= count <= MOST_TOKENS for count in astuple(usage)):
            return books.Spent("unknown", None)
        if self.place is not None:
            self.place.tokens = usage.input_tokens + usage.output_tokens
        tokens = Tokens(
            usage.input_tokens,
            usage.output_tokens,
            usage.cached_tokens,
            usage.cache_write_tokens,
            usage.reasoning_tokens,
        )
        cost = price(self.provider, self.claim.model, tokens)
        return books.Spent("final" if complete else "partial", tokens, cost.nanousd, cost.date)
