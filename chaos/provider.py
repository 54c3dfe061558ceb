"""A provider with every fault of the adapter contract, and the books of a mixed load."""

from __future__ import annotations

import asyncio
import json
import time
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import httpx2

from backchannel.errors import PROVIDER_ERRORS
from backchannel.events import unpack_log
from chaos.cases import case, now
from chaos.world import World

DIALECTS = ("openai", "anthropic", "ollama")
TEXT = ("delta",)


class Fate(NamedTuple):
    """How a job has to end.

    Attributes:
        said: For each call, the kinds of event its readers saw before it ended.
    """

    state: str
    code: str | None
    said: tuple[tuple[str, ...], ...]
    retries: int


def _ends(*said: str) -> Fate:
    return Fate("succeeded", None, (said or TEXT,), 0)


def _second_try(retries: int) -> Fate:
    return Fate("succeeded", None, ((), TEXT), retries)


def _fails(code: str, *said: str) -> Fate:
    calls = 2 if PROVIDER_ERRORS[code].retryable else 1
    return Fate("failed", code, (said,) * calls, calls - 1)


# Every script of the fake provider is asked in every dialect.
FAULTS: dict[str, Fate] = {
    "ok-t5": _ends(),
    "utf8": _ends(),
    "bom": _ends(),
    "crlf": _ends(),
    "drip": _ends(),
    "comments": _ends(),
    "json200": _ends(),
    "length": _ends(),
    "late": _ends(),
    "reasoning": _ends("reasoning", "delta"),
    "tools": _ends("tool_call"),
    "flaky-1-500": _second_try(1),
    "flaky-1-429": _second_try(0),
    "flaky-1-503": _second_try(0),  # what Ollama says when its queue is full
    "flaky-1-529": _second_try(0),
    "status-400": _fails("invalid_request"),
    "status-401": _fails("auth"),
    "status-404": _fails("invalid_request"),
    "status-413": _fails("context_length"),
    "status-500": _fails("server_error"),
    "billing": _fails("billing"),
    "context": _fails("context_length"),
    "policy": _fails("content_filter"),
    "redirect": _fails("invalid_request"),
    "drop": _fails("disconnected"),
    "html": _fails("malformed"),
    "empty": _fails("truncated"),
    "silent": _fails("truncated"),
    "mute": _fails("stalled"),
    "cut-5": _fails("disconnected", *TEXT),
    "noend-5": _fails("truncated", *TEXT),
    "half-5": _fails("truncated", *TEXT),
    "inerr-5-500": _fails("server_error", *TEXT),
    "stall-5": _fails("stalled", *TEXT),
    "badjson": _fails("malformed", *TEXT),
    "notsse": _fails("malformed", *TEXT),
    "bigline": _fails("malformed"),
    "bigtext": _fails("answer_too_large", *TEXT),
}
BEGUN = {"bigline"}  # the stream begins, though its readers see nothing of it


def _fate(dialect: str, script: str) -> Fate:
    if dialect == "ollama" and script.startswith("inerr"):
        return _fails("truncated", *TEXT)  # it tells no error: an empty chunk, and then nothing
    return FAULTS[script]


def _sources(dialect: str, script: str, fate: Fate) -> list[str]:
    """Where each call's usage comes from. Of a broken one only Anthropic's first message tells."""
    if script == "silent":
        return ["partial"] * len(fate.said)  # it says no word, but what it cost
    told = dialect == "anthropic"
    broken = ["partial" if told and (said or script in BEGUN) else "unknown" for said in fate.said]
    return [*broken[:-1], "final"] if fate.state == "succeeded" else broken


def _kinds(fate: Fate) -> list[str]:
    """The kinds of event of the whole stream, pieces of text next to each other as one."""
    kinds: list[str] = []
    for number, said in enumerate(fate.said):
        kinds += ["retrying", "reset", *said] if number else ["started", *said]
    return [*kinds, "end"]


@case(
    "provider.faults",
    max_retries=1, backoff_max_s=0.2, first_byte_s=2, idle_s=2, attempt_s=30,
    circuit_failures=1000,
)  # fmt: skip
async def every_fault_in_every_dialect(world: World, full: bool) -> dict[str, Any]:
    """Each fault ends in its own class, with its calls, books and stream; no half answer passes."""
    world.worker()
    cells: dict[str, tuple[str, str]] = {}
    for dialect in DIALECTS:
        for script in FAULTS:
            (job_id,) = await world.accept(1, f"{dialect}:{script}")
            cells[job_id] = (dialect, script)
    (capped,) = await world.accept(1, "ollama:echo", parameters={"max_completion_tokens": 77})
    await asyncio.to_thread(world.settle, 150)
    jobs = {row.id: row for row in world.rows("SELECT * FROM jobs")}
    results = {row.job_id: row for row in world.rows("SELECT * FROM job_results")}
    wrong = []
    for job_id, (dialect, script) in cells.items():
        fate, job = _fate(dialect, script), jobs[job_id]
        usage = world.rows(f"SELECT * FROM usage WHERE job_id = '{job_id}' ORDER BY attempt")
        expected = (*fate[:2], fate.retries, _sources(dialect, script, fate), _kinds(fate))
        kinds = [kind for kind, _ in groupby(_stream(results, job_id))]
        sources = [row.source for row in usage]
        found = (job.state, job.error_code, job.retries, sources, kinds)
        if found != expected:
            wrong.append(f"{dialect}:{script} was {found}, not {expected}")
    assert not wrong, f"{len(wrong)} of {len(cells)} cells: " + "; ".join(wrong)
    answer = json.loads(results[capped].message)["content"]
    asked = json.loads(answer)["body"]
    assert asked.get("max_tokens") == 77, "Ollama knows no other name for the cap"
    return {"cells": len(cells)}


def _stream(results: dict[str, Any], job_id: str) -> list[str]:
    if job_id not in results:
        return []
    return [event.type for event in unpack_log(bytes(results[job_id].log))]


@case(
    "provider.deadlines", quick=False,
    max_retries=0, first_byte_s=3, idle_s=2, attempt_s=6, circuit_failures=1000,
)  # fmt: skip
async def calls_that_would_never_end(world: World, full: bool) -> dict[str, Any]:
    """Silence, keep-alives without content and a slow drip each end at their own deadline."""
    world.worker()
    await world.accept(1, "openai:ok-t1")  # the SDKs are imported before anything is timed
    await world.accept(1, "anthropic:ok-t1")
    await asyncio.to_thread(world.settle, 60)
    limits = {"mute": 3.0, "stall-5": 2.0, "ok-t100-d500": 6.0}
    for dialect in DIALECTS:
        for script in limits:
            await world.accept(1, f"{dialect}:{script}")
    await asyncio.to_thread(world.settle, 60)
    late = []
    for script, took_s in _durations(world):
        if script in limits:
            late.append(took_s - limits[script])
            # the worker counts from before its request goes out, the provider from when it came
            assert -1.0 < late[-1] < 1.5, f"{script} took {took_s:.1f} s, not {limits[script]}"
    codes = {row.error_code for row in world.rows("SELECT * FROM jobs WHERE state = 'failed'")}
    assert codes == {"stalled"}, codes
    assert len(late) == len(DIALECTS) * len(limits)
    return {"calls": len(late), "latest_s": round(max(late), 2)}


def _durations(world: World) -> list[tuple[str, float]]:
    lines = world.ledger()
    ended = {entry["call"]: entry["time"] for entry in lines if entry["at"] == "end"}
    return [
        (entry["model"], ended[entry["call"]] - entry["time"])
        for entry in lines
        if entry["at"] == "start" and entry["call"] in ended
    ]


@case("provider.caps", quick=False, max_line_bytes=1 << 18, max_answer_bytes=1 << 20)
async def answers_that_never_end(world: World, full: bool) -> dict[str, Any]:
    """A line or an answer without end stops at its cap, and the worker's memory with it."""
    worker = world.worker()
    for dialect in DIALECTS:
        await world.accept(20, f"{dialect}:ok-t50")
    await asyncio.to_thread(world.settle, 60)
    before = world.memory_mb(worker.pid)
    for dialect in DIALECTS:
        await world.accept(10, f"{dialect}:bigtext")
        await world.accept(10, f"{dialect}:bigline", deadline_s=20)
    await asyncio.to_thread(world.settle, 120)
    grown = world.memory_mb(worker.pid) - before
    # 30 answers of 1 MiB at once, each held as text, as events, and while it is stored
    assert grown < 30 * 4, f"the worker grew by {grown:.0f} MB"
    codes = {row.error_code for row in world.rows("SELECT * FROM jobs WHERE state = 'failed'")}
    assert codes == {"answer_too_large", "malformed"}, codes
    return {"peak_growth_mb": round(grown, 1), "without_caps_mb": 60 * 64}


@case("provider.circuit", max_retries=2, backoff_max_s=0.2)
async def endpoints_that_are_down(world: World, full: bool) -> dict[str, Any]:
    """One answers 500, one refuses connections; a third is not hurt, and both are left alone."""
    open_s, down_s = 2.0, 60.0 if full else 10.0
    world.worker()
    await world.accept(1, "openai:ok-t1")  # the SDK is imported before anything is timed
    await asyncio.to_thread(world.settle, 60)
    began = now()
    heals = int(began + down_s) + 1
    sick = await world.accept(40, f"groq:until-{heals}")
    dead = await world.accept(20, "lmstudio:ok-t5")
    well = await world.accept(100, "openai:ok-t20-d20")
    while now() < heals:  # noqa: ASYNC110  it is a clock that is waited for
        await asyncio.sleep(0.1)
    (promptly,) = world.rows(
        "SELECT max(finished_ms - created_ms) AS most, count(*) AS n FROM jobs "
        f"WHERE provider = 'openai' AND state = 'succeeded' AND created_ms >= {began * 1000}"
    )
    assert promptly.n == len(well), f"{promptly.n} of {len(well)} unharmed jobs have succeeded"
    assert promptly.most < 8000, f"one took {promptly.most} ms"
    calls = [e["time"] for e in world.ledger() if e.get("model") == f"groq:until-{heals}"[5:]]
    in_vain = [time for time in calls if time < heals]
    opened = in_vain[0] + 2.0  # by then those under way when it opened have failed
    probes = len([time for time in in_vain if time > opened])
    most = (heals - opened) / open_s + 1
    assert 0 < probes <= most, f"{probes} calls while open, at most {most:.0f}"
    states = {row.state for row in world.rows("SELECT * FROM jobs WHERE provider != 'openai'")}
    assert not states & {"failed", "expired", "cancelled"}, states

    port = world.stack.env["BACKCHANNEL_PROVIDERS__LMSTUDIO__BASE_URL"].split(":")[2].split("/")[0]
    world.stack.fake(port=port)
    await asyncio.to_thread(world.settle, 60)
    rows = world.rows("SELECT * FROM jobs WHERE provider != 'openai'")
    assert {row.state for row in rows} == {"succeeded"}, world.states()
    assert len(rows) == len(sick) + len(dead)
    healed = max(row.finished_ms for row in rows) / 1000 - heals
    return {
        "down_s": round(heals - began),
        "calls_before_it_opened": len(in_vain) - probes,
        "probes": probes,
        "unharmed_max_s": promptly.most / 1000,
        "all_finished_after_s": round(healed, 1),
    }


@case("provider.storm", backoff_max_s=1)
async def a_storm_of_429(world: World, full: bool) -> dict[str, Any]:
    """No call before Retry-After is over, and no attempt is burnt by it."""
    world.worker()
    (job_id,) = await world.accept(1, "openai:status-429-ra3", deadline_s=11)
    await asyncio.to_thread(world.settle, 40)
    times = [entry["time"] for entry in world.ledger() if entry["at"] == "start"]
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
    each = 330 if full else 40  # 2,062 jobs, or 250
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
    return sum(e["tokens"] for e in world.ledger() if e["at"] == "end" and e["outcome"] == "ok")
