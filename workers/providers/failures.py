"""A provider's refusals and a network's failures, each given one code of `PROVIDER_ERRORS`.

What the provider says about itself (error code, error type) is believed before the HTTP status: a
429 may be an empty account, a 400 an overlong prompt, a 200 a failure.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import aiohttp
import httpx2
import msgspec

from backchannel.errors import BackchannelError, ProviderError
from backchannel.registry import Provider
from backchannel.retry_after import retry_after_s, seconds_of

MESSAGE_CAP = 300  # characters of the provider's own words

# Error codes and types that say more than the status. Sources: the error pages of OpenAI,
# Anthropic, Google (google.rpc.Code), Groq, and what Azure, DeepSeek, llama.cpp and vLLM send.
PRECISE: dict[str, str] = {
    "insufficient_quota": "billing",
    "insufficient_balance": "billing",
    "billing_error": "billing",
    "billing_hard_limit_reached": "billing",
    "billing_not_active": "billing",
    "access_terminated": "billing",
    "context_length_exceeded": "context_length",
    "context_window_exceeded": "context_length",
    "exceed_context_size_error": "context_length",
    "request_too_large": "context_length",
    "content_filter": "content_filter",
    "content_policy_violation": "content_filter",
    "moderation_blocked": "content_filter",
    "responsibleaipolicyviolation": "content_filter",
    "overloaded": "overloaded",
    "overloaded_error": "overloaded",
    "engine_overloaded": "overloaded",
    "engine_overloaded_error": "overloaded",
    "service_unavailable": "overloaded",
    "unavailable": "overloaded",
    "capacity_exceeded": "overloaded",
    "rate_limit_exceeded": "rate_limited",
    "rate_limit_error": "rate_limited",
    "rate_limit_reached": "rate_limited",
    "resource_exhausted": "rate_limited",
    "too_many_requests": "rate_limited",
    "authentication_error": "auth",
    "invalid_api_key": "auth",
    "permission_error": "auth",
    "permission_denied": "auth",
    "unauthenticated": "auth",
}

# Only where there is no status to go by: too general to overrule one.
GENERAL: dict[str, str] = {
    "invalid_request_error": "invalid_request",
    "invalid_argument": "invalid_request",
    "badrequesterror": "invalid_request",
    "not_found_error": "invalid_request",
    "not_found": "invalid_request",
    "model_not_found": "invalid_request",
}

# For providers that have one type for every refusal and tell the reason only in words.
WORDS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(
            r"prompt is too long|maximum context length|exceeds? the (available )?context"
            r"|context (length|window|size) (is |was )?exceeded|reduce the length of the messages"
            r"|input token count .{0,40}exceeds|input length and .?max_tokens.? exceed",
            re.IGNORECASE,
        ),
        "context_length",
    ),
    (re.compile(r"credit balance is too low", re.IGNORECASE), "billing"),
    (re.compile(r"blocked by content filtering policy", re.IGNORECASE), "content_filter"),
)
WORDS_STATUS = frozenset({None, 200, 400, 413, 422, 500})

STATUS: dict[int, str] = {
    401: "auth",
    402: "billing",
    403: "auth",
    408: "server_error",
    409: "server_error",
    413: "context_length",
    429: "rate_limited",
    503: "overloaded",
    529: "overloaded",
}

# First match wins, over the whole chain of causes: a dropped connection may be reported as a
# connect timeout, and only aiohttp's own exception below it tells the truth.
NETWORK: tuple[tuple[tuple[type[BaseException], ...], str, str], ...] = (
    (
        (aiohttp.InvalidURL, httpx2.InvalidURL, httpx2.UnsupportedProtocol),
        "invalid_request",
        "cannot be called: its base URL {base_url} is not an address",
    ),
    (
        (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError),
        "unreachable",
        "cannot be reached at {base_url}",
    ),
    (
        (aiohttp.ClientPayloadError, aiohttp.ClientOSError, aiohttp.ServerDisconnectedError),
        "disconnected",
        "closed the connection before the answer was complete",
    ),
    (
        (aiohttp.ClientResponseError, httpx2.DecodingError, httpx2.RemoteProtocolError),
        "malformed",
        "sent bytes that are not HTTP",
    ),
    (
        (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout),
        "unreachable",
        "cannot be reached at {base_url}",
    ),
    (
        (httpx2.HTTPError, httpx2.StreamError, aiohttp.ClientError, OSError),
        "disconnected",
        "broke the connection before the answer was complete",
    ),
)

KEYS = re.compile(r"\b(?:sk|gsk|xai|pk|key|AIza|Bearer)[-_ ]?[\w*.\-]{8,}")


def failure(
    provider_id: str,
    code: str,
    what: str,
    *,
    status: int | None = None,
    retry_after_s: float | None = None,
) -> ProviderError:
    """A classified error; ``what`` continues the sentence "Provider 'x' …"."""
    return ProviderError(
        f"Provider '{provider_id}' {what}.",
        code=code,
        status_code=status,
        retry_after_s=retry_after_s,
    )


def classify(error: Exception, provider: Provider) -> ProviderError | None:
    """What went wrong with a call, or None for what is no provider's fault but a bug of ours."""
    if isinstance(error, ProviderError):
        return error
    for cause in _causes(error):
        if isinstance(cause, BackchannelError):  # of the guard at the door: it was not called
            return failure(provider.id, "invalid_request", f"is not called: {cause.message}")
    for kinds, code, what in NETWORK:
        for cause in _causes(error):
            if isinstance(cause, kinds):
                detail = f" ({_one_line(str(cause))})" if code != "disconnected" else ""
                return failure(provider.id, code, what.format(base_url=provider.base_url) + detail)
    return None


def refused(response: httpx2.Response, provider: Provider) -> ProviderError:
    """The error that an answer with another status than 2xx is; its body has been read."""
    status, headers = response.status_code, response.headers
    return refusal(provider, _parsed(response.content), status=status, headers=headers)


def refusal(
    provider: Provider,
    body: Any,
    *,
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> ProviderError:
    """A provider's own error, as it came: an object, a list of one (Gemini), a string, a page.

    Args:
        body: The decoded body or the error inside it; a string where it was not JSON.
        status: The HTTP status; None for an error inside a 200.
        headers: For Retry-After.
    """
    if status is not None and 300 <= status < 400:
        return failure(
            provider.id,
            "invalid_request",
            f"redirects ({status}) and redirects are not followed; correct its base URL "
            f"{provider.base_url}",
            status=status,
        )
    said = _error_object(body)
    names = [str(said.get(key) or "").lower() for key in ("code", "type", "status")]
    text = _message(said)
    numeric = next((int(name) for name in names if name.isdigit()), None)
    status = status if status not in (None, 200) else numeric or status
    code = next((PRECISE[name] for name in names if name in PRECISE), None)
    if code is None and status in WORDS_STATUS:
        code = next((each for pattern, each in WORDS if pattern.search(text)), None)
    if code is None and status is not None and status >= 400:
        code = STATUS.get(status) or ("server_error" if status >= 500 else "invalid_request")
    if code is None:
        code = next((GENERAL[name] for name in names if name in GENERAL), "server_error")
    answered = f"answered {status}" if status not in (None, 200) else "reported an error"
    return failure(
        provider.id,
        code,
        f"{answered}: {text}" if text else answered,
        status=status,
        retry_after_s=_retry_after_s(headers or {}, said, code),
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _parsed(content: bytes) -> Any:
    try:
        return msgspec.json.decode(content)
    except (ValueError, RecursionError):
        return content.decode(errors="replace")


def _error_object(body: Any) -> dict[str, Any]:
    """The mapping that holds code, type and message, however it was wrapped."""
    for _ in range(4):  # deeper than any provider wraps, shallower than a trap
        match body:
            case [first, *_]:
                body = first
            case {"error": dict() | list() as inner}:
                body = inner
            case {"error": str(text)} if text:
                return {**body, "message": text}
            case dict():
                return body
            case _:
                break
    return {"message": body} if isinstance(body, str) else {}


def _message(said: Mapping[str, Any]) -> str:
    """The provider's own words, in one line, without keys; a page of HTML is no message."""
    words = said.get("message") or said.get("detail") or ""
    text = _one_line(str(words))
    return "a page instead of an error" if text.startswith("<") else text


def _one_line(text: str) -> str:
    shown = "".join(char if char.isprintable() else " " for char in text[: 8 * MESSAGE_CAP])
    text = " ".join(shown.split())
    return KEYS.sub("[key]", text)[:MESSAGE_CAP].rstrip(". ")


def _retry_after_s(headers: Mapping[str, str], said: Mapping[str, Any], code: str) -> float | None:
    """Seconds the provider wants to be left alone: by header, or by Google's RetryInfo."""
    milliseconds = seconds_of(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    if "retry-after" in headers:
        return retry_after_s(headers["retry-after"])
    details = said.get("details")
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, dict) and "retryDelay" in detail:
            return seconds_of(str(detail["retryDelay"]).removesuffix("s"))
    return _reset_s(headers) if code == "rate_limited" else None


# Of OpenAI and Groq, of Anthropic, and of gateways that count one thing only. They come with every
# answer: only what is used up is waited for.
RESETS = re.compile(
    r"x-ratelimit-(reset)-(\w+)|anthropic-ratelimit-([\w-]+)-(reset)|x-ratelimit-(reset)"
)
DURATION = re.compile(
    r"(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m(?!s))?(?:(?P<s>[\d.]+)s)?(?:(?P<ms>[\d.]+)ms)?"
)


def _reset_s(headers: Mapping[str, str]) -> float | None:
    """Seconds until the last of those limits is reset that are used up."""
    waits = []
    for name in headers:
        if RESETS.fullmatch(name.lower()):
            left = seconds_of(headers.get(name.lower().replace("reset", "remaining")))
            if not left and (wait := _until_s(headers[name].strip())) is not None:
                waits.append(wait)
    return max(waits, default=None)


def _until_s(value: str) -> float | None:
    """Of ``20ms``, ``6m0s``, ``1.5``, epoch seconds or milliseconds, and RFC 3339's moments."""
    number = seconds_of(value)
    if number is not None:
        if number > 1e11:
            number /= 1000
        return max(0.0, number - time.time()) if number > 1e9 else number
    if value and (found := DURATION.fullmatch(value)):
        parts = {unit: seconds_of(count) or 0.0 for unit, count in found.groupdict().items()}
        return parts["h"] * 3600 + parts["m"] * 60 + parts["s"] + parts["ms"] / 1000
    try:
        return max(0.0, datetime.fromisoformat(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
