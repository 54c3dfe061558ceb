"""Named places where the chaos suite breaks a process; they cost nothing unless one is armed.

``BACKCHANNEL_FAULT=finish.committed@3`` kills this process with SIGKILL at the third passage of
that point; ``call.marked@openai:gpt-x`` at every passage of a job with that model. With ``+eat``
after the point the job takes memory there until none is left: only for a process under a limit.
"""

from __future__ import annotations

import os
import signal

POINTS = (
    "claim.committed",  # the job is running and owned, nothing else has happened
    "call.before_mark",
    "call.marked",  # on record, not yet made
    "answer.first_delta",
    "finish.before",  # the answer is complete, nothing of it is stored
    "finish.committed",  # stored, Celery and the stream do not know
    "end.before",  # the end event is next in the flusher's pipeline
    "webhook.sent",  # the receiver has it, nothing of that is stored
    "flush.inside",  # Redis has the events, the worker has not heard so
)

_place, _, _when = os.environ.get("BACKCHANNEL_FAULT", "").partition("@")
ARMED, _, _how = _place.partition("+")
if ARMED and (ARMED not in POINTS or _how not in ("", "eat")):
    raise SystemExit(f"BACKCHANNEL_FAULT: there is no '{_place}', only {', '.join(POINTS)}.")
_left = int(_when) if _when.isdigit() else 0


def hit(point: str, model: str = "") -> None:
    """Break here if this point is armed. Call it as ``if faults.ARMED: faults.hit(…)``."""
    global _left
    if point != ARMED or (not _when.isdigit() and _when != model):
        return
    _left -= 1
    if _left > 0:
        return
    if _how == "eat":
        _eat()
    os.kill(os.getpid(), signal.SIGKILL)


def _eat() -> None:
    """Take memory until the system refuses it, with MemoryError, or kills this process."""
    eaten = []
    while True:
        eaten.append(b"x" * (1 << 20))
