"""The API as a run sees it: found, started when missing, and asked again until it answers."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import stamina

from backchannel.cli.client import api_url, goes_direct, unreachable
from backchannel.cli.own_stack import OwnStack, may_start
from backchannel.cli.running import read_running
from backchannel.cli.screen import Failure
from backchannel.settings import Settings

PATIENCE_S = 300.0  # an API that restarts, or a database that does, is back sooner
MISSING_S = 3.0  # without an answer for this long, look where the API is now
BUSY = frozenset({408, 425, 429, 502, 503, 504})

Job = dict[str, Any]


class _Busy(Exception):
    """The API answers that it cannot answer now."""


class Sender:
    """One run's connections to the API; every request here may be repeated without harm.

    A client of its own for each request at a time: the library's pool looks at all its connections
    before each request, which at a hundred of them costs more than the request.
    """

    def __init__(self, settings: Settings, tell: Callable[[str], None]) -> None:
        self.stack = OwnStack(settings)
        self.url = ""
        self.flower_url: str | None = None
        self._settings = settings
        self._tell = tell
        self._tls = ssl.create_default_context()
        self._idle: list[httpx2.AsyncClient] = []
        self._finding = asyncio.Lock()
        self._answered = time.monotonic()
        stamina.instrumentation.set_on_retry_hooks([])  # progress is told, not each retry

    async def find(self) -> None:
        """Find a running API, or start one.

        Raises:
            Failure: None answers, and none can be started.
        """
        url = api_url(self._settings)
        running = read_running(self._settings)
        if not await _is_ours(url):
            if not may_start(self._settings):
                raise unreachable(url)
            self._tell(f"Nothing runs in {self._settings.home_path} yet; starting it.")
            running = await self.stack.start()
            url = running.api_url
        self.flower_url = running.flower_url if running and running.api_url == url else None
        self._answered = time.monotonic()
        if url != self.url:
            await self.close()
            self.url = url

    async def close(self) -> None:
        """Let go of the connections; the stack, if it is ours, is another matter."""
        while self._idle:
            await self._idle.pop().aclose()

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncIterator[httpx2.AsyncClient]:
        client = self._idle.pop() if self._idle else self._new_client(self.url)
        try:
            yield client
        finally:
            if client.base_url == self.url:
                self._idle.append(client)
            else:  # the API has moved in the meantime
                await client.aclose()

    def _new_client(self, url: str) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            base_url=url,
            timeout=httpx2.Timeout(60.0, connect=5.0),  # longer than the longest wait for a job
            trust_env=not goes_direct(url),
            verify=self._tls,
        )

    async def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """An answer that is not "later", however long the API is away.

        Raises:
            Failure: It was away for `PATIENCE_S`.
        """
        try:
            async for attempt in stamina.retry_context(
                on=(httpx2.TransportError, _Busy),
                attempts=None,
                timeout=PATIENCE_S,
                wait_initial=0.1,
                wait_max=5.0,
            ):
                with attempt:
                    return await self._request(method, path, options)
        except httpx2.TransportError as error:
            raise unreachable(self.url, error) from error
        except _Busy as error:
            raise Failure(f"The API at {self.url} does not take it: {error}") from error
        raise AssertionError("unreachable")

    async def _request(self, method: str, path: str, options: dict[str, Any]) -> httpx2.Response:
        try:
            async with self._client() as client:
                answer = await client.request(method, path, **options)
        except httpx2.TransportError:
            await self._find_again()
            raise
        self._answered = time.monotonic()
        if answer.status_code in BUSY:
            raise _Busy(f"{answer.status_code} {answer.text[:300]}")
        return answer

    async def _find_again(self) -> None:
        """After a while without answers: has the stack moved, or gone with the run that made it?"""
        async with self._finding:
            if time.monotonic() - self._answered < MISSING_S:
                return
            self._answered = time.monotonic()  # the next look is as far away
            running = read_running(self._settings)
            if "api_url" not in self._settings.model_fields_set and (
                running is None or running.api_url != self.url
            ):
                self._tell("The API has gone; looking for it.")
                with contextlib.suppress(Failure):
                    await self.find()

    # ------------------------------------------------------------ jobs

    async def providers(self) -> list[dict[str, Any]]:
        """What the API can reach."""
        found: list[dict[str, Any]] = (await self.request("GET", "/v1/providers")).json()["data"]
        return found

    async def post(self, path: str, key: str, body: Any = None) -> httpx2.Response:
        """Make a job, or find the one that was made with this key."""
        options = {} if body is None else {"json": body}
        return await self.request("POST", path, headers={"Idempotency-Key": key}, **options)

    async def wait(self, job_id: str, seconds: float) -> Job:
        """The job, as soon as it is over or the time is up."""
        answer = await self.request("GET", f"/v1/jobs/{job_id}", params={"wait": f"{seconds:g}"})
        if not answer.is_success:
            raise Failure(f"Job {job_id} cannot be read: {answer.text[:300]}")
        job: Job = answer.json()
        return job


async def _is_ours(url: str) -> bool:
    """Whether Backchannel answers there, and not whatever else likes the port."""
    async with httpx2.AsyncClient(timeout=5.0, trust_env=not goes_direct(url)) as client:
        try:
            answer = (await client.get(f"{url}/healthz")).json()
        except (httpx2.HTTPError, ValueError):
            return False
    return isinstance(answer, dict) and {"status", "version"} <= answer.keys()
