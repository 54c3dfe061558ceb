"""Tasks that live as long as their owner: named when they start, surely ended when it closes."""

from __future__ import annotations

import asyncio
from typing import Any

_AGAIN_S = 1.0


async def end(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it has ended, whatever it ends with.

    Once may not be enough: before Python 3.12 `asyncio.wait_for` swallows a cancellation that
    arrives together with what it waited for.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_AGAIN_S)
    if not task.cancelled():
        task.exception()  # seen: it ended with its owner
