"""Leaves an endpoint alone that has failed again and again, and finds out when it is well again."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from backchannel.errors import UNWELL, ProviderError

log = structlog.get_logger()

SPREAD = 0.25  # of the open time: so that not all waiting jobs come back in the same moment


class Circuit:
    """The health of one endpoint as one process has seen it; belongs to the loop's thread.

    Closed: calls are made, and failures in a row are counted. Open: no calls, for `open_s`. Then
    one call goes through, and what becomes of it closes the circuit or opens it again. While it is
    open only that call is listened to: the others began before.

    Args:
        name: The endpoint, for people.
        failures: Failed calls in a row that open it.
        open_s: Seconds it stays open before the next probe.
    """

    def __init__(self, name: str, failures: int, open_s: float) -> None:
        self._name = name
        self._limit = failures
        self._open_s = open_s
        self._failed = 0
        self._jobs: set[str] = set()  # the first two whose calls failed: one alone may be at fault
        self._until: float | None = None  # monotonic; None: closed
        self._probe: Passage | None = None

    @contextmanager
    def passage(self, job_id: str) -> Iterator[Passage]:
        """Around one call: lets it through or not, and learns how it ended.

        Raises:
            ProviderError: ``circuit_open``, with the seconds to wait; nothing may be called.
        """
        wait_s = self.wait_s()
        if wait_s > 0:
            raise ProviderError(
                f"{self._name} has failed {self._limit} times in a row and is left alone for now.",
                code="circuit_open",
                retry_after_s=wait_s,
            )
        passage = Passage(self, job_id)
        if self._until is not None:
            self._probe = passage
        try:
            yield passage
        except ProviderError as error:
            self.failed(passage, error.code)
            raise
        finally:
            if self._probe is passage:  # stopped before anything could be learned
                self._probe = None

    def wait_s(self) -> float:
        """Seconds until a call may be made, differing from job to job; 0: now."""
        if self._until is None:
            return 0.0
        left_s = self._until - time.monotonic()
        if left_s <= 0 and self._probe is None:
            return 0.0
        return max(left_s, SPREAD * self._open_s) + random.uniform(0, SPREAD * self._open_s)

    def blames(self, job_id: str) -> bool:
        """Whether a failed call may be its job's own fault: not if others' calls fail as well."""
        return self._until is None or self._jobs <= {job_id}

    def well(self, passage: Passage) -> None:
        """The endpoint has answered this call, with content or with a refusal."""
        if passage.answered:
            return
        passage.answered = True
        if not self._listens_to(passage):
            return
        self._failed = 0
        self._jobs.clear()
        if self._until is not None:
            self._until = self._probe = None
            log.info("An endpoint is well again; its waiting jobs run.", endpoint=self._name)

    def failed(self, passage: Passage, code: str) -> None:
        """A call has failed. It says something of the endpoint only if nothing had come before."""
        if passage.answered or not self._listens_to(passage):
            return
        if code not in UNWELL:
            self.well(passage)
            return
        self._failed += 1
        if len(self._jobs) < 2:
            self._jobs.add(passage.job_id)
        if self._failed < self._limit:
            return
        again = self._until is not None
        self._until = time.monotonic() + self._open_s
        log.warning(
            "An endpoint is still not well; its jobs wait on."
            if again
            else "An endpoint is not well: it is left alone for a while, its jobs wait and lose no "
            "retry. You need not do anything once it is well again.",
            endpoint=self._name,
            code=code,
            seconds=self._open_s,
        )

    def _listens_to(self, passage: Passage) -> bool:
        return self._until is None or self._probe is passage


class Passage:
    """One call that was let through."""

    def __init__(self, circuit: Circuit, job_id: str) -> None:
        self.job_id = job_id
        self.answered = False
        self._circuit = circuit

    def well(self) -> None:
        """The endpoint has answered."""
        self._circuit.well(self)
