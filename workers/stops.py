"""Why a running attempt is stopped from outside, and what that makes of its call."""

from __future__ import annotations

from typing import Literal

from backchannel.errors import ProviderError

End = Literal["lost", "cancelled", "handed_back", "expired"]
Late = Literal["stalled", "too_long"]
Stop = End | Late


class Stopped(Exception):
    """The attempt was ended by `Run.stop`, and its provider is not to blame."""

    def __init__(self, reason: End) -> None:
        super().__init__(reason)
        self.reason = reason


def stopped(reason: Stop) -> Exception:
    """What ended a call: a provider that took too long is its error, the rest is our own doing."""
    match reason:
        case "stalled":
            return ProviderError("No content within the deadline.", code="stalled")
        case "too_long":
            return ProviderError("No end within the deadline.", code="stalled")
        case _:
            return Stopped(reason)
