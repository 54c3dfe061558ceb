"""Both ends of the live wire: workers publish a job's events, the API follows them.

Redis holds one stream and one small hash per running job, written by one script that also
publishes. It is a cache of what the worker holds: after a FLUSHALL the worker writes it again, and
when the job has finished the stored log takes its place.

    {prefix}job:{id}     stream; entry seq+1 is event seq, in field "e"
    {prefix}job:{id}     channel; a message is one or more events, one a line
    {prefix}job:{id}:m   hash {attempt, next, ended}
    {prefix}cancel       channel; a message is a job id
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import structlog
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, ResponseError

from backchannel import events, faults
from backchannel.background import end
from backchannel.events import Event
from backchannel.pubsub import OUTAGE, Listener, RollCall

log = structlog.get_logger()

# KEYS: two for each job, its stream (whose name is its channel's too) and its hash.  ARGV: one for
# each job, of lines: "attempt first ends replace ttl" (the first seq, 1 if the last event is the
# end, 1 to replace what is there, ms), then its events.  One argument and not six and more: packing
# them was a tenth of a token's cost.  Answers a verdict for each job; an error is a verdict too,
# and only its job's.
APPEND = """
local function append(stream, hash, said)
  local words, lines = string.match(said, '^([^\\n]+)\\n(.+)$')
  local head = {}
  for word in string.gmatch(words, '%d+') do head[#head + 1] = tonumber(word) end
  local attempt, first, ends, replace, ttl = unpack(head)
  local meta = redis.call('HMGET', hash, 'attempt', 'next', 'ended')
  local known, nxt = tonumber(meta[1] or 0), tonumber(meta[2] or 0)
  if attempt < known then return 'fenced' end
  if replace == 1 then
    redis.call('DEL', stream, hash)
    nxt = first
  elseif meta[3] then return 'ended'
  elseif first > nxt then return 'behind'
  elseif attempt > known and first < nxt then return 'taken'
  end
  local seq, fresh = first, {}
  for event in string.gmatch(lines, '[^\\n]+') do
    if seq >= nxt then
      redis.call('XADD', stream, string.format('%d-0', seq + 1), 'e', event)
      fresh[#fresh + 1] = event
    end
    seq = seq + 1
  end
  if #fresh > 0 then
    redis.call('HSET', hash, 'attempt', attempt, 'next', seq)
    if ends == 1 then redis.call('HSET', hash, 'ended', 1) end
    redis.call('PEXPIRE', stream, ttl)
    redis.call('PEXPIRE', hash, ttl)
    redis.call('PUBLISH', stream, table.concat(fresh, '\\n'))
  end
  return 'ok'
end
local verdicts = {}
for i, said in ipairs(ARGV) do
  local kept, verdict = pcall(append, KEYS[2 * i - 1], KEYS[2 * i], said)
  if not kept and type(verdict) == 'table' then verdict = verdict.err end
  verdicts[i] = verdict
end
return verdicts
"""
VERDICTS = (b"ok", b"ended", b"behind", b"taken", b"fenced")
APPEND_AT_ONCE = 100  # jobs in one call of the script, which keeps Redis from all else
SEND_AT_ONCE = (
    1 << 20
)  # bytes of events in one round trip, give or take a stream's: they are copied

# A running job's stream outlives any pause between two events; a finished one is in the database.
LIVE_TTL_MS = 6 * 3_600_000
ENDED_TTL_MS = 60_000
FLUSH_PATIENCE_S = 0.5  # of an attempt that wants its events sent before it goes on
TOGETHER = 50  # events that a reader gets at once, at most: what waits for a slow one stays small


class Keys(NamedTuple):
    """The names in Redis for one job; the stream's is the channel's too."""

    stream: str
    meta: str


def keys_of(prefix: str, job_id: str) -> Keys:
    """The names of one job's wire."""
    return Keys(f"{prefix}job:{job_id}", f"{prefix}job:{job_id}:m")


async def read_log(redis: Redis, prefix: str, job_id: str, after: int = -1) -> list[Event]:
    """The events in Redis with a sequence number above `after`.

    Raises:
        RedisError: Redis does not answer.
    """
    rows: Any = await redis.xrange(keys_of(prefix, job_id).stream, min=f"{after + 2}-0")
    return [events.decode(fields[b"e"]) for _, fields in rows]


async def prior_events(redis: Redis, prefix: str, job_id: str) -> list[Event]:
    """What earlier attempts told their readers; empty when Redis lost it or does not answer."""
    try:
        return await asyncio.wait_for(read_log(redis, prefix, job_id), timeout=2.0)
    except OUTAGE as error:
        log.warning(
            "Redis did not return what a job's earlier attempt streamed; its numbers are skipped.",
            job=job_id,
            error=str(error),
        )
        return []


class Stream:
    """One attempt's end of the wire: numbers its events, keeps them, and hands them to the flusher.

    `log` is the whole stream of the job so far, earlier attempts included; it is what is stored
    when the job ends, so a reader of the stored log sees what the live readers saw.
    """

    def __init__(
        self, publisher: Publisher, job_id: str, attempt: int, prior: list[Event], first_seq: int
    ) -> None:
        self.job_id = job_id
        self.attempt = attempt
        self.log = prior
        self.fenced = False
        self.valid_until = math.inf  # monotonic; past it this process may not write any more
        self.keys = keys_of(publisher.prefix, job_id)
        self._publisher = publisher
        self._first_seq = first_seq
        self._sent = len(prior)
        self._replace = False
        self._begun = False  # something of this attempt is in Redis
        self._text: list[str] = []
        self._kind = events.DELTA

    @property
    def next_seq(self) -> int:
        """The number of the next event."""
        return self.log[-1].seq + 1 if self.log else self._first_seq

    def text(self, kind: str, text: str) -> None:
        """Add a piece of text (`delta` or `reasoning`); it goes out with the next flush."""
        if kind != self._kind:
            self._seal()
            self._kind = kind
        self._text.append(text)
        self._publisher.dirty.add(self)

    def add(self, type_: str, **fields: Any) -> None:
        """Add any other event."""
        self._seal()
        self.log.append(events.encode(self.next_seq, type_, fields))
        self._publisher.dirty.add(self)

    def _seal(self) -> None:
        if self._text:
            text, self._text = "".join(self._text), []
            self.log.append(events.encode(self.next_seq, self._kind, {"text": text}))

    def closing(self, end: dict[str, Any]) -> list[Event]:
        """The whole log with its end event, to be stored; nothing is sent yet."""
        self._seal()
        return [*self.log, events.encode(self.next_seq, events.END, end)]

    def end(self, log: list[Event]) -> None:
        """The finish is committed: send the end that `closing` composed."""
        self.log = log
        self._publisher.dirty.add(self)

    def unsent(self) -> bytes:
        """The argument of the next append; empty: there is nothing to send."""
        self._seal()
        fresh = self.log if self._replace else self.log[self._sent :]
        return _said(self.attempt, fresh, replace=self._replace) if fresh else b""

    def settle(self, verdict: bytes, sent: int) -> bool:
        """Take the script's verdict on an append; True when there is more to send."""
        match verdict:
            case b"ok" | b"ended":
                self._begun = True
                self._replace = False
                self._sent = max(self._sent, sent)
            case b"behind":
                # Redis lost what it had: it gets the whole log again
                self._replace = True
            case b"taken":
                self._replace = self._begun
            case b"fenced":
                self.fenced = True
        return (self._replace or self._sent < len(self.log)) and not self.fenced

    @property
    def must_rebase(self) -> bool:
        """The attempt before wrote on after we had read its log, and we have sent nothing yet."""
        return not self._begun and not self._replace

    def rebase(self, prior: list[Event]) -> None:
        """Put our unsent events behind a longer prior log."""
        own = [events.fields(event) for event in self.log[self._sent :]]
        self.log = prior
        self._sent = len(prior)
        for type_, fields in own:
            self.log.append(events.encode(self.next_seq, type_, fields))


def _said(attempt: int, fresh: list[Event], *, replace: bool) -> bytes:
    ends = fresh[-1].type == events.END
    ttl_ms = ENDED_TTL_MS if ends else LIVE_TTL_MS
    head = b"%d %d %d %d %d" % (attempt, fresh[0].seq, ends, replace, ttl_ms)
    return b"\n".join([head, *[event.data for event in fresh]])


class Publisher:
    """A worker process's one flusher: all its jobs' new events leave in one pipeline.

    One timer for all jobs: a timer per job fell behind by 30 s at 1,000 streams, and awaiting a
    PUBLISH per token cost 80-106 µs.
    """

    def __init__(self, redis: Redis, prefix: str) -> None:
        self.prefix = prefix
        self.dirty: set[Stream] = set()
        self._redis = redis
        self._sha = ""
        self._silent = False
        self._flushing = asyncio.Lock()
        self._task = asyncio.create_task(self._flush_forever(), name="stream-flusher")

    async def open(self, job_id: str, attempt: int, age_ms: int) -> Stream:
        """The wire of one attempt; a later attempt continues the numbers of the earlier ones."""
        prior = await prior_events(self._redis, self.prefix, job_id) if attempt > 1 else []
        first_seq = events.next_seq_after_loss(age_ms) if attempt > 1 else 0
        return Stream(self, job_id, attempt, prior, first_seq)

    async def close(self) -> None:
        """Send what is left, once, and stop."""
        await end(self._task)
        with contextlib.suppress(*OUTAGE):
            await self.flush()

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(events.FLUSH_MS / 1000)
            if not self.dirty:
                continue
            try:
                await self.flush()
            except OUTAGE as error:
                if not self._silent:
                    log.warning(
                        "Redis does not take stream events; answers go on, readers catch up when "
                        "it is back or when the job has finished.",
                        error=str(error),
                    )
                self._silent = True
                await asyncio.sleep(0.5)
            except Exception:
                # a defect: without its flusher a process would never stream again
                log.exception("Stream events could not be sent; they are sent again.")
                await asyncio.sleep(0.5)
            else:
                if self._silent:
                    log.info("Redis takes stream events again.")
                self._silent = False

    async def try_flush(self) -> None:
        """Send all new events now; a Redis that does not take them at once gets them later."""
        with contextlib.suppress(*OUTAGE):
            await asyncio.wait_for(self.flush(), FLUSH_PATIENCE_S)

    async def flush(self) -> None:
        """Send all new events, in one round trip unless they are large.

        Raises:
            RedisError: Redis did not answer; what was not confirmed is sent again.
        """
        async with self._flushing:
            batch, self.dirty = list(self.dirty), set()
            refused: Exception | None = None
            try:
                while batch:
                    batch, verdict = await self._send(batch)
                    refused = refused or verdict
            except BaseException:
                self.dirty.update(batch)
                raise
        if refused is not None:
            raise refused

    async def _send(self, batch: list[Stream]) -> tuple[list[Stream], Exception | None]:
        """Send what fits into one round trip.

        Returns:
            The streams that are left, and why Redis did not take one, if so.
        """
        if not self._sha:
            self._sha = await self._redis.script_load(APPEND)
        sending: list[tuple[Stream, int]] = []
        calls: list[tuple[list[str], list[bytes]]] = []
        left, size = batch.copy(), 0
        while left and size < SEND_AT_ONCE:
            stream = left.pop()
            if time.monotonic() > stream.valid_until:
                stream.fenced = True
            said = b"" if stream.fenced else stream.unsent()
            if said:
                if len(sending) % APPEND_AT_ONCE == 0:
                    calls.append(([], []))
                keys, arguments = calls[-1]
                keys += stream.keys
                arguments.append(said)
                size += len(said)
                sending.append((stream, len(stream.log)))
        if not sending:
            return left, None
        if faults.ARMED and any(stream.log[-1].type == events.END for stream, _ in sending):
            faults.hit("end.before")
        pipe = self._redis.pipeline(transaction=False)
        for keys, arguments in calls:
            pipe.evalsha(self._sha, len(keys), *keys, *arguments)
        answers = await pipe.execute(raise_on_error=False)
        if faults.ARMED:
            faults.hit("flush.inside")
        refused: Exception | None = None
        for number, (stream, sent) in enumerate(sending):
            answer = answers[number // APPEND_AT_ONCE]
            verdict = answer[number % APPEND_AT_ONCE] if isinstance(answer, list) else answer
            if isinstance(verdict, NoScriptError):
                self._sha = ""
                self.dirty.add(stream)
            elif isinstance(verdict, Exception) or verdict not in VERDICTS:
                # told once the others are settled: they were taken
                self.dirty.add(stream)
                if isinstance(verdict, bytes):
                    verdict = ResponseError(verdict.decode(errors="replace"))
                refused = verdict
            elif stream.settle(verdict, sent):
                self.dirty.add(stream)
                if verdict == b"taken" and stream.must_rebase:
                    stream.rebase(await read_log(self._redis, self.prefix, stream.job_id))
        return left, refused


async def close_log(
    redis: Redis, prefix: str, job_id: str, attempt: int, age_ms: int, end: dict[str, Any]
) -> list[Event]:
    """The log of a job that ends without a worker: what its attempts streamed, and the end."""
    prior = await prior_events(redis, prefix, job_id) if attempt else []
    if prior and prior[-1].type == events.END:
        prior.pop()
    seq = prior[-1].seq + 1 if prior else events.next_seq_after_loss(age_ms) if attempt else 0
    return [*prior, events.encode(seq, events.END, end)]


async def publish_closed(
    redis: Redis, prefix: str, job_id: str, attempt: int, log_: list[Event]
) -> None:
    """Tell live readers of an end no worker wrote; best effort: the stored log is the truth."""
    # as the attempt after the last one: it fences a worker that is frozen in the middle of it
    said = _said(attempt + 1, log_, replace=True)
    with contextlib.suppress(*OUTAGE):
        await redis.eval(APPEND, 2, *keys_of(prefix, job_id), said)


async def hint_cancel(redis: Redis, prefix: str, job_id: str) -> None:
    """Tell the workers of a cancel sooner than their next heartbeat would; best effort."""
    with contextlib.suppress(*OUTAGE):
        await redis.publish(f"{prefix}cancel", job_id)


# The stored log of a job, or None while it runs.
Stored = Callable[[str], Awaitable[list[Event] | None]]


async def follow(
    redis: Redis, prefix: str, listener: Listener, stored: Stored, job_id: str, after: int = -1
) -> AsyncIterator[list[Event]]:
    """A job's events numbered above `after`, first the past, then live, up to its end.

    Those that are there together come together: a reader that falls behind catches up.

    Subscribed before the first read, so no event is lost between the two; numbers sort out what
    came by both ways. Whatever happens to Redis, the stored log ends the stream.
    """
    last = after
    async with listener.subscribed(keys_of(prefix, job_id).stream) as queue:
        roll_call = RollCall(queue)
        heard, finished = await _catch_up(redis, prefix, stored, job_id, last)
        while True:
            fresh = _above(last, heard)
            for start in range(0, len(fresh), TOGETHER):
                yield fresh[start : start + TOGETHER]
            if fresh:
                last = fresh[-1].seq
            if finished or (fresh and fresh[-1].type == events.END):
                return  # also when the reader had the end already
            heard = [
                events.decode(line)
                for message in await roll_call.heard()
                for line in message.split(b"\n")
            ]
            if not heard or _has_gap(last, heard):
                heard, finished = await _catch_up(redis, prefix, stored, job_id, last)


def _above(last: int, heard: list[Event]) -> list[Event]:
    """What is new of what was heard, some of it twice: in order, up to the end."""
    fresh: list[Event] = []
    for event in heard:
        if event.seq > last:
            last = event.seq
            fresh.append(event)
            if event.type == events.END:
                break
    return fresh


def _has_gap(last: int, heard: list[Event]) -> bool:
    for event in heard:
        if event.seq > last + 1:
            return True
        last = max(last, event.seq)
    return False


async def _catch_up(
    redis: Redis, prefix: str, stored: Stored, job_id: str, last: int
) -> tuple[list[Event], bool]:
    """The events above `last` that are to be had now, and whether they are all there will be."""
    whole = await stored(job_id)
    if whole is not None:
        return whole, True
    try:
        return await read_log(redis, prefix, job_id, last), False
    except OUTAGE:
        return [], False
