"""What Celery's costs are cut by: the same messages and the same events, made less often."""

from __future__ import annotations

import time
from typing import Any

from kombu import Connection, Queue

from backchannel.queue import broker_url
from workers.thrift import EVENTS_EVERY_S, ThriftyConsumer, reuse_clients


def test_a_channel_has_one_client_and_still_takes_messages(redis_url: str) -> None:
    reuse_clients()
    reuse_clients()  # twice is once
    with Connection(broker_url(redis_url)) as connection:
        channel: Any = connection.channel()
        with channel.conn_or_acquire() as first, channel.conn_or_acquire() as second:
            assert first is second
        other: Any = connection.channel()
        with other.conn_or_acquire() as third:
            assert third is not first
        queue = Queue("thrift", channel=channel)
        queue.declare()
        for number in range(3):
            connection.Producer(channel).publish({"n": number}, routing_key="thrift")
        got = [queue.get() for _ in range(3)]
        assert [message and message.payload["n"] for message in got] == [0, 1, 2]
        for message in got:
            assert message is not None
            message.ack()
        assert queue.get() is None


class Hub:
    def __init__(self) -> None:
        self.later: list[float] = []

    def call_later(self, delay_s: float, flush: object) -> None:
        self.later.append(delay_s)


def test_events_of_a_moment_go_out_together() -> None:
    consumer: Any = ThriftyConsumer.__new__(ThriftyConsumer)
    consumer.hub = Hub()
    for _ in range(20):
        consumer.on_send_event_buffered()
    assert consumer.hub.later == [EVENTS_EVERY_S]
    time.sleep(EVENTS_EVERY_S * 1.5)
    consumer.on_send_event_buffered()
    assert len(consumer.hub.later) == 2, "an event was left behind"
