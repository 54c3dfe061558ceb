"""The header Retry-After, in seconds: RFC 9110, section 10.2.3."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from math import isfinite


def retry_after_s(value: str | None) -> float | None:
    """How long somebody wants to be left alone, said in seconds or as a date; None: not said."""
    if value is None:
        return None
    seconds = seconds_of(value)
    if seconds is not None:
        return seconds
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def seconds_of(value: str | None) -> float | None:
    """A number of seconds, none of them negative; None where it is no number."""
    try:
        number = float(value) if value is not None else None
    except ValueError:
        return None
    return max(0.0, number) if number is not None and isfinite(number) else None
