"""Limits per provider and key, kept in Redis for all worker processes together.

What a call takes, one script takes for it, all or nothing: a request and its tokens, each from a
clock of the generic cell rate algorithm (ITU-T I.371, annex A), and a place among the calls that
run at once. Nobody waits here. Who is refused is told when to come again: one after the other, as
fast as calls are let in, the interactive lane before the batch lane.

    {prefix}limit:{account}:requests, :tokens    when the next one may come, in ms of Redis' clock
    {prefix}limit:{account}:places               sorted set; a call's ticket, and when it lapses
    {prefix}limit:{account}:means                hash {tokens, ms} of a call, on average
    {prefix}limit:{account}:line:{lane}:{limits} when the one who is refused next may come
    {prefix}limit:{account}:hold                 is there while the provider asks to be left alone
    {prefix}holds                                channel; a message is such an account and its ms
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import NamedTuple

import msgspec
from redis.asyncio import Redis

from backchannel.registry import NO_LIMITS, Limits, Provider
from backchannel.tables import LANES

# Of a refused job. Up to a minute ahead each has its own moment in the line; who would come later
# comes somewhere in the rest of it, and at most after five minutes, for lines are left: jobs are
# cancelled, keys and limits change.
HORIZON_MS = 60_000
LONGEST_MS = 300_000
LONGEST_HOLD_S = 3_600.0  # then one may ask again, whatever the provider said
ON_TIME_MS = 61_000  # a minute of requests, and a second for those that are made late
BURST = 30  # a burst is this part of a minute's requests or tokens: two seconds' worth

# KEYS: hold, requests, tokens, places, means, the lane's line, the line of the lane before it.
# ARGV: ticket, lease, ms per request and of a burst, ms per token and of a burst, places, a random
# number below 1, horizon, longest. Answers {1, tokens charged} or {0, ms to wait}.
_ENTER = """
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local means = redis.call('HMGET', KEYS[5], 'tokens', 'ms')
local tokens, ms = tonumber(means[1] or 1000), tonumber(means[2] or 1000)
local wait, pace = redis.call('PTTL', KEYS[1]), 0
local function clock(key, step, burst)
  if step == 0 then return end
  local at = math.max(tonumber(redis.call('GET', key) or now), now)
  wait, pace = math.max(wait, at - burst - now), math.max(pace, step)
  return at + step
end
local at = {
  [2] = clock(KEYS[2], tonumber(ARGV[3]), tonumber(ARGV[4])),
  [3] = clock(KEYS[3], tonumber(ARGV[5]) * tokens, tonumber(ARGV[6])),
}
local places = tonumber(ARGV[7])
if places > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', string.format('%.3f', now))
  -- looked at every 2 s at the latest, for the next place may be free long before the mean
  local turn = math.min(ms / places, 2000)
  pace = math.max(pace, turn)
  if redis.call('ZCARD', KEYS[4]) >= places then wait = math.max(wait, turn, 100) end
end
if KEYS[7] ~= KEYS[6] then
  wait = math.max(wait, tonumber(redis.call('GET', KEYS[7]) or 0) - now)
end
if wait > 0 then
  local due = math.max(tonumber(redis.call('GET', KEYS[6]) or 0), now + wait)
  local horizon, longest = tonumber(ARGV[9]), tonumber(ARGV[10])
  local line = math.min(due + pace, now + longest)
  redis.call('SET', KEYS[6], string.format('%.3f', line), 'PX', longest)
  local ahead = math.min(due - now, longest)
  if ahead > horizon then ahead = horizon + tonumber(ARGV[8]) * (ahead - horizon) end
  return {0, math.ceil(ahead)}
end
for key, when in pairs(at) do
  local ttl = string.format('%d', math.ceil(when - now) + 60000)
  redis.call('SET', KEYS[key], string.format('%.3f', when), 'PX', ttl)
end
if places > 0 then
  redis.call('ZADD', KEYS[4], string.format('%.3f', now + ARGV[2]), ARGV[1])
  redis.call('PEXPIRE', KEYS[4], 2 * ARGV[2])
end
return {1, math.floor(tokens)}
"""
# KEYS: requests, tokens, places, means.  ARGV: ticket, ms by which the two clocks move, then tokens
# and ms of the call, empty where nobody knows.
_LEAVE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
redis.call('ZREM', KEYS[3], ARGV[1])
local function move(key, by)
  local at = tonumber(redis.call('GET', key) or now)
  if by == 0 or by < 0 and at <= now then return end
  at = math.min(math.max(at, now) + by, now + 3600000)
  if at <= now then return redis.call('DEL', key) end
  local ttl = string.format('%d', math.ceil(at - now) + 60000)
  redis.call('SET', key, string.format('%.3f', at), 'PX', ttl)
end
move(KEYS[1], tonumber(ARGV[2]))
move(KEYS[2], tonumber(ARGV[3]))
local function learn(name, seen)
  if seen == '' then return end
  local mean = tonumber(redis.call('HGET', KEYS[4], name) or seen)
  redis.call('HSET', KEYS[4], name, string.format('%.3f', mean + (seen - mean) / 8))
  redis.call('PEXPIRE', KEYS[4], 7 * 86400000)
end
learn('tokens', ARGV[4])
learn('ms', ARGV[5])
"""
# KEYS: the places of each ticket.  ARGV: lease, then the tickets.
_RENEW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
for i, key in ipairs(KEYS) do
  redis.call('ZADD', key, string.format('%.3f', now + ARGV[1]), ARGV[i + 1])
  redis.call('PEXPIRE', key, 2 * ARGV[1])
end
"""
# KEYS: hold, channel.  ARGV: ms, message. The longest one counts.
_HOLD = """
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) then
  redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])
  redis.call('PUBLISH', KEYS[2], ARGV[2])
end
"""


def account_of(provider: Provider, stored: Mapping[str, int]) -> str:
    """What a provider limits: an address and a key.

    The key goes by the version it was stored with, never by anything made of it; one of the
    environment is version 0.
    """
    address = hashlib.sha256(provider.base_url.encode()).hexdigest()[:12]
    return f"{provider.id}:{stored.get(provider.id, 0)}:{address}"


@dataclass(slots=True)
class Place:
    """What was taken for one call, and what becomes known of it."""

    account: str = ""
    limits: Limits = NO_LIMITS
    ticket: str = ""
    charged: int = 0  # tokens
    called_at: float | None = None  # monotonic; None: no call was made
    tokens: int | None = None  # used by the call, once it is known
    held_s: float = 0.0  # nothing was taken: the provider must not be called


class Hold(NamedTuple):
    """An account that asks to be left alone."""

    account: str
    ms: int


class Limiter:
    """The scripts on one process's connection; each method may raise `pubsub.OUTAGE`."""

    def __init__(self, redis: Redis, prefix: str, lease_s: float) -> None:
        self.channel = f"{prefix}holds"
        self._redis = redis
        self._prefix = prefix
        self._lease_ms = int(lease_s * 1000)
        self._enter = redis.register_script(_ENTER)
        self._leave = redis.register_script(_LEAVE)
        self._renew = redis.register_script(_RENEW)
        self._hold = redis.register_script(_HOLD)

    async def enter(self, account: str, limits: Limits, lane: str) -> Place | float:
        """Take what one call needs; or the seconds after which to come again."""
        # unlike job and attempt: a doubled doorbell takes, and gives back, a place of its own
        ticket = os.urandom(8).hex()
        keys = [self._key(account, name) for name in ("hold", *_TAKEN)]
        lines = "-".join(str(limit or 0) for limit in astuple(limits))
        before = LANES[max(LANES.index(lane) - 1, 0)]
        keys += [self._key(account, f"line:{each}:{lines}") for each in (lane, before)]
        verdict, number = await self._enter(
            keys=keys,
            args=[
                ticket, self._lease_ms, *_request_clock(limits), *_token_clock(limits),
                limits.concurrency or 0, random.random(), HORIZON_MS, LONGEST_MS,
            ],
        )  # fmt: skip
        return Place(account, limits, ticket, number) if verdict else number / 1000

    async def leave(self, place: Place) -> None:
        """Give back what was taken and not used, and take what was used and not foreseen."""
        request_ms, token_ms = _request_clock(place.limits)[0], _token_clock(place.limits)[0]
        used: int | str = ""
        took_ms: int | str = ""
        if place.called_at is None:
            requests, tokens = -request_ms, -place.charged * token_ms
        else:
            requests, tokens = 0.0, 0.0
            took_ms = int((time.monotonic() - place.called_at) * 1000)
            if place.tokens is not None:
                used, tokens = place.tokens, (place.tokens - place.charged) * token_ms
        await self._leave(
            keys=[self._key(place.account, name) for name in _TAKEN],
            args=[place.ticket, requests, tokens, used, took_ms],
        )

    async def renew(self, places: Iterable[Place]) -> None:
        """Keep the places of running calls from lapsing; one round trip for all."""
        held = list(places)
        await self._renew(
            keys=[self._key(place.account, "places") for place in held],
            args=[self._lease_ms, *(place.ticket for place in held)],
        )

    async def hold(self, hold: Hold) -> None:
        """Have every process leave an account alone."""
        keys = [self._key(hold.account, "hold"), self.channel]
        await self._hold(keys=keys, args=[hold.ms, msgspec.json.encode(hold)])

    async def holds(self, accounts: Iterable[str]) -> list[Hold]:
        """Those of these accounts that are to be left alone, as Redis knows it."""
        return await holds(self._redis, self._prefix, accounts)

    def _key(self, account: str, name: str) -> str:
        return f"{self._prefix}limit:{account}:{name}"


_TAKEN = ("requests", "tokens", "places", "means")


def heard(message: bytes) -> Hold:
    """What the channel says."""
    return msgspec.json.decode(message, type=Hold)


async def holds(redis: Redis, prefix: str, accounts: Iterable[str]) -> list[Hold]:
    """Those of these accounts that are to be left alone.

    Raises:
        RedisError: Redis does not answer.
    """
    asked = list(accounts)
    pipe = redis.pipeline(transaction=False)
    for account in asked:
        pipe.pttl(f"{prefix}limit:{account}:hold")
    left = await pipe.execute()
    return [Hold(each, ms) for each, ms in zip(asked, left, strict=True) if ms > 0]


def _request_clock(limits: Limits) -> tuple[float, float]:
    """Ms per request, and how many ms a burst may be early.

    A burst and the requests that follow it are within a minute no more than the limit.
    """
    if limits.requests_per_minute is None:
        return 0, 0
    burst = 1 + limits.requests_per_minute // BURST
    step = ON_TIME_MS / (limits.requests_per_minute - burst + 1)
    return step, (burst - 1) * step


def _token_clock(limits: Limits) -> tuple[float, float]:
    """Ms per token, and how many ms a burst may be early."""
    if limits.tokens_per_minute is None:
        return 0, 0
    return 60_000 / limits.tokens_per_minute, 60_000 / BURST
