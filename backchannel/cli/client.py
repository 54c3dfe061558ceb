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


def key_of(settings: Settings) -> dict[str, str]:
    """The header that says who asks; none, while nobody needs a key."""
    key = "" if settings.api_key is None else settings.api_key.get_secret_value()
    return {"Authorization": f"Bearer {key}"} if key else {}


def refused(status: int, message: str) -> str:
    """What the API says against a request, and what to type about it."""
    return f"{message} Type: export BACKCHANNEL_API_KEY=bk_…" if status == 401 else message


@contextmanager
def connected() -> Iterator[httpx2.Client]:
    """A client of the API; what goes wrong inside leaves as a `Failure`."""
    settings = get_settings()
    url = api_url(settings)
    with httpx2.Client(
        base_url=url,
        headers=key_of(settings),
        timeout=TIMEOUT_S,
        trust_env=not goes_direct(url),
        follow_redirects=False,
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
    raise Failure(refused(answer.status_code, message))


def unreachable(url: str, error: Exception | None = None) -> Failure:
    """The sentence for an API that does not answer."""
    why = f" ({error})" if error is not None and str(error) else ""
    return Failure(
        f"No API answers at {url}{why}. Type: backchannel up, or set BACKCHANNEL_API_URL."
    )
