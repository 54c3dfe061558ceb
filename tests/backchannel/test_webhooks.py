"""Deliveries: written with the end they tell of, taken by one, given up after a day, replayed."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

from backchannel import batches, lifecycle, webhooks
from backchannel.db import Database
from backchannel.notices import EVENT_TYPES
from backchannel.tables import deliveries
from backchannel.webhook_post import body_of
from backchannel.webhooks import Answer, Delivery
from tests import makers
from tests.backchannel import batching

NO = Answer(500, "It answered 500.")
YES = Answer(204, None)


def told(database: Database) -> list[tuple[str, str, str]]:
    return [
        (each["webhook_id"], each["type"], each["subject"])
        for each in makers.rows(database, "deliveries")
    ]


def row(database: Database, webhook_id: str = "wh_1") -> Any:
    statement = deliveries.select().where(deliveries.c.webhook_id == webhook_id)
    return database.read_now(lambda c: c.execute(statement).one())


def take(database: Database, room: int = 10, webhook_id: str = "wh_1") -> list[Delivery]:
    return database.write_now(lambda c: webhooks.take(c, webhook_id, room))


def settle(database: Database, delivery: Delivery, answer: Answer) -> str | None:
    return database.write_now(lambda c: webhooks.settle(c, delivery, answer))


def hurry(database: Database) -> None:
    """The wait for the next try is over."""
    database.write_now(lambda c: c.execute(deliveries.update().values(next_ms=1)))


# ---------------------------------------------------------------- what is told


@pytest.mark.parametrize(
    ("kind", "state", "changes", "event"),
    [
        ("job", "succeeded", {}, "job.succeeded"),
        ("chat", "failed", {}, "job.failed"),
        ("job", "cancelled", {}, "job.cancelled"),
        ("job", "expired", {}, "job.expired"),
        ("response", "succeeded", {}, "response.completed"),
        ("response", "succeeded", {"finish_reason": "length"}, "response.incomplete"),
        ("response", "succeeded", {"finish_reason": "content_filter"}, "response.incomplete"),
        ("response", "failed", {}, "response.failed"),
        ("response", "expired", {}, "response.failed"),
        ("response", "cancelled", {}, "response.cancelled"),
    ],
)
def test_an_end_is_told_in_the_words_of_its_face(
    database: Database, kind: str, state: str, changes: dict[str, Any], event: str
) -> None:
    makers.webhook(database)
    job_id = makers.queued(database, kind=kind)
    claim = makers.calling(database, job_id)
    database.write_now(lambda c: lifecycle.finish(c, claim, makers.outcome(state, **changes)))
    subject = job_id.replace("job_", "resp_") if kind == "response" else job_id
    assert event in EVENT_TYPES
    assert told(database) == [("wh_1", event, subject)]
    assert row(database).event_id == job_id.replace("job_", "evt_")


def test_who_is_told_has_asked_for_it(database: Database) -> None:
    makers.webhook(database, "wh_all")
    makers.webhook(database, "wh_failed", event_types=["job.failed"])
    makers.webhook(database, "wh_both", event_types=["job.failed", "job.succeeded"])
    makers.webhook(database, "wh_off", disabled_ms=1)
    makers.webhook(database, "wh_bob", caller="bob")
    job_id = makers.finished(database)
    assert told(database) == [
        ("wh_all", "job.succeeded", job_id),
        ("wh_both", "job.succeeded", job_id),
    ]


def test_without_webhooks_nothing_is_written(database: Database) -> None:
    makers.finished(database)
    assert told(database) == []


def test_a_batch_tells_of_itself_and_its_lines_do_not(database: Database) -> None:
    makers.webhook(database)
    done = batching.planned(database, batching.line("a"), batching.line("b"))
    for job in batching.jobs_of(database, done):
        batching.finish(database, job.id)
    assert told(database) == []
    assert database.write_now(lambda c: batches.finalize(c, done))
    assert batching.end(database, done)
    assert not batching.end(database, done)
    bad = batching.validated(database, b"not json")
    stopped = batching.planned(database, batching.line("a"))
    (job,) = batching.jobs_of(database, stopped)
    batching.finish(database, job.id, "cancelled")
    database.write_now(lambda c: batches.cancel(c, stopped, "alice"))
    assert batching.end(database, stopped, "cancelled")
    late = batching.create(database, batching.upload(database, batching.line("a")), window_s=-1)
    assert database.write_now(lambda c: batches.expire_unchecked(c, late))
    assert sorted(told(database)) == sorted(
        [
            ("wh_1", "batch.completed", done),
            ("wh_1", "batch.failed", bad),
            ("wh_1", "batch.cancelled", stopped),
            ("wh_1", "batch.expired", late),
        ]
    )


def test_the_message_of_the_page_is_signed_with_the_secret_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text(encoding="utf-8")
    (secret,) = re.findall(r'"signing_secret":"(whsec_[^"]+)"', page)
    (message,) = re.findall(
        r"^```http\n(content-type: .*?)\n\n(.*?)\n```", page, re.MULTILINE | re.DOTALL
    )
    headers = dict(line.split(": ", 1) for line in message[0].splitlines())
    now = datetime.fromtimestamp(int(headers["webhook-timestamp"]), UTC)
    signed = Webhook(secret).sign(headers["webhook-id"], now, message[1])
    assert signed == headers["webhook-signature"]
    event = json.loads(message[1])
    sample = Delivery(
        "wh", event["id"], event["type"], event["data"]["id"], event["created_at"] * 1000, 1, "", ()
    )
    assert body_of(sample).decode() == message[1]


# ---------------------------------------------------------------- take and settle


def test_a_delivery_is_one_taker_s_until_its_lease_is_over(database: Database) -> None:
    makers.webhook(database)
    makers.finished(database)
    assert database.read_now(webhooks.waiting) == ["wh_1"]
    (first,) = take(database)
    assert take(database) == []
    assert database.read_now(webhooks.waiting) == []
    hurry(database)  # its taker has died
    (second,) = take(database)
    assert (second.event_id, first.tries, second.tries) == (first.event_id, 1, 2)
    assert settle(database, first, YES) is None  # and was only slow
    assert row(database).state == "pending"
    assert settle(database, second, YES) == "delivered"
    assert settle(database, second, NO) is None
    assert (row(database).state, row(database).status, row(database).error) == (
        "delivered", 204, None,
    )  # fmt: skip


def test_the_waits_grow_up_to_a_day_in_all(database: Database) -> None:
    makers.webhook(database)
    makers.finished(database)
    waits: list[float] = []
    while True:
        hurry(database)
        (taken,) = take(database)
        there = settle(database, taken, NO)
        if there == "dead":
            break
        assert (there, row(database).error) == ("pending", "It answered 500.")
        waits.append((row(database).next_ms - makers.ago(database, 0)) / 1000)
    assert len(waits) == len(webhooks.WAITS_S) == row(database).tries - 1
    for wait, full in zip(waits, webhooks.WAITS_S, strict=True):
        assert 0.75 * full < wait <= full
    assert sorted(webhooks.WAITS_S) == list(webhooks.WAITS_S)
    assert 20 * 3600 < sum(webhooks.WAITS_S) <= 24 * 3600
    assert row(database).ended_ms is not None
    hurry(database)
    assert take(database) == []


def test_who_says_gone_is_left_alone(database: Database) -> None:
    makers.webhook(database)
    for _ in range(3):
        makers.finished(database)
    first, second = take(database, room=2)
    assert settle(database, first, Answer(410, "It answered 410.")) == "dead"
    assert settle(database, second, YES) is None
    assert take(database) == []
    assert {each["state"] for each in makers.rows(database, "deliveries")} == {"dead"}
    (webhook,) = makers.rows(database, "webhooks")
    assert webhook["disabled_ms"] is not None
    assert "410" in webhook["disabled_why"]
    makers.finished(database)
    assert len(makers.rows(database, "deliveries")) == 3


def test_two_workers_never_take_the_same(database_url: str) -> None:
    workers = [Database(database_url, name=f"worker-{n}") for n in range(2)]
    makers.webhook(workers[0])
    ids = {makers.finished(workers[0]).replace("job_", "evt_") for _ in range(60)}
    together = threading.Barrier(2)
    taken: list[str] = []

    def work(database: Database) -> None:
        together.wait()
        while found := take(database, room=3):
            taken.extend(each.event_id for each in found)

    threads = [threading.Thread(target=work, args=(each,)) for each in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in workers:
        each.close()
    # skipping what the other has locked, one may come back with too little: nothing is doubled
    assert Counter(taken).most_common(1)[0][1] == 1
    assert set(taken) <= ids


def test_both_secrets_sign_for_as_long_as_the_old_one_is_valid(database: Database) -> None:
    soon = makers.ago(database, -60)
    makers.webhook(database, secret=b"new", old_secret=b"old", old_until_ms=soon)
    makers.finished(database)
    assert take(database)[0].secrets == (b"new", b"old")
    makers.webhook(database, "wh_2", secret=b"new", old_secret=b"old", old_until_ms=1)
    makers.finished(database)
    assert take(database, webhook_id="wh_2")[0].secrets == (b"new",)


# ---------------------------------------------------------------- replay and forget


def test_what_has_ended_is_replayed_from_its_first_try(database: Database) -> None:
    makers.webhook(database)
    makers.finished(database)
    (taken,) = take(database)
    event = taken.event_id
    assert not database.write_now(lambda c: webhooks.replay(c, "wh_1", event))
    settle(database, taken, YES)
    assert database.write_now(lambda c: webhooks.replay(c, "wh_1", event))
    (again,) = take(database)
    assert (again.event_id, again.tries) == (event, 1)
    settle(database, again, Answer(410, "It answered 410."))
    database.write_now(lambda c: c.exec_driver_sql("UPDATE webhooks SET disabled_ms = NULL"))
    assert database.write_now(lambda c: webhooks.replay_dead(c, "wh_1")) == 1
    assert database.write_now(lambda c: webhooks.replay_dead(c, "wh_1")) == 0
    assert [each.event_id for each in take(database)] == [event]


def test_what_ended_long_ago_is_forgotten(database: Database) -> None:
    makers.webhook(database)
    ages = {"delivered": (6, 8), "dead": (8, 29, 31), "pending": (0,)}
    for state, days in ages.items():
        for day in days:
            event = makers.finished(database).replace("job_", "evt_")
            ended = makers.ago(database, day * 86_400) if day else None
            database.write_now(
                lambda c, event=event, state=state, ended=ended: c.execute(
                    deliveries.update().where(deliveries.c.event_id == event),
                    {"state": state, "ended_ms": ended},
                )
            )
    assert database.write_now(webhooks.forget_old) == 2
    assert database.write_now(webhooks.forget_old) == 0
    states = Counter(each["state"] for each in makers.rows(database, "deliveries"))
    assert states == {"delivered": 1, "dead": 2, "pending": 1}
