"""The event stream over HTTP: the same bytes live, resumed and replayed, whatever Redis does."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
from redis.asyncio import Redis

import api.jobs
from backchannel import reaping
from backchannel.db import Database
from backchannel.pubsub import ROLL_CALL_S
from backchannel.settings import Settings
from backchannel.tables import FAILED
from tests import makers
from tests.api.play import FRAME, Play, after, serving
from tests.servers import free_port, postgres, valkey


class Reader:
    """One reader of one stream: the bytes so far, and whether the server closed it."""

    def __init__(self, client: httpx2.AsyncClient, job_id: str, **headers: str) -> None:
        self.bytes = b""
        self.more = asyncio.Event()
        self.headers: httpx2.Headers | None = None
        self.task = asyncio.create_task(self._read(client, job_id, headers))

    async def _read(
        self, client: httpx2.AsyncClient, job_id: str, headers: dict[str, str]
    ) -> bytes:
        request = client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers)
        async with request as answer:
            assert answer.status_code == 200
            self.headers = answer.headers
            async for chunk in answer.aiter_bytes():
                self.bytes += chunk
                self.more.set()
        return self.bytes

    async def until(self, events: int) -> None:
        """So many events have arrived."""
        async with asyncio.timeout(10):
            while len(FRAME.findall(self.bytes)) < events:
                self.more.clear()
                await self.more.wait()

    async def all(self) -> bytes:
        """Everything, once the stream has ended."""
        async with asyncio.timeout(15):
            return await self.task


async def post(client: httpx2.AsyncClient) -> str:
    answer = await client.post("/v1/jobs", json={"prompt": "Hello?", "model": "echo"})
    job_id: str = answer.json()["id"]
    return job_id


async def test_readers_from_every_moment_get_the_same_bytes_and_a_row_that_agrees(
    served: httpx2.AsyncClient, play: Play
) -> None:
    job_id = await post(served)
    early = Reader(served, job_id)
    attempt = await play.start(job_id)
    await attempt.say("Hel", "lo ", "wörld\u2028")
    await early.until(4)
    middle = Reader(served, job_id)
    await middle.until(4)
    assert middle.bytes == early.bytes
    whole = await attempt.finish()
    assert await early.all() == await middle.all() == whole
    assert await Reader(served, job_id).all() == whole
    assert early.headers is not None
    assert early.headers["content-type"].startswith("text/event-stream")
    assert early.headers["cache-control"] == "no-store"
    assert early.headers["x-accel-buffering"] == "no"
    job = (await served.get(f"/v1/jobs/{job_id}")).json()
    end = whole.rpartition(b"data: ")[2]
    assert {name: job[name] for name in ("state", "finish_reason", "usage", "error")} == {
        name: value
        for name, value in httpx2.Response(200, content=end).json().items()
        if name not in ("seq", "type")
    }


async def test_text_arrives_while_the_job_runs(served: httpx2.AsyncClient, play: Play) -> None:
    job_id = await post(served)
    attempt = await play.start(job_id)
    reader = Reader(served, job_id)
    await reader.until(1)
    for number in range(2, 12):
        started = time.monotonic()
        await attempt.say("word ")
        await reader.until(number)
        assert time.monotonic() - started < 0.5
    await attempt.finish()
    await reader.all()


@pytest.mark.parametrize("seq", [-1, 0, 2, 3, 4, 99])
async def test_a_finished_stream_resumes_after_any_number_also_after_flushall(
    served: httpx2.AsyncClient, play: Play, redis_url: str, seq: int
) -> None:
    job_id = await post(served)
    whole = await play.run(job_id)
    assert len(FRAME.findall(whole)) == 4
    for _ in range(2):
        assert await Reader(served, job_id, **{"Last-Event-ID": str(seq)}).all() == after(
            whole, seq
        )
        by_query = await served.get(f"/v1/jobs/{job_id}/events", params={"after": seq})
        assert by_query.content == after(whole, seq)
        both = {"Last-Event-ID": str(seq)}
        answer = await served.get(f"/v1/jobs/{job_id}/events?after=0", headers=both)
        assert answer.content == after(whole, seq)
        async with Redis.from_url(redis_url) as redis:
            await redis.flushall()


async def test_a_running_stream_resumes_in_the_middle(
    served: httpx2.AsyncClient, play: Play
) -> None:
    job_id = await post(served)
    attempt = await play.start(job_id)
    await attempt.say("a", "b", "c")
    reader = Reader(served, job_id, **{"Last-Event-ID": "1"})
    await reader.until(2)
    await attempt.say("d")
    whole = await attempt.finish()
    assert await reader.all() == after(whole, 1)


async def test_a_flush_while_a_job_runs_costs_its_readers_nothing(
    served: httpx2.AsyncClient, play: Play, redis_url: str
) -> None:
    job_id = await post(served)
    attempt = await play.start(job_id)
    await attempt.say("a", "b")
    reader = Reader(served, job_id)
    await reader.until(3)
    async with Redis.from_url(redis_url) as redis:
        await redis.flushall()
    await attempt.say("c")
    await play.flush()
    late = Reader(served, job_id)
    whole = await attempt.finish()
    assert await reader.all() == await late.all() == whole


async def test_another_attempt_is_told_as_a_reset_in_the_same_numbers(
    served: httpx2.AsyncClient, play: Play, database: Database
) -> None:
    job_id = await post(served)
    reader = Reader(served, job_id)
    first = await play.start(job_id)
    await first.say("Hel")
    makers.lapse(database, job_id)
    assert await play.write(lambda c: reaping.reap(c, job_id, 1))
    second = await play.start(job_id)
    await second.say("Hello.")
    whole = await second.finish()
    assert await reader.all() == whole
    found = [(int(seq), kind.decode()) for seq, kind, _ in FRAME.findall(whole)]
    assert found == list(enumerate(["started", "delta", "reset", "delta", "end"]))


async def test_a_stream_waits_for_a_job_that_is_still_queued(
    served: httpx2.AsyncClient, play: Play
) -> None:
    job_id = await post(served)
    reader = Reader(served, job_id)
    await asyncio.sleep(0.5)
    assert not reader.task.done()
    assert (await served.post(f"/v1/jobs/{job_id}/cancel")).status_code == 200
    started = time.monotonic()
    assert b'"state":"cancelled"' in await reader.all()
    assert time.monotonic() - started < 1.0


async def test_leaving_is_not_cancelling(served: httpx2.AsyncClient, play: Play) -> None:
    job_id = await post(served)
    attempt = await play.start(job_id)
    reader = Reader(served, job_id)
    await reader.until(1)
    reader.task.cancel()
    await asyncio.sleep(0.2)
    assert (await served.get(f"/v1/jobs/{job_id}")).json()["cancel_requested_at"] is None
    whole = await attempt.finish(FAILED)
    assert await Reader(served, job_id).all() == whole


async def test_a_slow_reader_hurts_only_itself_and_misses_nothing(
    served: httpx2.AsyncClient, play: Play
) -> None:
    job_id = await post(served)
    attempt = await play.start(job_id)
    async with served.stream("GET", f"/v1/jobs/{job_id}/events") as slow:  # reads when asked to
        quick = Reader(served, job_id)
        started = time.monotonic()
        for _ in range(1500):
            attempt.stream.text("delta", "x" * 4000)
            attempt.stream.unsent()  # seals: each is an event of its own
            if len(attempt.stream.log) % 50 == 0:
                await play.flush()
        whole = await attempt.finish()
        assert await quick.all() == whole
        assert time.monotonic() - started < 10
        assert await slow.aread() == whole


# ---------------------------------------------------------------- the heartbeat


async def test_a_silent_stream_is_kept_alive_by_a_comment_without_a_blank_line(
    served: httpx2.AsyncClient, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.jobs, "PING_S", 0.2)
    job_id = await post(served)
    attempt = await play.start(job_id)
    reader = Reader(served, job_id)
    await reader.until(1)
    await asyncio.sleep(0.7)
    assert b": ping\n: ping\n" in reader.bytes
    whole = await attempt.finish()
    assert (await reader.all()).replace(b": ping\n", b"") == whole
    assert b"\n\n\n" not in reader.bytes


# ---------------------------------------------------------------- outages


@asynccontextmanager
async def on_a_redis_of_its_own(
    database: Database, database_url: str, home: Path
) -> AsyncIterator[tuple[httpx2.AsyncClient, Play, object]]:
    with valkey() as server:
        settings = Settings(home=home, database_url=database_url, redis_url=server.url)
        async with (
            serving(settings) as url,
            httpx2.AsyncClient(base_url=url, timeout=30) as client,
            Play.on(database, server.url) as play,
        ):
            yield client, play, server


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_a_redis_that_goes_and_comes_back_costs_a_reader_nothing(
    database: Database, database_url: str, tmp_path: Path, how: str
) -> None:
    async with on_a_redis_of_its_own(database, database_url, tmp_path) as (client, play, server):
        job_id = await post(client)
        attempt = await play.start(job_id)
        await attempt.say("a", "b")
        reader = Reader(client, job_id)
        await reader.until(3)
        server.kill() if how == "killed" else server.freeze()
        await attempt.say("c")
        late = Reader(client, job_id)
        await asyncio.sleep(1)
        server.start() if how == "killed" else server.thaw()
        await attempt.say("d")
        await reader.until(5)
        whole = await attempt.finish()
        assert await reader.all() == await late.all() == whole


async def test_a_redis_that_does_not_come_back_still_leaves_the_whole_stream(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    async with on_a_redis_of_its_own(database, database_url, tmp_path) as (client, play, server):
        job_id = await post(client)
        attempt = await play.start(job_id)
        await attempt.say("a")
        reader = Reader(client, job_id)
        await reader.until(2)
        server.kill()
        whole = await attempt.finish()
        assert await reader.all() == await Reader(client, job_id).all() == whole


async def test_a_database_that_restarts_costs_a_reader_nothing(
    redis_url: str, tmp_path: Path
) -> None:
    with postgres() as server:
        url_of_database = server.create("away")
        settings = Settings(home=tmp_path, database_url=url_of_database, redis_url=redis_url)
        async with serving(settings) as url, httpx2.AsyncClient(base_url=url) as client:
            database = Database(url_of_database, name="play")
            async with Play.on(database, redis_url) as play:
                job_id = await post(client)
                attempt = await play.start(job_id)
                await attempt.say("a")
                reader = Reader(client, job_id)
                await reader.until(2)
                server.kill()
                await asyncio.sleep(ROLL_CALL_S + 0.5)
                await attempt.say("b")
                await reader.until(3)
                server.start()
                whole = await attempt.finish()
                assert await reader.all() == whole
            database.close()


# ---------------------------------------------------------------- shutdown


async def test_sigterm_ends_streams_and_waiters_within_moments(
    sqlite_url: str, redis_url: str, tmp_path: Path
) -> None:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", f"from api.main import serve; serve(port={port})",
        env=os.environ
        | {"BACKCHANNEL_DATABASE_URL": sqlite_url, "BACKCHANNEL_REDIS_URL": redis_url},
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        for _ in range(200):
            try:
                await client.get("/healthz")
                break
            except httpx2.TransportError:
                await asyncio.sleep(0.05)
        job_id = await post(client)
        reader = Reader(client, job_id)
        waiting = asyncio.create_task(client.get(f"/v1/jobs/{job_id}", params={"wait": 30}))
        await asyncio.sleep(1)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert (await waiting).json()["state"] == "queued"
        with pytest.raises(httpx2.TransportError):  # cut, not ended: a reader knows to come back
            await reader.all()
        await process.wait()
        assert time.monotonic() - started < 3
