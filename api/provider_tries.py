"""Trying a provider: a chat of one token, and the models it lists; what comes of it in words.

Both are done by a worker, for only workers have the keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from fastapi import APIRouter, BackgroundTasks, Response
from pydantic import BaseModel, ConfigDict

from api.cancelling import cancel
from api.deps import Caller, Resources, Shared, StrictRoute
from api.jobs import follow, submit
from api.providers import known, live_workers
from api.requests import checked
from backchannel import errands, events
from backchannel.errors import PROVIDER_ERRORS, InvalidRequest, ProviderError
from backchannel.schemas import CreateJob, Name
from backchannel.tables import SUCCEEDED

router = APIRouter(prefix="/v1/providers", tags=["providers"], route_class=StrictRoute)

DISCOVER_S = 15.0  # a worker gives up before
TEST_S = 30.0


class TryProvider(BaseModel):
    """Which model to ask; the default one if none is named."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Name | None = None


@router.post("/{provider_id}/discover")
async def discover_models(provider_id: str, its: Shared) -> dict[str, Any]:
    """The models that the provider lists; whatever it says, a job may name any other."""
    await its.roster.refresh()
    known(its.registry, provider_id)
    errand = {"provider": provider_id}
    found = await errands.ask(its.redis, its.listener, its.prefix, errand, DISCOVER_S)
    error = found.get("error")
    if error is None:
        return {"object": "provider.models", "provider": provider_id, "models": found["models"]}
    if error["code"] in PROVIDER_ERRORS:
        refused = ProviderError(error["message"], code=error["code"])
        refused.headers = {"x-should-retry": "false"}  # who asks wants to know, not to wait
        raise refused
    raise InvalidRequest(error["message"], code=error["code"])


@router.post("/{provider_id}/test")
async def try_provider(
    provider_id: str,
    asked: TryProvider,
    its: Shared,
    caller: Caller,
    response: Response,
    afterwards: BackgroundTasks,
) -> dict[str, Any]:
    """Send a chat of one token, as an ordinary job, and say in words what happened."""
    await its.roster.refresh()
    provider = known(its.registry, provider_id)
    if not await its.db.read(lambda c: live_workers(c, its.settings.lease_s)):
        raise errands.no_worker()
    order = CreateJob.model_construct(
        model=f"{provider_id}:{asked.model or provider.default_model}",
        prompt="Hi",
        parameters={"max_tokens": 1},
        metadata={"backchannel": "providers test"},
        deadline_s=min(2 * TEST_S, its.settings.job_deadline_s),
    )
    began = time.monotonic()
    job = await submit(its, await checked(its, caller, order, order.chat(), None), response)
    code, words = await _what_happens(its, job.id, job.model, began)
    if code is not None:
        await cancel(its, caller, job.id, afterwards)  # it is not to be tried again
    return {
        "object": "provider.test",
        "provider": provider_id,
        "model": job.model,
        "ok": code is None,
        "code": code,
        "message": words,
        "job": job.id,
    }


async def _what_happens(
    its: Resources, job_id: str, model: str, began: float
) -> tuple[str | None, str]:
    """The error's code, if any, and a sentence: by the first try, not by the last."""
    started = False
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(TEST_S), contextlib.aclosing(_told(its, job_id)) as told:
            async for kind, its_own in told:
                if kind == events.STARTED:
                    started = True
                elif kind == events.RETRYING:
                    return its_own["code"], its_own["message"]
                elif kind == events.END:
                    return _ended(its_own, model, began)
    if started:
        return "stalled", f"{model} has not answered within {TEST_S:g} s."
    return "no_worker", f"No worker took the job within {TEST_S:g} s: all may be busy."


async def _told(its: Resources, job_id: str) -> Any:
    async for some in follow(its, job_id):
        for event in some:
            yield events.fields(event)


def _ended(end: dict[str, Any], model: str, began: float) -> tuple[str | None, str]:
    if end["state"] == SUCCEEDED:
        return None, f"{model} answered in {round((time.monotonic() - began) * 1000)} ms."
    error = end["error"] or {"code": end["state"], "message": None}
    return error["code"], error["message"] or f"The job was {end['state']}."
