"""The live wire: fenced appends, dense numbers, readers that lose nothing, whatever Redis does."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from backchannel import bus, events
from backchannel.bus import (
    TOGETHER,
    Publisher,
    Stream,
    close_log,
    follow,
    publish_closed,
    read_log,
)
from backchannel.events import Event
from backchannel.pubsub import ROLL_CALL_S, Listener, connect
from tests.servers import valkey

PREFIX = "t:"
JOB = "job_1"


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


@asynccontextmanager
async def publishing(redis: Redis) -> AsyncIterator[Publisher]:
    publisher = Publisher(redis, PREFIX)
    try:
        yield publisher
    finally:
        await publisher.close()


@pytest.fixture
async def publisher(redis: Redis) -> AsyncIterator[Publisher]:
    async with publishing(redis) as opened:
        yield opened


@pytest.fixture
async def listener(redis: Redis) -> AsyncIterator[Listener]:
    opened = Listener(redis, f"{PREFIX}hello")
    yield opened
    await opened.close()


async def nothing_stored(_: str) -> list[Event] | None:
    return None


def texts(log: list[Event]) -> list[str]:
    return [json.loads(event.data)["text"] for event in log if event.type == "delta"]


def seqs(log: list[Event]) -> list[int]:
    return [event.seq for event in log]


def say(stream: Stream, *words: str) -> None:
    for word in words:
        stream.text(events.DELTA, word)
        stream._seal()


async def read(redis: Redis) -> list[Event]:
    return await read_log(redis, PREFIX, JOB)


async def test_pieces_of_one_flush_become_one_event_and_kinds_stay_apart(
    publisher: Publisher, redis: Redis
) -> None:
    stream = await publisher.open(JOB, 1, 0)
    stream.add("started", attempt=1)
    for kind, text in (("reasoning", "hm"), ("reasoning", "m"), ("delta", "a"), ("delta", "b")):
        stream.text(kind, text)
    await publisher.flush()
    log = await read(redis)
    assert [event.type for event in log] == ["started", "reasoning", "delta"]
    assert texts(log) == ["ab"]
    assert seqs(log) == [0, 1, 2]
    assert log == stream.log


async def test_an_append_whose_reply_was_lost_is_refused_not_doubled(
    publisher: Publisher, redis: Redis
) -> None:
    stream = await publisher.open(JOB, 1, 0)
    say(stream, "a", "b")
    await publisher.flush()
    stream._sent = 1  # the reply to the second event never arrived
    say(stream, "c")
    await publisher.flush()
    assert texts(await read(redis)) == ["a", "b", "c"]


async def test_an_older_attempt_is_fenced_off(publisher: Publisher, redis: Redis) -> None:
    old = await publisher.open(JOB, 1, 0)
    say(old, "old")
    await publisher.flush()
    new = await publisher.open(JOB, 2, 1000)
    new.add("reset", attempt=2)
    say(new, "new")
    await publisher.flush()
    say(old, "stale")
    await publisher.flush()
    assert old.fenced
    assert texts(await read(redis)) == ["old", "new"]
    assert seqs(await read(redis)) == [0, 1, 2]


async def test_a_stream_past_its_fence_writes_nothing(publisher: Publisher, redis: Redis) -> None:
    stream = await publisher.open(JOB, 1, 0)
    stream.valid_until = time.monotonic() - 0.001
    say(stream, "late")
    await publisher.flush()
    assert stream.fenced
    assert await read(redis) == []


async def test_nothing_comes_after_the_end(publisher: Publisher, redis: Redis) -> None:
    stream = await publisher.open(JOB, 1, 0)
    say(stream, "a")
    stream.end(stream.closing({"state": "succeeded"}))
    await publisher.flush()
    say(stream, "too late")
    await publisher.flush()
    assert [event.type for event in await read(redis)] == ["delta", "end"]


async def test_after_flushall_the_writer_writes_everything_again(
    publisher: Publisher, redis: Redis
) -> None:
    stream = await publisher.open(JOB, 1, 0)
    say(stream, "a", "b")
    await publisher.flush()
    await redis.flushall()
    say(stream, "c")
    await publisher.flush()
    await publisher.flush()
    log = await read(redis)
    assert texts(log) == ["a", "b", "c"]
    assert seqs(log) == [0, 1, 2]


async def test_a_frozen_worker_s_last_words_move_the_new_attempt_back(
    publisher: Publisher, redis: Redis
) -> None:
    old = await publisher.open(JOB, 1, 0)
    say(old, "a")
    await publisher.flush()
    new = await publisher.open(JOB, 2, 1000)  # has read one event
    say(old, "b")
    await publisher.flush()  # before the new attempt's first word
    new.add("reset", attempt=2)
    say(new, "c")
    await publisher.flush()
    await publisher.flush()
    log = await read(redis)
    assert texts(log) == ["a", "b", "c"]
    assert seqs(log) == [0, 1, 2, 3]
    assert log == new.log


async def test_when_redis_and_the_writer_are_both_lost_numbers_go_on_above_any_seen(
    publisher: Publisher, redis: Redis
) -> None:
    age_ms = 10_000
    stream = await publisher.open(JOB, 2, age_ms)
    stream.add("reset", attempt=2)
    await publisher.flush()
    await publisher.flush()
    (event,) = await read(redis)
    assert event.seq > age_ms / events.FLUSH_MS
    say(stream, "a")
    await publisher.flush()
    assert seqs(await read(redis)) == [event.seq, event.seq + 1]


async def test_a_reader_gets_past_and_live_in_order_and_once(
    publisher: Publisher, redis: Redis, listener: Listener
) -> None:
    stream = await publisher.open(JOB, 1, 0)
    say(stream, *"abc")
    await publisher.flush()

    async def write_on() -> None:
        for word in "defgh":
            say(stream, word)
            await publisher.flush()
            await asyncio.sleep(0.01)
        stream.end(stream.closing({"state": "succeeded"}))

    async with asyncio.TaskGroup() as group:
        group.create_task(write_on())
        whole = group.create_task(_all(follow(redis, PREFIX, listener, nothing_stored, JOB)))
        rest = group.create_task(_all(follow(redis, PREFIX, listener, nothing_stored, JOB, 1)))
    assert whole.result() == stream.log
    assert rest.result() == stream.log[2:]


async def test_a_thousand_random_disconnects_leave_no_gap_and_no_double(
    publisher: Publisher, redis: Redis, listener: Listener
) -> None:
    stream = await publisher.open(JOB, 1, 0)

    async def write() -> None:
        for number in range(300):
            say(stream, f"{number} ")
            await asyncio.sleep(0.003)
        stream.end(stream.closing({"state": "succeeded"}))

    async def read_in_pieces(patience: int) -> list[Event]:
        got: list[Event] = []
        while not got or got[-1].type != "end":
            last = got[-1].seq if got else -1
            reader = follow(redis, PREFIX, listener, nothing_stored, JOB, last)
            async for some in reader:
                got += some[:patience]  # the rest is lost with the connection
                break
            await reader.aclose()  # type: ignore[attr-defined]
        return got

    async with asyncio.TaskGroup() as group:
        group.create_task(write())
        readers = [group.create_task(read_in_pieces(patience)) for patience in (1, 2, 3, 7)]
    assert all(reader.result() == stream.log for reader in readers)


async def test_a_slow_reader_loses_its_queue_not_an_event(
    publisher: Publisher, redis: Redis, listener: Listener
) -> None:
    stream = await publisher.open(JOB, 1, 0)
    reader, got = await reading(stream, publisher, redis, listener)
    for number in range(1500):  # more messages than its queue holds
        say(stream, str(number))
        await publisher.flush()
    stream.end(stream.closing({"state": "succeeded"}))
    got += await _all(reader)
    assert got == stream.log


async def test_what_is_there_together_comes_together_and_not_all_at_once(
    publisher: Publisher, redis: Redis, listener: Listener
) -> None:
    stream = await publisher.open(JOB, 1, 0)
    reader = follow(redis, PREFIX, listener, nothing_stored, JOB)
    for number in range(3 * TOGETHER):
        say(stream, str(number))
    await publisher.flush()
    past = [await anext(reader) for _ in range(3)]
    assert [len(some) for some in past] == [TOGETHER] * 3
    for word in "abc":  # three messages
        say(stream, word)
        await publisher.flush()
    await asyncio.sleep(0.2)
    assert texts(await anext(reader)) == ["a", "b", "c"]
    await reader.aclose()  # type: ignore[attr-defined]


async def test_a_gap_between_two_messages_that_came_together_is_filled(
    publisher: Publisher, redis: Redis, listener: Listener
) -> None:
    stream = await publisher.open(JOB, 1, 0)
    reader, got = await reading(stream, publisher, redis, listener)
    for word in "abc":
        say(stream, word)
        await publisher.flush()
    await asyncio.sleep(0.2)
    (channel,) = [each for each in listener._channels.values() if each.queues]
    (queue,) = channel.queues
    heard = [queue.get_nowait() for _ in range(3)]
    queue.put_nowait(heard[0])
    queue.put_nowait(heard[2])
    got += await asyncio.wait_for(anext(reader), timeout=10)
    await reader.aclose()  # type: ignore[attr-defined]
    assert got == stream.log


async def test_the_stored_log_ends_a_stream_that_redis_never_ended(
    redis: Redis, listener: Listener
) -> None:
    log = [events.encode(0, "started", {}), events.encode(1, "end", {"state": "succeeded"})]
    finished = False

    async def stored(_: str) -> list[Event] | None:
        return log if finished else None

    reader = asyncio.create_task(_all(follow(redis, PREFIX, listener, stored, JOB)))
    await asyncio.sleep(0.1)
    finished = True
    assert await asyncio.wait_for(reader, timeout=ROLL_CALL_S * 5) == log


async def test_readers_and_writers_outlive_a_redis_that_dies_and_comes_back_empty() -> None:
    with valkey() as server:
        redis = connect(server.url, timeout_s=1.0)
        listener = Listener(redis, f"{PREFIX}hello")
        async with publishing(redis) as publisher:
            stream = await publisher.open(JOB, 1, 0)
            say(stream, "before ")
            await publisher.flush()
            reader = asyncio.create_task(_all(follow(redis, PREFIX, listener, nothing_stored, JOB)))
            await asyncio.sleep(0.1)
            server.kill()
            say(stream, "during ")
            await asyncio.sleep(0.5)
            server.start()
            say(stream, "after")
            stream.end(stream.closing({"state": "succeeded"}))
            got = await asyncio.wait_for(reader, timeout=30)
            assert "".join(texts(got)) == "before during after"
            assert got == stream.log
        await listener.close()
        await redis.aclose()


async def test_an_end_that_no_worker_writes_continues_the_numbers_and_fences(
    publisher: Publisher, redis: Redis, listener: Listener
) -> None:
    stream = await publisher.open(JOB, 3, 0)
    stream.add("reset", attempt=3)
    await publisher.flush()
    await publisher.flush()
    first = stream.log[0].seq
    closed = await close_log(redis, PREFIX, JOB, 3, 0, {"state": "failed"})
    assert seqs(closed) == [first, first + 1]
    reader = asyncio.create_task(_all(follow(redis, PREFIX, listener, nothing_stored, JOB)))
    await asyncio.sleep(0.1)
    await publish_closed(redis, PREFIX, JOB, 3, closed)
    assert await asyncio.wait_for(reader, timeout=10) == closed
    say(stream, "stale")
    await publisher.flush()
    assert stream.fenced
    assert await close_log(redis, PREFIX, "job_never_started", 0, 99, {"state": "cancelled"}) == [
        events.encode(0, "end", {"state": "cancelled"})
    ]


async def reading(
    stream: Stream, publisher: Publisher, redis: Redis, listener: Listener
) -> tuple[Any, list[Event]]:
    """A reader that has seen the start of a stream and waits, and what it has seen."""
    stream.add("started", attempt=1)
    await publisher.flush()
    reader = follow(redis, PREFIX, listener, nothing_stored, JOB)
    return reader, await anext(reader)


async def _all(reader: Any) -> list[Event]:
    return [event async for some in reader for event in some]


# ---------------------------------------------------------------- defects


@pytest.mark.parametrize("at_once", [1, bus.SEND_AT_ONCE])  # a stream each, or all together
async def test_one_stream_that_redis_refuses_does_not_hold_up_the_others(
    publisher: Publisher, redis: Redis, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(bus, "SEND_AT_ONCE", at_once)
    bad, *good = [await publisher.open(f"job_{number}", 1, 0) for number in range(9)]
    await redis.set(bad.keys.stream, "not a stream")
    for stream in (bad, *good):
        stream.add(events.STARTED, attempt=1, model="m")
    with pytest.raises(ResponseError):
        await publisher.flush()
    assert not any(stream.unsent() for stream in good)
    await redis.delete(bad.keys.stream)
    await publisher.flush()
    assert [event.type for event in await read_log(redis, PREFIX, bad.job_id)] == ["started"]


async def test_a_defect_in_one_flush_does_not_end_the_flusher(
    publisher: Publisher, redis: Redis, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = await publisher.open(JOB, 1, 0)

    def broken() -> bytes:
        raise AssertionError("a defect")

    monkeypatch.setattr(stream, "unsent", broken, raising=False)
    stream.add(events.STARTED, attempt=1, model="m")
    await asyncio.sleep(0.2)
    monkeypatch.undo()
    async with asyncio.timeout(10):
        reader = follow(redis, PREFIX, listener, nothing_stored, JOB)
        assert [event.type for event in await anext(reader)] == ["started"]
