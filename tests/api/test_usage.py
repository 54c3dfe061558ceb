"""Usage over HTTP: the sums are those of the rows, by every group, unknown is not zero."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import httpx2
import pytest

from backchannel import lifecycle
from backchannel.books import Spent
from backchannel.db import Database
from backchannel.pricing import Tokens
from backchannel.tables import BATCH, FAILED, usage
from tests import makers

DAY_MS = 86_400_000
TOKENS = (
    "input_tokens", "cached_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens",
)  # fmt: skip


@pytest.fixture
def books(database: Database) -> list[dict[str, Any]]:
    """Jobs of every kind, one of them retried, some of unknown tokens or price; the rows."""
    mine = {"caller": "local"}
    makers.session(database, "session_1", caller="local")
    makers.finished(database, **mine)
    makers.finished(database, **mine, lane=BATCH, model="echo-2")
    makers.finished(database, FAILED, **mine, session_id="session_1", requested_model="x")
    retried = makers.queued(database, **mine, provider="groq", model="m")
    claim = makers.calling(database, retried)
    lost = Spent("partial", Tokens(100, 50), cost_nanousd=9_000_000_000_000)
    assert database.write_now(
        lambda c: lifecycle.retry_later(
            c, claim, delay_s=0, burns_attempt=True, error_code="stalled", error_message="…",
            spent=lost,
        )
    )  # fmt: skip
    for spent in (Spent("final", Tokens(7, 3)), Spent("unknown", None)):
        job_id = retried if spent.tokens else makers.queued(database, **mine)
        again = makers.calling(database, job_id)
        done = makers.outcome(spent=spent)
        assert database.write_now(lambda c, a=again, d=done: lifecycle.finish(c, a, d))
    makers.finished(database, caller="alice")
    rows = [row for row in makers.rows(database, "usage") if row["caller"] == "local"]
    for number, row in enumerate(rows):  # over three days
        database.write_now(
            lambda c, row=row, number=number: c.execute(
                usage.update()
                .where(usage.c.job_id == row["job_id"], usage.c.attempt == row["attempt"])
                .values(created_ms=(20_000 + number % 3) * DAY_MS + number)
            )
        )
    return [row for row in makers.rows(database, "usage") if row["caller"] == "local"]


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    sums: dict[str, Any] = {
        name: sum(row[name] or 0 for row in rows) for name in (*TOKENS, "cost_nanousd")
    }
    return sums | {
        "attempts": len(rows),
        "cost_usd": sums["cost_nanousd"] / 1e9,
        "unknown_tokens": sum(row["input_tokens"] is None for row in rows),
        "unknown_price": sum(row["cost_nanousd"] is None for row in rows),
    }


def expected(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "jobs": len({row["job_id"] for row in rows}),
        **figures([row for row in rows if row["billable"]]),
        "unbilled": figures([row for row in rows if not row["billable"]]),
    }


def canonical(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


GROUPS = {
    "model": lambda row: f"{row['provider']}:{row['model']}",
    "provider": lambda row: row["provider"],
    "session": lambda row: row["session_id"],
    "lane": lambda row: row["lane"],
    "day": lambda row: f"2024-10-{4 + row['created_ms'] // DAY_MS - 20_000:02}",
}


async def test_the_total_is_the_sum_of_the_rows(
    client: httpx2.AsyncClient, books: list[dict[str, Any]]
) -> None:
    answer = (await client.get("/v1/usage")).json()
    assert answer == {"object": "usage", "total": expected(books), "data": []}
    assert answer["total"]["unknown_tokens"] == 1
    assert answer["total"]["unknown_price"] == 2
    assert answer["total"]["unbilled"]["attempts"] == 1


@pytest.mark.parametrize(
    "groups", [["model"], ["provider"], ["session"], ["lane"], ["day"], ["day", "model", "lane"]]
)
async def test_each_group_is_the_sum_of_its_rows(
    client: httpx2.AsyncClient, books: list[dict[str, Any]], groups: list[str]
) -> None:
    parts: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in books:
        parts[tuple(GROUPS[name](row) for name in groups)].append(row)
    wanted = [dict(zip(groups, key, strict=True)) | expected(rows) for key, rows in parts.items()]
    for query in ([("group_by", name) for name in groups], [("group_by", ",".join(groups))]):
        answer = (await client.get("/v1/usage", params=query)).json()
        assert canonical(answer["data"]) == canonical(wanted)
        assert answer["total"] == expected(books)


async def test_a_span_of_time_is_half_open(
    client: httpx2.AsyncClient, books: list[dict[str, Any]]
) -> None:
    span = {"since": "2024-10-05T00:00:00Z", "until": "2024-10-06T02:00:00+02:00"}
    inside = [row for row in books if row["created_ms"] // DAY_MS == 20_001]
    assert inside
    assert (await client.get("/v1/usage", params=span)).json()["total"] == expected(inside)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"group_by": "colour"}, "group_by"),
        ({"since": "yesterday"}, "since"),
        ({"since": "0.5"}, "since"),  # no seconds since 1970
        ({"until": "2024-10-05T00:00:00"}, "until"),
        ({"from": "2024-10-05T00:00:00Z"}, "from"),
    ],
)
async def test_a_wrong_question_is_named(
    client: httpx2.AsyncClient, query: dict[str, str], param: str
) -> None:
    answer = await client.get("/v1/usage", params=query)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
