"""Where the API is, one HTTP client to it, and its errors in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from backchannel.cli.running import is_loopback, read_running
from backchannel.cli.screen import Failure
from backchannel.settings import Settings, get_settings

TIMEOUT_S = 30.0


def api_url(settings: Settings) -> str:
    """BACKCHANNEL_API_URL if it is set, else the stack of this home folder, else the default."""
    running = None if "api_url" in settings.model_fields_set else read_running(settings)
    return (running.api_url if running else settings.api_url).rstrip("/")


def goes_direct(url: str) -> bool:
    """Whether a proxy of the environment must be left aside: it cannot reach this machine."""
    return is_loopback(url)


@contextmanager
def connected() -> Iterator[httpx2.Client]:
    """A client of the API; what goes wrong inside leaves as a `Failure`."""
    url = api_url(get_settings())
    with httpx2.Client(
        base_url=url, timeout=TIMEOUT_S, trust_env=not goes_direct(url), follow_redirects=False
    ) as client:
        try:
            yield client
        except httpx2.TransportError as error:
            raise unreachable(url, error) from error


def call(method: str, path: str, **options: Any) -> Any:
    """One request's answer.

    Raises:
        Failure: The API does not answer, or refuses; the sentence is its own.
    """
    with connected() as client:
        return checked(client.request(method, path, **options))


def checked(answer: httpx2.Response) -> Any:
    """The body of a good answer.

    Raises:
        Failure: It is an error, or not from Backchannel.
    """
    try:
        body = answer.json()
        if answer.is_success and isinstance(body, dict):
            return body
        message = body["error"]["message"]
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(
            f"What answers at {answer.url.scheme}://{answer.url.netloc.decode()} is not "
            "Backchannel. Set BACKCHANNEL_API_URL to where it runs."
        ) from error
    raise Failure(message)


def unreachable(url: str, error: Exception | None = None) -> Failure:
    """The sentence for an API that does not answer."""
    why = f" ({error})" if error is not None and str(error) else ""
    return Failure(
        f"No API answers at {url}{why}. Type: backchannel up, or set BACKCHANNEL_API_URL."
    )
