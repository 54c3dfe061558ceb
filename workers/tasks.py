"""The Celery tasks, a few lines each: a doorbell becomes a coroutine of the engine."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from celery import Task
from celery.exceptions import Ignore

from backchannel.queue import RUN_CHAT, celery_app
from backchannel.tables import INTERACTIVE
from workers import engine
from workers.process import get_process

app = celery_app()


async def run_chat_coroutine(
    job_id: str, provider: str | None = None, lane: str = INTERACTIVE
) -> str:
    """What the asyncio pool runs for one doorbell.

    Args:
        provider: Whose limits count; None in doorbells of an older version.

    Raises:
        Ignore: A duplicate, a job that waits for its provider's limit, or one that is not ours any
            more: nothing for Flower to show.
    """
    report = await engine.run(get_process(), job_id, provider, lane)
    if report is None:
        raise Ignore
    return str(report)


class CoroutineTask(Task):  # type: ignore[type-arg]
    """A task whose body is a coroutine. `finished` is set by the asyncio pool, which ran it before
    Celery's tracer asks; under threads or prefork the body waits for the loop itself."""

    abstract = True
    coroutine: Any = None
    finished: Future[str] | None = None

    def body(self, *args: Any) -> str:
        """The coroutine's result, or its exception."""
        future = self.finished or get_process().submit(self.coroutine(*args))
        return str(future.result())


@app.task(name=RUN_CHAT, bind=True, base=CoroutineTask, coroutine=staticmethod(run_chat_coroutine))
def run_chat(
    self: CoroutineTask, job_id: str, provider: str | None = None, lane: str = INTERACTIVE
) -> str:
    """Run one chat job's next attempt."""
    return self.body(job_id, provider, lane)
