"""What a reader of a channel hears, and when it looks up."""

from __future__ import annotations

import asyncio

import pytest

from backchannel import pubsub
from backchannel.pubsub import RollCall, connect


async def test_messages_that_wait_are_heard_at_once_and_in_order() -> None:
    queue: asyncio.Queue[bytes | None] = asyncio.Queue()
    for message in (b"a", b"b", b"c"):
        queue.put_nowait(message)
    assert await RollCall(queue).heard() == [b"a", b"b", b"c"]


async def test_what_may_have_been_missed_calls_the_roll_whatever_came_with_it() -> None:
    queue: asyncio.Queue[bytes | None] = asyncio.Queue()
    for message in (b"a", None, b"c"):
        queue.put_nowait(message)
    assert await RollCall(queue).heard() == []
    assert queue.empty()


async def test_the_roll_of_a_silent_channel_is_called_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pubsub, "ROLL_CALL_S", 0.1)
    monkeypatch.setattr(pubsub, "MOST_ROLL_CALL_S", 0.4)
    queue: asyncio.Queue[bytes | None] = asyncio.Queue()
    roll_call = RollCall(queue)

    async def silence_s() -> float:
        began = asyncio.get_running_loop().time()
        assert await roll_call.heard() == []
        return asyncio.get_running_loop().time() - began

    waited = [await silence_s() for _ in range(4)]
    assert all(took >= due for took, due in zip(waited, (0.1, 0.2, 0.4, 0.4), strict=True)), waited
    assert sum(waited) < 5, "at most so rarely"
    queue.put_nowait(b"a")
    assert await roll_call.heard() == [b"a"]
    assert await silence_s() < 2
    assert queue.empty()


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "unix:///nowhere.sock"])
def test_commands_are_packed_in_c(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[tuple[object, ...]] = []

    def pack(command: tuple[object, ...]) -> bytes:
        packed.append(command)
        return b"as hiredis says"

    monkeypatch.setattr("redis.connection.hiredis.pack_command", pack)
    connection = connect(url).connection_pool.make_connection()
    assert connection.pack_command("EVALSHA", "sha", 1, b"key") == [b"as hiredis says"]
    assert packed == [(b"EVALSHA", "sha", 1, b"key")]


def test_what_is_large_is_not_copied() -> None:
    connection = connect("redis://127.0.0.1:1/0").connection_pool.make_connection()
    large = bytes(10_000)
    packed = connection.pack_command("EVALSHA", "sha", 1, large)
    assert any(piece is large for piece in packed)
