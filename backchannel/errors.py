"""The tree of errors: each a sentence for a person, with a status and a code for a program.

BackchannelError
├── InvalidRequest            400  what was sent cannot be a job
│   ├── ProviderNotFound      400  the model names a provider nobody registered
│   ├── ProviderKeyMissing    400  the provider needs a key that is not set
│   ├── UnsupportedParameter  400  a parameter this provider cannot honour
│   ├── CapabilityMissing     400  images, a schema or tools for a model not known to take them
│   ├── ModelNotAllowed       403  a model that the caller's key is not for
│   └── EgressRefused         403  an address that the operator has not allowed
├── Unauthorized              401  no caller's key, or one that is not good
├── Forbidden                 403  not with this key, or not under this name
├── NotFound                  404  no such thing, or somebody else's
├── Conflict                  409  the state of things does not allow it
├── TooLarge                  413  over a documented cap
├── Unavailable               503  a server we need does not answer; try again
├── JobFailed                 …    a job that somebody waited for ended without an answer
├── SetupError                     the installation needs a person
└── ProviderError             502  a provider's answer that is not an answer
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple


class BackchannelError(Exception):
    """Something went wrong inside Backchannel."""

    status = 500
    type = "server_error"
    code = "internal_error"
    retryable = False

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        # the official SDKs heed it: without it they would repeat a 409 or a 5xx twice
        self.headers = {} if self.retryable else {"x-should-retry": "false"}
        if code is not None:
            self.code = code

    def body(self) -> dict[str, Any]:
        """The error as it crosses HTTP: OpenAI's ``{"error": {message, type, code, param}}``."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "code": self.code,
                "param": self.param,
            }
        }


class InvalidRequest(BackchannelError):
    """What was sent cannot become a job."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class ProviderNotFound(InvalidRequest):
    """The model names a provider that is not registered."""

    code = "provider_not_found"


class ProviderKeyMissing(InvalidRequest):
    """The provider needs a key and none is set."""

    code = "provider_key_missing"


class UnsupportedParameter(InvalidRequest):
    """A parameter that the chosen provider cannot honour; refused rather than dropped."""

    code = "unsupported_parameter"


class CapabilityMissing(InvalidRequest):
    """The model is not known for something that the request needs."""

    code = "capability_missing"


class ModelNotAllowed(InvalidRequest):
    """The caller's key is for other models."""

    status = 403
    code = "model_not_allowed"


class EgressRefused(InvalidRequest):
    """An address that the operator has not allowed."""

    status = 403
    code = "egress_refused"


class Unauthorized(BackchannelError):
    """Nobody we know: no caller's key, or one that is unknown, revoked or expired."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers["WWW-Authenticate"] = 'Bearer realm="backchannel"'


class Forbidden(BackchannelError):
    """Somebody we know, or on a way we know, and not for this."""

    status = 403
    type = "invalid_request_error"
    code = "insufficient_scope"


@contextlib.contextmanager
def naming(names: dict[str, str]) -> Iterator[None]:
    """Errors name the fields of a face, as the client knows them, not those of a job."""
    try:
        yield
    except InvalidRequest as error:
        named = (error.param or "").removeprefix("parameters.")
        error.param = names.get(named, named) or None
        raise


class NotFound(BackchannelError):
    """No such thing, or it belongs to another caller."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(BackchannelError):
    """The state of things does not allow it."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


def key_mismatch() -> Conflict:
    """The same Idempotency-Key was sent with another body."""
    return Conflict(
        "This Idempotency-Key was used for another request. Use a new key for a new body.",
        code="idempotency_mismatch",
    )


class TooLarge(BackchannelError):
    """Over a documented cap."""

    status = 413
    type = "invalid_request_error"
    code = "too_large"


class Unavailable(BackchannelError):
    """A server this needs does not answer right now."""

    status = 503
    code = "unavailable"
    retryable = True

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message, code=code, param=param)
        self.headers["Retry-After"] = "1"


class SetupError(BackchannelError):
    """The installation needs a person: the message says what to type."""

    code = "setup"


# The HTTP status that stands for the error of a job; anything else is the provider's failure.
JOB_STATUS: dict[str, int] = {
    "rate_limited": 429,
    "overloaded": 503,
    "auth": 401,
    "billing": 402,
    "context_length": 400,
    "invalid_request": 400,
    "content_filter": 400,
    "provider_not_found": 400,
    "provider_key_missing": 400,
    "unsupported_parameter": 400,
    "cancelled": 409,
    "attempt_restarted": 409,
    "expired": 504,
    "poison": 500,
    "internal_error": 500,
}

# What OpenAI calls the errors that its clients look for by name.
OPENAI_CODES: dict[str, str] = {
    "rate_limited": "rate_limit_exceeded",
    "context_length": "context_length_exceeded",
    "billing": "insufficient_quota",
}


class JobFailed(BackchannelError):
    """A job ended without an answer, as whoever waited for it is told; the queue has retried it.

    Args:
        code: The job's own error code.
        job_id: Where to look for more.
    """

    def __init__(self, message: str, *, code: str, job_id: str) -> None:
        super().__init__(message, code=OPENAI_CODES.get(code, code))
        self.status = JOB_STATUS.get(code, 502)
        self.type = "invalid_request_error" if self.status < 429 else "server_error"
        self.headers["x-backchannel-job"] = job_id


def job_failed(job_id: str, state: str, error: dict[str, Any] | None) -> JobFailed:
    """The error that stands for a job which ended in this state, with this error of its own."""
    if state == "cancelled":
        return JobFailed("The job was cancelled.", code=state, job_id=job_id)
    known = error or {"code": "internal_error", "message": None}
    message = known["message"] or f"The job ended with {known['code']}."
    return JobFailed(message, code=known["code"], job_id=job_id)


class Policy(NamedTuple):
    """What the engine does about a class of provider error."""

    retryable: bool
    burns_attempt: bool
    meaning: str


PROVIDER_ERRORS: dict[str, Policy] = {
    "rate_limited": Policy(True, False, "the provider asked us to slow down (429)"),
    "overloaded": Policy(True, False, "the provider is overloaded (529, 503)"),
    "unreachable": Policy(True, True, "no connection to the provider"),
    "server_error": Policy(True, True, "the provider failed (5xx)"),
    "disconnected": Policy(True, True, "the connection broke before the answer was complete"),
    "truncated": Policy(True, True, "the stream ended without its terminal marker"),
    "stalled": Policy(True, True, "no content within the deadline"),
    "malformed": Policy(True, True, "the provider's bytes are not its own protocol"),
    "auth": Policy(False, True, "the provider refused the key (401, 403)"),
    "billing": Policy(False, True, "the provider's account is out of credit or quota"),
    "context_length": Policy(False, True, "the messages do not fit the model's context"),
    "invalid_request": Policy(False, True, "the provider refused the request (4xx)"),
    "content_filter": Policy(False, True, "the provider refused to answer this content"),
    "answer_too_large": Policy(False, True, "the answer went over the cap of bytes"),
    "circuit_open": Policy(True, False, "not called: the endpoint keeps failing, see the circuit"),
}

# What says that an endpoint is not well, if it comes before any content: enough of these in a row
# open its circuit. Everything else, a refusal or half an answer, is a sign of life.
# What says that it was asked too much, and may say until when.
BUSY = frozenset({"rate_limited", "overloaded"})
UNWELL = frozenset({"unreachable", "overloaded", "server_error", "disconnected", "stalled"})


# What says that a model cannot be had here, now: to try it again helps nobody, another one may do.
UNAVAILABLE = frozenset({"auth", "billing", "provider_not_found", "provider_key_missing"})


def falls_back(error: BackchannelError) -> bool:
    """Whether a job with fallbacks asks its next model, if nothing of an answer has come yet.

    For what would be tried again, and for what is unavailable. Not for what the request itself is
    refused for: content, length, form.
    """
    if error.code in UNAVAILABLE:
        return True
    # 404: the provider has no such model
    return isinstance(error, ProviderError) and (error.retryable or error.status_code == 404)


class ProviderError(BackchannelError):
    """A provider's answer that is not an answer, classified.

    Args:
        message: What happened, without keys or prompt text.
        code: One of ``PROVIDER_ERRORS``.
        retry_after_s: The provider's own wish; never called again before it is over.
        status_code: The provider's HTTP status, where there was one.
    """

    status = 502
    type = "provider_error"

    def __init__(
        self,
        message: str,
        *,
        code: str,
        retry_after_s: float | None = None,
        status_code: int | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.policy = PROVIDER_ERRORS[code]
        self.retryable = self.policy.retryable
        self.retry_after_s = retry_after_s
        self.status_code = status_code

    def excuse(self, wait_s: float) -> None:
        """Not the job's fault: no retry is burnt, and the next attempt waits at least this long."""
        self.policy = self.policy._replace(burns_attempt=False)
        self.retry_after_s = max(self.retry_after_s or 0.0, wait_s)
