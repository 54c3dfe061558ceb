"""The part of a worker, played by a test step by step; and the API served on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx2

from api.main import listen, make_server
from backchannel import lifecycle
from backchannel.books import Spent
from backchannel.bus import Publisher, Stream
from backchannel.db import Database
from backchannel.events import Event, end_fields, pack_log
from backchannel.lifecycle import Claim
from backchannel.pubsub import OUTAGE, connect
from backchannel.settings import Settings
from backchannel.tables import SUCCEEDED
from tests import makers

ECHO = {"prompt": "Hello?", "model": "echo"}
FRAME = re.compile(rb"id: (\d+)\nevent: (\w+)\ndata: ([^\n]*)\n\n")


@contextlib.asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[str]:
    """The API as `backchannel api` serves it, on a free port; its URL."""
    listening = listen("127.0.0.1", 0, open_bind=False)
    server = make_server(settings)
    task = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:
        if task.done():
            task.result()
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


class Acted:
    """One attempt at a job."""

    def __init__(self, play: Play, claim: Claim, stream: Stream) -> None:
        self._play = play
        self.claim = claim
        self.stream = stream

    async def say(self, *words: str) -> None:
        """Stream each word as an event of its own."""
        for word in words:
            self.stream.text("delta", word)
            await self._play.flush()

    async def finish(self, state: str = SUCCEEDED, spent: Spent | None = makers.SPENT) -> bytes:
        """End the job; the whole stream as its readers see it."""
        usual = makers.outcome(state, spent=spent)
        log = self.stream.closing(
            end_fields(
                state,
                usual.finish_reason,
                spent and spent.as_json(),
                usual.error_code,
                usual.error_message,
            )
        )
        outcome = makers.outcome(state, spent=spent, log=pack_log(log))
        assert await self._play.write(lambda c: lifecycle.finish(c, self.claim, outcome))
        self.stream.end(log)
        await self._play.flush()
        return frames_of(log)


class Play:
    """A worker without an engine."""

    def __init__(self, database: Database, publisher: Publisher) -> None:
        self.database = database
        self._publisher = publisher

    @classmethod
    @contextlib.asynccontextmanager
    async def on(cls, database: Database, redis_url: str) -> AsyncIterator[Play]:
        """A worker on these servers."""
        redis = connect(redis_url)
        publisher = Publisher(redis, Settings().redis_prefix)
        try:
            yield cls(database, publisher)
        finally:
            await publisher.close()
            await redis.aclose()

    async def start(self, job_id: str) -> Acted:
        """Claim a job, call the provider, say that it started."""
        claim = await self.write(lambda c: lifecycle.claim(c, job_id, "worker-1", makers.LEASE_S))
        assert claim is not None, f"{job_id} could not be claimed"
        assert await self.write(lambda c: lifecycle.mark_call(c, claim))
        stream = await self._publisher.open(job_id, claim.attempt, claim.age_ms)
        kind = "started" if claim.attempt == 1 else "reset"
        stream.add(kind, attempt=claim.attempt, model=f"{claim.provider}:{claim.model}")
        await self.flush()
        return Acted(self, claim, stream)

    async def run(self, job_id: str, state: str = SUCCEEDED) -> bytes:
        """A whole attempt; its stream as readers see it."""
        attempt = await self.start(job_id)
        await attempt.say("Hel", "lo.")
        return await attempt.finish(state)

    async def write(self, work: Any) -> Any:
        return await self.database.write(work)

    async def flush(self) -> None:
        """Send what is new; what an absent Redis does not take stays with the publisher."""
        with contextlib.suppress(*OUTAGE):
            await self._publisher.flush()


def frames_of(log: list[Event]) -> bytes:
    """A log as it must arrive over HTTP."""
    return b"".join(
        b"id: %d\nevent: %s\ndata: %s\n\n" % (event.seq, event.type.encode(), event.data)
        for event in log
    )


def after(frames: bytes, seq: int) -> bytes:
    """The frames numbered above `seq`."""
    return b"".join(match[0] for match in FRAME.finditer(frames) if int(match[1]) > seq)


async def post(client: httpx2.AsyncClient, **fields: Any) -> dict[str, Any]:
    """A job, accepted over HTTP."""
    answer = await client.post("/v1/jobs", json=ECHO | fields)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job
