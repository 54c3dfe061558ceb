"""The Celery worker most people write: the sync SDK, and one PUBLISH a token for the live readers.

Started as ``celery -A benchmarks.contenders.usual_tasks worker``, with prefork or gevent.
"""

from __future__ import annotations

import os
from functools import lru_cache

import redis
from celery import Celery
from openai import OpenAI
from openai.resources.chat import completions  # noqa: F401  or each child imports it after the fork

from benchmarks.work import PATIENCE_S

BROKER = os.environ.get("BENCHMARK_BROKER", "")
ANSWERS = os.environ.get("BENCHMARK_ANSWERS", "")
PROVIDER = os.environ.get("BENCHMARK_PROVIDER", "")

app = Celery("usual", broker=BROKER, backend=ANSWERS)
app.conf.update(
    task_acks_late=True,
    worker_send_task_events=True,
    broker_connection_retry_on_startup=True,
    redis_max_connections=2000,
)


@lru_cache
def _client() -> OpenAI:
    return OpenAI(api_key="k", base_url=f"{PROVIDER}/v1", timeout=PATIENCE_S)


@lru_cache
def _live() -> redis.Redis:
    return redis.Redis.from_url(os.environ["BENCHMARK_LIVE"])


@app.task(name="usual.chat", bind=True)
def chat(self: object, model: str) -> str:
    """Stream one answer; its text is the task's result."""
    channel = f"job:{self.request.id}"  # type: ignore[attr-defined]
    live = _live()
    texts: list[str] = []
    stream = _client().chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Hello?"}], stream=True
    )
    for chunk in stream:
        if chunk.choices and (text := chunk.choices[0].delta.content):
            texts.append(text)
            live.publish(channel, text)
    return "".join(texts)
