"""A provider with every fault of the adapter contract, and the books of a mixed load."""

from __future__ import annotations

import asyncio
import json
import time
from itertools import pairwise
from typing import Any

import httpx2

from chaos.cases import case
from chaos.world import World

# model script → state, error code; every one is asked in both dialects, streamed and plain
FAULTS: dict[str, tuple[str, str | None]] = {
    "ok-t5": ("succeeded", None),
    "utf8": ("succeeded", None),
    "bom": ("succeeded", None),
    "crlf": ("succeeded", None),
    "drip": ("succeeded", None),
    "comments": ("succeeded", None),
    "json200": ("succeeded", None),
    "flaky-1-500": ("succeeded", None),
    "status-400": ("failed", "invalid_request"),
    "status-401": ("failed", "auth"),
    "status-404": ("failed", "invalid_request"),
    "status-500": ("failed", "server_error"),
    "billing": ("failed", "billing"),
    "context": ("failed", "context_length"),
    "policy": ("failed", "content_filter"),
    "redirect": ("failed", "invalid_request"),
    "drop": ("failed", "disconnected"),
    "html": ("failed", "malformed"),
    "mute": ("failed", "stalled"),
}
STREAMED: dict[str, tuple[str, str | None]] = {
    "cut-5": ("failed", "disconnected"),
    "noend-5": ("failed", "truncated"),
    "half-5": ("failed", "truncated"),
    "inerr-5-500": ("failed", "server_error"),
    "stall-5": ("failed", "stalled"),
    "badjson": ("failed", "malformed"),
    "bigline": ("failed", "malformed"),
    "bigtext": ("failed", "answer_too_large"),
}


@case(
    "provider.faults",
    max_retries=1, backoff_max_s=0.2, first_byte_s=3, idle_s=3, attempt_s=30,
)  # fmt: skip
async def every_fault_in_every_dialect(world: World, full: bool) -> dict[str, Any]:
    """0 truncated answers marked succeeded; each fault ends in its own class."""
    world.worker()
    expected: dict[str, tuple[str, str, str | None]] = {}
    for dialect in ("openai", "anthropic"):
        for stream in (True, False):
            for script, (state, code) in {**FAULTS, **(STREAMED if stream else {})}.items():
                made = await world.accept(1, f"{dialect}:{script}", stream=stream)
                expected[made[0]] = (f"{dialect}:{script} stream={stream}", state, code)
    await asyncio.to_thread(world.settle, 150)
    found = {row.id: row for row in world.rows("SELECT * FROM jobs")}
    wrong = [
        f"{cell}: {found[job_id].state} {found[job_id].error_code}, not {state} {code}"
        for job_id, (cell, state, code) in expected.items()
        if (found[job_id].state, found[job_id].error_code) != (state, code)
    ]
    assert not wrong, "; ".join(wrong)
    return {"cells": len(expected)}


@case("provider.storm", backoff_max_s=1)
async def a_storm_of_429(world: World, full: bool) -> dict[str, Any]:
    """No call before Retry-After is over, and no attempt is burnt by it."""
    world.worker()
    (job_id,) = await world.accept(1, "openai:status-429-ra3", deadline_s=11)
    await asyncio.to_thread(world.settle, 40)
    lines = [json.loads(line) for line in world.stack.ledger.read_text().splitlines()]
    times = [entry["time"] for entry in lines if entry["at"] == "start"]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps
    assert min(gaps) >= 3.0, gaps
    (job,) = world.rows(f"SELECT * FROM jobs WHERE id = '{job_id}'")
    assert job.retries == 0, "a 429 burnt a retry"
    return {"calls": len(times), "shortest_gap_s": round(min(gaps), 2)}


@case("accounting.mixed", databases=("sqlite", "postgresql"))
async def a_mixed_load_adds_up(world: World, full: bool) -> dict[str, Any]:
    """Oracle tokens equal usage rows over a mixed load; cancelled halves stay on the books."""
    world.worker(100)
    each = 300 if full else 40
    for model in (
        "openai:ok-t5", "openai:ok-t30-d5", "anthropic:ok-t12", "openai:reasoning",
        "anthropic:ok-t9-c100", "openai:flaky-1-529",
    ):  # fmt: skip
        await world.accept(each, model, lane="batch", stream=False)
    cancelled = await world.accept(each // 4, "openai:ok-t500-d20")
    await asyncio.sleep(3.0)
    async with httpx2.AsyncClient(base_url=world.stack.url, timeout=60) as client:
        await asyncio.gather(*[client.post(f"/v1/jobs/{each}/cancel") for each in cancelled])
        await asyncio.to_thread(world.settle, 300)
        total = (await client.get("/v1/usage")).json()["total"]
    ended = _ledger_tokens(world)
    (books,) = world.rows("SELECT sum(output_tokens) AS n FROM usage WHERE source = 'final'")
    assert books.n == ended, f"books {books.n}, provider {ended}"
    assert total["output_tokens"] + total["unbilled"]["output_tokens"] == books.n
    return {"jobs": len(world.accepted), "output_tokens": int(books.n)}


def _ledger_tokens(world: World) -> int:
    time.sleep(0.5)
    lines = [json.loads(line) for line in world.stack.ledger.read_text().splitlines()]
    return sum(e["tokens"] for e in lines if e["at"] == "end" and e["outcome"] == "ok")
