"""The queue: the one Celery task's name, its doorbells, and the Celery app that both ends agree on.

The database row is the job. A Celery message is a doorbell: it carries a job id, and which
provider's limits to look at first; it may be lost, doubled or late, and is rendered here once
instead of through `send_task` (11.5 µs against 390). Its form is Celery's task protocol 2
(https://docs.celeryq.dev/en/stable/internals/protocol.html) inside kombu's Redis envelope.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
import uuid
from functools import lru_cache
from typing import TYPE_CHECKING

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from backchannel.background import end
from backchannel.books import Doorbell
from backchannel.pubsub import OUTAGE
from backchannel.settings import Settings, get_settings
from backchannel.tables import LANES

if TYPE_CHECKING:
    from celery import Celery

log = structlog.get_logger()

RUN_CHAT = "backchannel.run_chat"

_encode = msgspec.json.Encoder().encode
_ORIGIN = f"backchannel@{os.uname().nodename}"
_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def celery_id(job_id: str, attempt: int) -> str:
    """One Celery task is one attempt: the second ring for the same attempt is the same task."""
    return f"{job_id}.{attempt}"


def render(bell: Doorbell) -> bytes:
    """One doorbell as kombu's Redis transport expects it in the list."""
    task_id = celery_id(bell.job_id, bell.attempt)
    words = f"('{bell.job_id}', '{bell.lane}', '{bell.model}', 'attempt {bell.attempt}')"
    # as keywords: a worker of an older version does without
    way = {"provider": bell.model.partition(":")[0], "lane": bell.lane}
    body = base64.b64encode(_encode([[bell.job_id], way, _EMBED])).decode()
    return _encode(
        {
            "body": body,
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": RUN_CHAT,
                "id": task_id,
                "root_id": task_id,
                "parent_id": None,
                "group": None,
                "eta": None,
                "expires": None,
                "retries": 0,
                "timelimit": [None, None],
                "argsrepr": words,
                "kwargsrepr": "{}",
                "origin": _ORIGIN,
                "ignore_result": True,
            },
            "properties": {
                "correlation_id": task_id,
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": bell.lane},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    )


async def ring(redis: Redis, prefix: str, bells: list[Doorbell]) -> int:
    """Put doorbells into their lanes' queues in one round trip; returns the longest queue's length.

    Raises:
        RedisError: Redis did not take them; the dispatcher rings again after 5 s.
    """
    pipe = redis.pipeline(transaction=False)
    for bell in bells:
        # kombu pops from the right: what was reaped or handed back goes to the head of the line
        push = pipe.rpush if bell.front else pipe.lpush
        push(f"{prefix}{bell.lane}", render(bell))
    return max(await pipe.execute(), default=0)


async def queue_length(redis: Redis, prefix: str, lane: str) -> int:
    """How many doorbells wait in a lane."""
    return int(await redis.llen(f"{prefix}{lane}"))


class Ringer:
    """Rings for the API without making a POST wait; what fails is left to the dispatcher.

    Ask `open` before a job is accepted, and write down in its row whether it is rung: one that is
    on the books as rung, and was not, waits until it counts as lost, and the dispatcher looks for
    lost ones among the oldest, which still have their doorbells and are then rung twice.
    """

    # above this many waiting doorbells more help nobody: the dispatcher's window takes over
    ENOUGH = 1_000
    PAUSE_S = 1.0

    def __init__(self, redis: Redis, prefix: str) -> None:
        self._redis = redis
        self._prefix = prefix
        self._bells: list[Doorbell] = []
        self._some = asyncio.Event()
        self._not_before = 0.0
        self._task = asyncio.create_task(self._ring_forever(), name="ringer")

    @property
    def open(self) -> bool:
        """Whether a job accepted now should be rung for here."""
        return time.monotonic() >= self._not_before

    def ring(self, bell: Doorbell | None) -> None:
        """Ring soon; returns at once."""
        if bell is not None:
            self._bells.append(bell)
            self._some.set()

    async def close(self) -> None:
        """Stop; doorbells not yet rung are left to the dispatcher."""
        await end(self._task)

    async def _ring_forever(self) -> None:
        while True:
            await self._some.wait()
            self._some.clear()
            bells, self._bells = self._bells, []
            try:
                if await ring(self._redis, self._prefix, bells) > self.ENOUGH:
                    self._not_before = time.monotonic() + self.PAUSE_S
            except OUTAGE as error:
                self._not_before = time.monotonic() + self.PAUSE_S
                log.warning(
                    "Redis does not take doorbells; the jobs are safe in the database and will be "
                    "rung when it is back.",
                    jobs=len(bells),
                    error=str(error),
                )
            except Exception:
                # a defect: a process without its ringer would leave every job to the dispatcher
                log.exception("Doorbells could not be rung; the dispatcher does it.")


def broker_url(redis_url: str) -> str:
    """kombu's spelling of a Redis URL: a unix socket is ``redis+socket://``."""
    return redis_url.replace("unix://", "redis+socket://", 1)


def make_celery(settings: Settings) -> Celery:
    """The Celery app. Every setting that is not a default has its reason here."""
    from celery import Celery
    from kombu import Queue
    from kombu.transport.redis import Transport

    # A Redis that is full, read-only or loading is an outage like any other: reconnect. Celery
    # takes these answers for defects and ends the worker.
    if ResponseError not in Transport.connection_errors:
        Transport.connection_errors = (*Transport.connection_errors, ResponseError)
    app = Celery("backchannel", set_as_current=False)
    app.conf.update(
        broker_url=broker_url(settings.redis),
        # the row is the result: nothing reads a result backend, and it would hold answers
        result_backend=None,
        task_ignore_result=True,
        # A doorbell holds its place among those prefetched until its job is over.
        task_acks_late=True,
        task_acks_on_failure_or_timeout=True,
        worker_prefetch_multiplier=1,
        # lanes in the order they are served, not round robin
        task_queues=[Queue(lane, routing_key=lane) for lane in LANES],
        task_default_queue=LANES[0],
        broker_transport_options={
            "queue_order_strategy": "priority",
            "global_keyprefix": settings.redis_prefix,
            # No copy of a doorbell is kept while it is out: reaper and dispatcher ring again from
            # the rows, and sooner. Two round trips less for each job (docs/decisions/0017).
            "ack_emulation": False,
            # A half-open connection is noticed within these; stock Celery waits for ever. They add
            # up: first the BRPOP, then a publish find theirs dead (docs/decisions/0018).
            "socket_timeout": 3,
            "socket_connect_timeout": 3,
            "socket_keepalive": True,
            # kombu looks this often for a BRPOP whose answer is overdue: noticed after 6 to 11 s
            "health_check_interval": 5,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # a lost broker connection must not stop the provider calls that are running
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # JSON only: a message can never be code
        task_serializer="json",
        accept_content=["json"],
        # revoke and shutdown over Redis would be open to whoever reaches it
        worker_enable_remote_control=False,
        worker_send_task_events=settings.flower_events,
        task_send_sent_event=False,
        task_track_started=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_detect_quorum_queues=False,
        enable_utc=True,
    )
    return app


@lru_cache(maxsize=1)
def celery_app() -> Celery:
    """This process's Celery app, made at first use: the API rings without it."""
    return make_celery(get_settings())
