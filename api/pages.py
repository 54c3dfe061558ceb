"""One page of a list: what stands behind the last one seen, and whether there is more."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, Select


def behind(
    listed: Select[Any], ids: Column[Any], after: str | None, limit: int, *, newest_first: bool
) -> Select[Any]:
    """A page of rows in the order of their ids, and one row more if there are more."""
    if after is not None:
        listed = listed.where(ids < after if newest_first else ids > after)
    return listed.order_by(ids.desc() if newest_first else ids).limit(limit + 1)


def ends(found: list[Any], limit: int) -> dict[str, Any]:
    """The fields of OpenAI's pages, of objects with an id that `behind` has found."""
    data = found[:limit]
    return {
        "data": data,
        "first_id": data[0].id if data else None,
        "last_id": data[-1].id if data else None,
        "has_more": len(found) > limit,
    }


def following(found: list[Any], limit: int) -> dict[str, Any]:
    """The fields of our own pages: `next` is the ``after`` of the following one."""
    data, has_more = found[:limit], len(found) > limit
    return {"data": data, "has_more": has_more, "next": data[-1].id if has_more else None}
