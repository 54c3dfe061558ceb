"""Starts Celery with our pool, queues and hooks: one worker process."""

from __future__ import annotations

import os
import socket
from typing import Any

import structlog
from celery.signals import worker_ready
from celery.worker import WorkController

from backchannel.db import migrate
from backchannel.garbage import settle
from backchannel.logs import configure
from backchannel.settings import get_settings
from backchannel.tables import LANES

log = structlog.get_logger()


def run(jobs_in_flight: int | None = None) -> int:
    """Run one worker process until it is told to stop; returns its exit code."""
    settings = get_settings()
    slots = jobs_in_flight or settings.jobs_in_flight
    configure(settings, "worker")
    migrate(settings.database)
    from workers.pool import AsyncioPool
    from workers.tasks import app
    from workers.thrift import ThriftyConsumer, reuse_clients

    reuse_clients()

    @worker_ready.connect(weak=False)
    def _ready(**_: object) -> None:
        pool: Any = worker.pool
        pool.take_signals()
        settle()
        log.info("The worker is ready.", pid=os.getpid(), jobs_in_flight=slots, lanes=LANES)

    worker: WorkController = app.Worker(
        hostname=f"worker-{os.getpid()}@{socket.gethostname()}",
        pool_cls=AsyncioPool,
        consumer_cls=ThriftyConsumer,
        concurrency=slots,
        loglevel=settings.log_level.upper(),
        # workers need not know each other: the database and the caretaker are their agreement
        without_gossip=True,
        without_mingle=True,
        quiet=True,
    )
    worker.start()
    return int(worker.exitcode or 0)
