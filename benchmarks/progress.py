"""What happens now, on standard error, with the seconds since the start."""

from __future__ import annotations

import sys
import time

_STARTED = time.monotonic()


def say(what: str) -> None:
    """One line."""
    print(f"{time.monotonic() - _STARTED:6.1f} s  {what}", file=sys.stderr, flush=True)


def seconds() -> float:
    """Since the start."""
    return time.monotonic() - _STARTED
