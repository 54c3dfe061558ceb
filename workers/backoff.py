"""When a job that failed is tried again: the one place that decides it."""

from __future__ import annotations

import random

from backchannel.errors import ProviderError
from backchannel.lifecycle import Claim
from backchannel.settings import Settings

BACKOFF_BASE_S = 1.0


def retry_delay_s(
    error: ProviderError, claim: Claim, settings: Settings, left_s: float
) -> float | None:
    """How long to wait before the next attempt; None: no next attempt.

    Full jitter up to a ceiling, as in "Exponential Backoff And Jitter" (Brooker, AWS, 2015); never
    under the provider's Retry-After, never past the job's deadline.
    """
    policy = error.policy
    if not policy.retryable:
        return None
    if error.code == "circuit_open":
        return error.retry_after_s  # nothing failed: also past the deadline, where the job expires
    if policy.burns_attempt and claim.retries >= settings.max_retries:
        return None
    steps = claim.retries if policy.burns_attempt else claim.attempt - 1
    ceiling = min(settings.backoff_max_s, BACKOFF_BASE_S * 2 ** min(steps, 16))
    delay = max(random.uniform(0, ceiling), error.retry_after_s or 0)
    return delay if delay < left_s else None
