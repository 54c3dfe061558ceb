"""The API as a run sees it: found, started when missing, and asked again until it answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, BinaryIO

import httpx2
import stamina

from backchannel.cli.client import api_url, goes_direct, key_of, refused, unreachable
from backchannel.cli.own_stack import OwnStack, may_start
from backchannel.cli.running import read_running
from backchannel.cli.screen import Failure
from backchannel.settings import Settings

PATIENCE_S = 300.0  # an API that restarts, or a database that does, is back sooner
MISSING_S = 3.0  # without an answer for this long, look where the API is now
BUSY = frozenset({408, 425, 429, 502, 503, 504})

Batch = dict[str, Any]


class _Busy(Exception):
    """The API answers that it cannot answer now."""


class Sender:
    """One run's connection to the API; every request here may be repeated without harm."""

    def __init__(self, settings: Settings, tell: Callable[[str], None]) -> None:
        self.stack = OwnStack(settings)
        self.url = ""
        self.flower_url: str | None = None
        self._settings = settings
        self._tell = tell
        self._client: httpx2.AsyncClient | None = None
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
        """Let go of the connection; the stack, if it is ours, is another matter."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _new_client(self, url: str) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            base_url=url,
            headers=key_of(self._settings),
            timeout=httpx2.Timeout(120.0, connect=5.0),  # a large file is stored meanwhile
            trust_env=not goes_direct(url),
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
            self._client = self._client or self._new_client(self.url)
            answer = await self._client.request(method, path, **options)
        except httpx2.TransportError:
            await self._find_again()
            raise
        self._answered = time.monotonic()
        if answer.status_code in BUSY:
            raise _Busy(f"{answer.status_code} {answer.text[:300]}")
        return answer

    async def _find_again(self) -> None:
        """After a while without answers: has the stack moved, or gone with the run that made it?"""
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

    # ------------------------------------------------------------ what a run asks

    async def providers(self) -> list[dict[str, Any]]:
        """What the API can reach."""
        found: list[dict[str, Any]] = (await self.get("/v1/providers")).json()["data"]
        return found

    async def get(self, path: str, **query: Any) -> httpx2.Response:
        """What is there.

        Raises:
            Failure: It is not.
        """
        return _checked(await self.request("GET", path, params=query))

    async def upload(self, name: str, file: BinaryIO) -> str:
        """Store a batch's input; its id. Again is another file, which nobody needs."""
        form = {
            "purpose": "batch",
            "expires_after[anchor]": "created_at",
            "expires_after[seconds]": str(30 * 86_400),
        }
        answer = await self.request("POST", "/v1/files", data=form, files={"file": (name, file)})
        file_id: str = _checked(answer).json()["id"]
        return file_id

    async def make(self, path: str, key: str, body: Any = None) -> Batch:
        """Make a batch, or find the one that was made with this key."""
        options = {} if body is None else {"json": body}
        answer = await self.request("POST", path, headers={"Idempotency-Key": key}, **options)
        batch: Batch = _checked(answer).json()
        return batch

    async def made_with(self, key: str) -> Batch | None:
        """The batch that was made with this key."""
        found: list[Batch] = (await self.get("/v1/batches", idempotency_key=key)).json()["data"]
        return found[0] if found else None


def _checked(answer: httpx2.Response) -> httpx2.Response:
    if not answer.is_success:
        try:
            why = refused(answer.status_code, answer.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            why = f"{answer.status_code} {answer.text[:300]}"
        raise Failure(f"The API refuses {answer.request.url.path}: {why}")
    return answer


async def _is_ours(url: str) -> bool:
    """Whether Backchannel answers there, and not whatever else likes the port."""
    async with httpx2.AsyncClient(timeout=5.0, trust_env=not goes_direct(url)) as client:
        try:
            answer = (await client.get(f"{url}/healthz")).json()
        except (httpx2.HTTPError, ValueError):
            return False
    return isinstance(answer, dict) and {"status", "version"} <= answer.keys()
