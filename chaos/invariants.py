"""The one checker: what was promised, against rows, streams and the provider's own ledger."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from typing import Any

from backchannel.events import unpack_log
from chaos.world import TERMINAL, World

BREACHES = (
    "lost",  # answered with 202, and not finished
    "double_charged",
    "uncharged",
    "stream_ends",  # not exactly one end, the last, with rising numbers
    "end_not_row",
    "writes_after_fence",
    "outbox",
    "calls_over_attempts",
    "usage_not_oracle",
)


def check(world: World) -> dict[str, int]:
    """Count breaches by kind; all zero is a pass."""
    breaches: Counter[str] = Counter(dict.fromkeys(BREACHES, 0))
    jobs = {row.id: row for row in world.rows("SELECT * FROM jobs")}
    results = {row.job_id: row for row in world.rows("SELECT * FROM job_results")}
    usage: dict[str, list[Any]] = defaultdict(list)
    for row in world.rows("SELECT * FROM usage ORDER BY attempt"):
        usage[row.job_id].append(row)
    attempts: dict[str, list[Any]] = defaultdict(list)
    for row in world.rows("SELECT * FROM attempts ORDER BY attempt"):
        attempts[row.job_id].append(row)

    for job_id in world.accepted:
        if job_id not in jobs or jobs[job_id].state not in TERMINAL:
            breaches["lost"] += 1
    finished = [job for job in jobs.values() if job.state in TERMINAL]
    told = Counter((row.subject, row.type) for row in world.rows("SELECT * FROM deliveries"))
    ends = Counter((job.id, f"job.{job.state}") for job in finished if not job.batch_id)
    breaches["outbox"] += (told - ends).total() + (ends - told).total()

    for job in finished:
        _check_books(job, usage[job.id], attempts[job.id], breaches)
        _check_stream(job, results.get(job.id), breaches)
    _check_calls(world, jobs, usage, attempts, breaches)
    return dict(breaches)


def _check_books(job: Any, spent: list[Any], tries: list[Any], breaches: Counter[str]) -> None:
    billed = [row for row in spent if row.billable]
    breaches["double_charged"] += len(billed) > 1
    called = {row.attempt for row in tries if row.provider_call_ms is not None}
    breaches["uncharged"] += len(called - {row.attempt for row in spent})
    breaches["uncharged"] += job.state == "succeeded" and len(billed) != 1
    winners = [row for row in tries if row.outcome == "succeeded"]
    breaches["writes_after_fence"] += len(winners) > (job.state == "succeeded")
    breaches["writes_after_fence"] += any(row.attempt != job.attempt for row in winners)


def _check_stream(job: Any, result: Any, breaches: Counter[str]) -> None:
    if result is None:
        breaches["stream_ends"] += 1
        return
    log = unpack_log(bytes(result.log))
    kinds = [event.type for event in log]
    breaches["stream_ends"] += kinds.count("end") != 1 or kinds[-1] != "end"
    numbers = [event.seq for event in log]
    breaches["stream_ends"] += numbers != sorted(set(numbers))
    end = json.loads(log[-1].data)
    code = end["error"]["code"] if end["error"] else None
    row = (job.state, job.finish_reason, job.error_code)
    breaches["end_not_row"] += (end["state"], end["finish_reason"], code) != row
    message = result.message
    if isinstance(message, str):
        message = json.loads(message)
    if job.state == "succeeded" and job.stream:
        text: list[str] = []
        for event in log:
            if event.type == "reset":
                text.clear()
            elif event.type == "delta":
                text.append(json.loads(event.data)["text"])
        breaches["writes_after_fence"] += "".join(text) != (message["content"] or "")


def _check_calls(
    world: World,
    jobs: dict[str, Any],
    usage: dict[str, list[Any]],
    attempts: dict[str, list[Any]],
    breaches: Counter[str],
) -> None:
    """The ledger names calls by a hash of the prompt, and every prompt here is asked once."""
    calls: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in world.ledger():
        if entry["at"] == "start":
            calls[entry["prompt"]].append({"call": entry["call"], "tokens": None, "outcome": None})
        elif entry["at"] == "end":
            for call in calls[entry["prompt"]]:
                if call["call"] == entry["call"]:
                    call.update(tokens=entry["tokens"], outcome=entry["outcome"])
    for job_id, prompt in world.accepted.items():
        if job_id not in jobs:
            continue
        made = calls.get(hashlib.sha256(prompt.encode()).hexdigest()[:16], [])
        on_record = sum(row.provider_call_ms is not None for row in attempts[job_id])
        breaches["calls_over_attempts"] += len(made) > on_record
        for row in usage[job_id]:
            if row.source != "final":
                continue
            complete = [call["tokens"] for call in made if call["outcome"] == "ok"]
            breaches["usage_not_oracle"] += row.output_tokens not in complete


def extra_calls(world: World) -> int:
    """Provider calls beyond one a job: what the kills cost in money."""
    started = sum(entry["at"] == "start" for entry in world.ledger())
    return started - len(world.accepted)
