"""Fallback: which model a job asks next, when the one it asked did not answer at all."""

from __future__ import annotations

from backchannel.errors import PROVIDER_ERRORS, BackchannelError, falls_back
from backchannel.lifecycle import Ask, Claim

_MARK = "; fell back from "


def next_model(claim: Claim, error: BackchannelError) -> Ask | None:
    """The next of the job's fallbacks; None: it has none left, or another would do no better.

    For an attempt that has not received anything of an answer.
    """
    if not claim.fallbacks or not falls_back(error):
        return None
    asked = f"{claim.provider}:{claim.model}"
    left = claim.fallbacks
    if claim.fallback_from is not None and asked in left:
        left = left[left.index(asked) + 1 :]
    for name in left:
        if name != asked:
            return _ask(name, f"{_reason(claim)}{_MARK}{asked} ({error.code})")
    return None


def first_model(claim: Claim) -> Ask | None:
    """The model that was asked first, to begin with it again; None: it is the one being asked."""
    if claim.fallback_from is None or claim.fallback_from == f"{claim.provider}:{claim.model}":
        return None
    return _ask(claim.fallback_from, _reason(claim))


def may_pass(codes: set[str]) -> bool:
    """Whether any of these errors is one that goes away with time."""
    return any(code in PROVIDER_ERRORS and PROVIDER_ERRORS[code].retryable for code in codes)


def _reason(claim: Claim) -> str:
    """Why the first model was chosen."""
    return claim.model_reason.partition(_MARK)[0]


def _ask(name: str, reason: str) -> Ask:
    provider, _, model = name.partition(":")
    return Ask(provider, model, reason)
