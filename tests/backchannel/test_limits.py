"""Limits in Redis: what is let in, who is told to come when, and what is given back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from backchannel.limits import HORIZON_MS, LONGEST_MS, Hold, Limiter, Place, account_of, heard
from backchannel.pubsub import connect
from backchannel.registry import BUILT_IN, Limits
from backchannel.tables import BATCH, INTERACTIVE

ME = "openai:0:x"


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with connect(redis_url) as client:
        yield client


@pytest.fixture
def limiter(redis: Redis) -> Limiter:
    return Limiter(redis, "t:", lease_s=1.0)


async def entered(limiter: Limiter, limits: Limits, lane: str = INTERACTIVE) -> Place:
    place = await limiter.enter(ME, limits, lane)
    assert isinstance(place, Place), f"to wait for {place} s"
    return place


async def waiting(limiter: Limiter, limits: Limits, lane: str = INTERACTIVE) -> float:
    wait_s = await limiter.enter(ME, limits, lane)
    assert not isinstance(wait_s, Place), "it was let in"
    return wait_s


async def called(limiter: Limiter, place: Place, tokens: int | None = None) -> None:
    """A call was made, and is over."""
    place.called_at, place.tokens = asyncio.get_running_loop().time(), tokens
    await limiter.leave(place)


async def time_goes_by(redis: Redis, seconds: float) -> None:
    """Put the clocks of the limits back."""
    for key in await redis.keys("t:limit:*"):
        if key.endswith((b":requests", b":tokens")) or b":line:" in key:
            at = float((await redis.get(key)) or 0)
            await redis.set(key, at - seconds * 1000)


@pytest.mark.parametrize("limit", [1, 2, 29, 30, 60, 90, 500])
async def test_no_minute_has_more_requests_than_the_limit(
    limiter: Limiter, redis: Redis, limit: int
) -> None:
    """However greedily they come: a whole minute in steps of a quarter of the pace."""
    limits = Limits(requests_per_minute=limit)
    step_s, passed, count = 15 / limit, 0.0, 0
    started = time.monotonic()
    while passed + time.monotonic() - started < 59.8:
        while isinstance(place := await limiter.enter(ME, limits, INTERACTIVE), Place):
            await called(limiter, place)
            count += 1
            assert count <= limit
        await time_goes_by(redis, step_s)
        passed += step_s
    assert count >= limit * 0.78 - 1, "nor much fewer, asking four times as often"


async def test_the_refused_come_one_after_the_other_as_fast_as_calls_are_let_in(
    limiter: Limiter,
) -> None:
    limits = Limits(requests_per_minute=20)  # one in 3 s
    await entered(limiter, limits)
    waits = [await waiting(limiter, limits) for _ in range(15)]
    assert waits == pytest.approx([3 * n for n in range(1, 16)], abs=1)


async def test_who_would_come_later_than_in_a_minute_is_spread_over_the_rest(
    limiter: Limiter,
) -> None:
    limits = Limits(requests_per_minute=60)
    waits = [await limiter.enter(ME, limits, BATCH) for _ in range(1000)]
    later = [wait for wait in waits if isinstance(wait, float) and wait * 1000 > HORIZON_MS]
    assert 900 <= len(later) <= 960
    assert max(later) * 1000 <= LONGEST_MS + 1
    in_each_half_minute = [
        sum(start <= each < start + 30 for each in later) for start in range(60, 300, 30)
    ]
    assert min(in_each_half_minute) > 30, in_each_half_minute


async def test_the_batch_lane_comes_after_the_interactive_ones_that_wait(
    limiter: Limiter, redis: Redis
) -> None:
    limits = Limits(requests_per_minute=20)
    await entered(limiter, limits, BATCH)
    for_batch = [await waiting(limiter, limits, BATCH) for _ in range(5)]
    assert for_batch[-1] == pytest.approx(15, abs=0.5)
    assert await waiting(limiter, limits, INTERACTIVE) == pytest.approx(3, abs=0.5)
    await time_goes_by(redis, 3.2)
    assert await waiting(limiter, limits, BATCH) > 2, "there is room, but somebody goes first"
    await entered(limiter, limits, INTERACTIVE)


async def test_what_was_not_called_is_given_back(limiter: Limiter) -> None:
    limits = Limits(requests_per_minute=1, tokens_per_minute=1, concurrency=1)
    for _ in range(3):
        place = await entered(limiter, limits)
        await waiting(limiter, limits, BATCH)
        await limiter.leave(place)
    await called(limiter, await entered(limiter, limits))
    await waiting(limiter, limits)


async def test_a_call_is_charged_the_mean_of_the_ones_before_and_then_what_it_used(
    limiter: Limiter, redis: Redis
) -> None:
    limits = Limits(tokens_per_minute=6_000)  # 100 in a second
    first = await entered(limiter, limits)
    assert first.charged == 1000, "nothing is known yet"
    assert await waiting(limiter, limits, BATCH) == pytest.approx(8, abs=0.5)
    await called(limiter, first, tokens=160)
    second = await entered(limiter, limits)
    assert second.charged == 160
    await called(limiter, second, tokens=2_640)
    # both, less the burst of two seconds; and the mean has moved by an eighth of the difference
    assert await waiting(limiter, Limits(6_000, 6_000)) == pytest.approx(26, abs=0.5)
    await time_goes_by(redis, 27)
    third = await entered(limiter, limits)
    assert third.charged == 470
    await called(limiter, third, tokens=None)
    assert (await redis.hget("t:limit:openai:0:x:means", "tokens")) == b"470.000"


async def test_a_place_is_free_when_its_call_is_over_or_its_worker_silent(
    limiter: Limiter,
) -> None:
    limits = Limits(concurrency=2)
    one, two = [await entered(limiter, limits) for _ in range(2)]
    assert 0.1 <= await waiting(limiter, limits) <= 2
    await called(limiter, one)
    three = await entered(limiter, limits)
    for _ in range(3):
        await asyncio.sleep(0.4)
        await limiter.renew([three])
    await entered(limiter, limits)  # in the place of two, whose lease is over
    await waiting(limiter, limits)
    await limiter.leave(two)
    await waiting(limiter, limits)


async def test_places_come_back_after_redis_has_lost_them(limiter: Limiter, redis: Redis) -> None:
    limits = Limits(concurrency=1)
    place = await entered(limiter, limits)
    await redis.flushall()
    await limiter.renew([place])
    await waiting(limiter, limits)


async def test_one_limit_that_refuses_takes_nothing_of_the_others(
    limiter: Limiter, redis: Redis
) -> None:
    limits = Limits(requests_per_minute=60, tokens_per_minute=1_000_000, concurrency=1)
    place = await entered(limiter, limits)
    before = [await redis.get(f"t:limit:{ME}:{name}") for name in ("requests", "tokens")]
    for _ in range(5):
        await waiting(limiter, limits)
    assert before == [await redis.get(f"t:limit:{ME}:{name}") for name in ("requests", "tokens")]
    assert await redis.zcard(f"t:limit:{ME}:places") == 1
    await called(limiter, place)


async def test_other_limits_have_a_line_of_their_own(limiter: Limiter) -> None:
    few, more = Limits(requests_per_minute=1), Limits(requests_per_minute=600)
    await entered(limiter, few)
    for _ in range(3):
        await waiting(limiter, few)
    assert await waiting(limiter, more) < 62, "as the last call left it, not behind the old line"


async def test_a_hold_is_told_to_all_and_the_longest_counts(limiter: Limiter, redis: Redis) -> None:
    async with redis.pubsub() as listening:
        await listening.subscribe(limiter.channel)
        for ms in (20_000, 5_000):
            await limiter.hold(Hold(ME, ms))
        messages = [await listening.get_message(timeout=0.3) for _ in range(4)]
    told = [heard(each["data"]) for each in messages if each and each["type"] == "message"]
    assert told == [Hold(ME, 20_000)]
    (hold,) = await limiter.holds(["groq:0:y", ME])
    assert hold.account == ME
    assert 15_000 < hold.ms <= 20_000
    assert await waiting(limiter, Limits(concurrency=9)) == pytest.approx(20, abs=1)


def test_an_account_is_another_one_with_another_key_or_address() -> None:
    openai, groq = BUILT_IN[1], BUILT_IN[2]
    accounts = {account_of(openai, {}), account_of(openai, {"openai": 3}), account_of(groq, {})}
    assert len(accounts) == 3
    assert account_of(openai, {"groq": 3}) == account_of(openai, {})


async def test_every_key_in_redis_ends_some_day(limiter: Limiter, redis: Redis) -> None:
    limits = Limits(60, 1_000, 1)
    place = await entered(limiter, limits)
    for lane in (INTERACTIVE, BATCH):
        await waiting(limiter, limits, lane)
    await limiter.renew([place])
    await called(limiter, place, tokens=5_000)
    await limiter.hold(Hold(ME, 1_000))
    keys = await redis.keys("*")
    assert len(keys) >= 6
    assert all([await redis.pttl(key) > 0 for key in keys])
