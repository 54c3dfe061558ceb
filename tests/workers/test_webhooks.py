"""The habit that sends webhooks: signed, repeated, side by side, and without a look at answers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from backchannel.notices import EVENT_TYPES
from backchannel.sealed import seal
from backchannel.settings import get_settings
from backchannel.webhook_post import new_secret
from tests import makers
from tests.receiver import Receiver, receiver
from tests.workers.conftest import Bench
from workers.process import Process

SECRET = new_secret()


@pytest.fixture
def environment(
    environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> pytest.MonkeyPatch:
    """Loopback is allowed, for the receiver."""
    environment.setenv("BACKCHANNEL_HOME", str(tmp_path_factory.mktemp("home")))
    environment.setenv("BACKCHANNEL_EGRESS_ALLOW", "loopback")
    get_settings.cache_clear()
    return environment


@pytest.fixture
def listening() -> Iterator[Receiver]:
    """A receiver."""
    with receiver() as made:
        yield made


def subscribe(bench: Bench, url: str, webhook_id: str = "wh_1", secret: str = SECRET) -> None:
    sealed = seal(get_settings(), secret)
    makers.webhook(bench.database, webhook_id, caller="local", url=url, secret=sealed)


def finished(bench: Bench) -> str:
    """The event of a job that has ended."""
    return makers.finished(bench.database, caller="local").replace("job_", "evt_")


async def until(bench: Bench, state: str, count: int = 1, within_s: float = 30) -> None:
    give_up = time.monotonic() + within_s
    while True:
        rows = makers.rows(bench.database, "deliveries")
        if Counter(each["state"] for each in rows)[state] == count:
            return
        assert time.monotonic() < give_up, rows
        await asyncio.sleep(0.05)


async def test_a_job_s_end_is_told_once_and_signed(
    bench: Bench, process: Process, listening: Receiver
) -> None:
    subscribe(bench, listening.url)
    job_id = bench.accept("openai:ok-t2")
    bench.start(process, job_id)
    await until(bench, "delivered")
    (message,) = listening.messages
    event = message.verified(SECRET)
    assert event.pop("created_at") == pytest.approx(time.time(), abs=60)
    assert event == {
        "id": message.id, "object": "event", "type": "job.succeeded", "data": {"id": job_id},
    }  # fmt: skip
    await asyncio.sleep(2.0)
    assert len(listening.messages) == 1


async def test_what_was_not_taken_is_sent_again_with_the_same_id(
    bench: Bench, process: Process, listening: Receiver
) -> None:
    listening.status = 503
    subscribe(bench, listening.url)
    event = finished(bench)
    await asyncio.to_thread(listening.until, 1)
    listening.status = 200
    # the first wait is 5 s
    await until(bench, "delivered")
    first, second = listening.messages
    assert first.id == second.id == event
    assert first.body == second.body
    (row,) = makers.rows(bench.database, "deliveries")
    assert (row["tries"], row["status"], row["error"]) == (2, 200, None)


@pytest.mark.parametrize(("asked", "at_most_s"), [("900", 900), ("9999999", 28_800)])
async def test_a_receiver_may_ask_to_be_left_alone(
    bench: Bench, process: Process, listening: Receiver, asked: str, at_most_s: int
) -> None:
    listening.status, listening.headers = 429, {"Retry-After": asked}
    subscribe(bench, listening.url)
    finished(bench)
    await asyncio.to_thread(listening.until, 1)
    await asyncio.sleep(1.0)  # it is written down
    (row,) = makers.rows(bench.database, "deliveries")
    assert row["next_ms"] / 1000 - time.time() == pytest.approx(at_most_s, abs=10)


async def test_a_receiver_that_hangs_holds_up_no_other(
    bench: Bench, process: Process, listening: Receiver
) -> None:
    with receiver() as hanging:
        hanging.pause_s = 8.0
        subscribe(bench, hanging.url, "wh_hangs")
        subscribe(bench, listening.url, "wh_well")
        for _ in range(30):
            finished(bench)
        started = time.monotonic()
        await asyncio.to_thread(listening.until, 30)
        assert time.monotonic() - started < 6
        assert len(hanging.messages) <= 8
        bench.database.write_now(
            lambda c: c.exec_driver_sql("DELETE FROM webhooks WHERE id = 'wh_hangs'")
        )


async def test_many_processes_send_each_event_once(
    bench: Bench, new_process: Callable[[], Process], listening: Receiver
) -> None:
    listening.pause_s = 0.05
    subscribe(bench, listening.url)
    events = {finished(bench) for _ in range(40)}
    for _ in range(3):
        new_process()
    await until(bench, "delivered", 40)
    assert Counter(message.id for message in listening.messages) == dict.fromkeys(events, 1)


async def test_gone_is_gone(bench: Bench, process: Process, listening: Receiver) -> None:
    listening.status = 410
    subscribe(bench, listening.url)
    finished(bench)
    await until(bench, "dead")
    (webhook,) = makers.rows(bench.database, "webhooks")
    assert webhook["disabled_ms"] is not None
    finished(bench)
    await asyncio.sleep(1.5)
    assert len(listening.messages) == 1


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://10.255.255.1/", "is not a public address"),
        ("http://169.254.169.254/", "metadata"),
        ("http://receiver.example.com/", "http:// is for allowed hosts only"),
    ],
)
async def test_what_the_guard_refuses_is_a_failed_try(
    bench: Bench, process: Process, url: str, why: str
) -> None:
    subscribe(bench, url)
    finished(bench)
    give_up = time.monotonic() + 20
    while not (row := makers.rows(bench.database, "deliveries")[0])["error"]:
        assert time.monotonic() < give_up
        await asyncio.sleep(0.05)
    assert why in row["error"]
    assert (row["state"], row["status"]) == ("pending", None)


async def test_a_secret_of_another_master_key_is_said_on_the_delivery(
    bench: Bench, process: Process, listening: Receiver
) -> None:
    makers.webhook(bench.database, caller="local", url=listening.url, secret=b"of another")
    seal(get_settings(), "x")
    finished(bench)
    give_up = time.monotonic() + 20
    while not (row := makers.rows(bench.database, "deliveries")[0])["error"]:
        assert time.monotonic() < give_up
        await asyncio.sleep(0.05)
    assert "another master key" in row["error"]
    assert listening.messages == []


def test_every_event_has_a_name_that_openai_s_sdk_knows_or_is_a_job_s() -> None:
    from typing import get_args

    from openai.types.webhooks import unwrap_webhook_event

    union = get_args(unwrap_webhook_event.UnwrapWebhookEvent)[0]
    theirs = {get_args(each.model_fields["type"].annotation)[0] for each in get_args(union)}
    assert {each for each in EVENT_TYPES if not each.startswith("job.")} <= theirs
