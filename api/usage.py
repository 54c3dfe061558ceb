"""Usage: what was spent, summed from the books by model, provider, session, lane or day."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import ColumnElement, Connection, RowMapping, case, distinct, func, select

from api.deps import Caller, Shared, StrictRoute
from backchannel.errors import InvalidRequest
from backchannel.schemas import Moment
from backchannel.tables import usage

router = APIRouter(prefix="/v1/usage", tags=["usage"], route_class=StrictRoute)

DAY_MS = 86_400_000

GROUPS: dict[str, ColumnElement[Any]] = {
    "model": usage.c.provider + ":" + usage.c.model,
    "model_reason": usage.c.model_reason,
    "provider": usage.c.provider,
    "session": usage.c.session_id,
    "lane": usage.c.lane,
    "day": usage.c.created_ms // DAY_MS,
}


_NAME = f"(?:{'|'.join(GROUPS)})?"
_LISTED = f"^{_NAME}(?:,{_NAME})*$"


class UsageQuery(BaseModel):
    """What to sum, and by what."""

    model_config = ConfigDict(extra="forbid")

    group_by: list[Annotated[str, Field(json_schema_extra={"pattern": _LISTED})]] = Field(
        [], description="model, model_reason, provider, session, lane, day."
    )
    since: Moment | None = Field(None, description="RFC 3339, with its zone.")
    until: Moment | None = Field(None, description="Up to, but not including.")


@router.get("")
async def get_usage(
    asked: Annotated[UsageQuery, Query()], its: Shared, caller: Caller
) -> dict[str, Any]:
    """Sums of the books. Attempts that were retried or lost are not billable: `unbilled`."""
    groups = _groups(asked.group_by)
    books = select(*_SUMS).where(usage.c.caller == caller)
    if asked.since is not None:
        books = books.where(usage.c.created_ms >= asked.since)
    if asked.until is not None:
        books = books.where(usage.c.created_ms < asked.until)
    by = [GROUPS[name].label(f"by_{name}") for name in groups]

    def read(connection: Connection) -> dict[str, Any]:
        total = _row(connection.execute(books).mappings().one())
        if not by:
            return {"object": "usage", "total": total, "data": []}
        grouped = books.add_columns(*by).group_by(*by).order_by(*by)
        data = [
            {**{name: _group(name, row[f"by_{name}"]) for name in groups}, **_row(row)}
            for row in connection.execute(grouped).mappings()
        ]
        return {"object": "usage", "total": total, "data": data}

    return await its.db.read(read)


def _groups(asked: list[str]) -> list[str]:
    names = [name for each in asked for name in each.split(",") if name]
    for name in names:
        if name not in GROUPS:
            raise InvalidRequest(
                f"group_by: '{name}' is none of {', '.join(GROUPS)}.", param="group_by"
            )
    return list(dict.fromkeys(names))


def _group(name: str, value: Any) -> Any:
    if name != "day":
        return value
    return datetime.fromtimestamp(int(value) * DAY_MS // 1000, UTC).date().isoformat()


# ---------------------------------------------------------------- the sums

_BILLED = usage.c.billable
_UNBILLED = ~usage.c.billable
_TOKENS = (
    "input_tokens", "cached_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens",
)  # fmt: skip


def _count(which: ColumnElement[bool]) -> ColumnElement[Any]:
    return func.coalesce(func.sum(case((which, 1), else_=0)), 0)


def _sum(name: str, which: ColumnElement[bool]) -> ColumnElement[Any]:
    return func.coalesce(func.sum(case((which, usage.c[name]))), 0)


def _sums(which: ColumnElement[bool], prefix: str) -> list[ColumnElement[Any]]:
    sums = {
        "attempts": _count(which),
        **{name: _sum(name, which) for name in (*_TOKENS, "cost_nanousd")},
        "unknown_tokens": _count(which & usage.c.input_tokens.is_(None)),
        "unknown_price": _count(which & usage.c.cost_nanousd.is_(None)),
    }
    return [each.label(f"{prefix}{name}") for name, each in sums.items()]


_SUMS = [
    func.count(distinct(usage.c.job_id)).label("jobs"),
    *_sums(_BILLED, ""),
    *_sums(_UNBILLED, "un_"),
]


def _row(sums: RowMapping) -> dict[str, Any]:
    names = ("attempts", *_TOKENS, "cost_nanousd", "unknown_tokens", "unknown_price")

    def figures(prefix: str) -> dict[str, Any]:
        # PostgreSQL's sums of large integers are decimals
        whole = {name: int(sums[prefix + name]) for name in names}
        return {**whole, "cost_usd": whole["cost_nanousd"] / 1e9}

    return {"jobs": sums["jobs"], **figures(""), "unbilled": figures("un_")}
