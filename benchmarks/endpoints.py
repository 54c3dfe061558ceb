"""Two endpoints to compare ours with: one that does nothing, and one that people write first.

The naive one is a transaction and a ``send_task`` in a plain function.
"""

from __future__ import annotations

import os
import sys
import uuid
from typing import Any

import uvicorn
from celery import Celery
from fastapi import FastAPI
from pydantic import BaseModel
from sqlmodel import JSON, Column, Field, Session, SQLModel, create_engine


class Asked(BaseModel):
    """A prompt for a model."""

    model: str
    prompt: str


class NaiveJob(SQLModel, table=True):
    """One job."""

    id: str = Field(primary_key=True)
    state: str
    asked: dict[str, Any] = Field(sa_column=Column(JSON))


def empty() -> FastAPI:
    """Checks the body and answers."""
    app = FastAPI()

    @app.post("/v1/jobs", status_code=202)
    async def create(asked: Asked) -> dict[str, str]:
        return {"id": "job_0", "model": asked.model}

    return app


def naive() -> FastAPI:
    """Commits a row and sends a task."""
    app = FastAPI()
    engine = create_engine(os.environ["BENCHMARK_DATABASE"], connect_args={"timeout": 30})
    with engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    SQLModel.metadata.create_all(engine)
    celery = Celery("naive", broker=os.environ["BENCHMARK_BROKER"])

    @app.post("/v1/jobs", status_code=202)
    def create(asked: Asked) -> dict[str, str]:
        job = NaiveJob(id=uuid.uuid4().hex, state="queued", asked=asked.model_dump())
        with Session(engine) as session:
            session.add(job)
            session.commit()
            job_id = job.id
        celery.send_task("naive.chat", (job_id,))
        return {"id": job_id, "model": asked.model}

    return app


if __name__ == "__main__":
    uvicorn.run(
        {"empty": empty, "naive": naive}[sys.argv[1]](),
        host="127.0.0.1",
        port=int(sys.argv[2]),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
