"""Errors as providers really send them, and the code each becomes."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any

import pytest

from backchannel.registry import BUILT_IN
from workers.providers.failures import MESSAGE_CAP, refusal

OPENAI = next(provider for provider in BUILT_IN if provider.id == "openai")


def error(message: str = "no", **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, **fields}}


# (what, status, body, code)
SENT: list[tuple[str, int | None, Any, str]] = [
    ("OpenAI, no credit", 429, error(code="insufficient_quota"), "billing"),
    ("OpenAI, too fast", 429, error(code="rate_limit_exceeded", type="tokens"), "rate_limited"),
    ("OpenAI, long", 400, error(code="context_length_exceeded"), "context_length"),
    ("OpenAI, policy", 400, error(code="content_policy_violation"), "content_filter"),
    ("OpenAI, model", 404, error(code="model_not_found"), "invalid_request"),
    ("OpenAI, key", 401, error(code="invalid_api_key"), "auth"),
    ("OpenAI, in stream", None, error(type="server_error", code=None), "server_error"),
    (
        "Azure",
        400,
        error(code="content_filter", innererror={"code": "ResponsibleAIPolicyViolation"}),
        "content_filter",
    ),
    (
        "Anthropic, long",
        400,
        {"type": "error", **error("prompt is too long: 9 tokens", type="invalid_request_error")},
        "context_length",
    ),
    (
        "Anthropic, no credit",
        400,
        error("Your credit balance is too low to access", type="invalid_request_error"),
        "billing",
    ),
    ("Anthropic, overload in 200", 200, error(type="overloaded_error"), "overloaded"),
    ("Anthropic, in stream", None, error(type="invalid_request_error"), "invalid_request"),
    ("Gemini, a list", 400, [error(code=400, status="INVALID_ARGUMENT")], "invalid_request"),
    ("Gemini, too fast", 429, [error(code=429, status="RESOURCE_EXHAUSTED")], "rate_limited"),
    ("Gemini, overload", 503, [error(code=503, status="UNAVAILABLE")], "overloaded"),
    ("OpenRouter, status in stream", None, error(code=502), "server_error"),
    ("OpenRouter, status in 200", 200, error(code="429"), "rate_limited"),
    (
        "vLLM, flat",
        400,
        {
            "object": "error",
            "message": "This model's maximum context length is 8 tokens",
            "type": "BadRequestError",
            "code": 400,
        },
        "context_length",
    ),
    ("llama.cpp", 400, error(type="exceed_context_size_error", code=400), "context_length"),
    ("Ollama, a string", 404, {"error": "model 'x' not found"}, "invalid_request"),
    ("Ollama, full", 503, {"error": "server busy, please try again"}, "overloaded"),
    ("FastAPI, detail", 422, {"detail": [{"msg": "field required"}]}, "invalid_request"),
    ("a string", 500, "Internal Server Error", "server_error"),
    ("a page", 502, "<html><body>Bad gateway</body></html>", "server_error"),
    ("nothing", 500, "", "server_error"),
    ("null", 429, None, "rate_limited"),
    ("numbers", 400, [[[[[1]]]]], "invalid_request"),
    ("an error that is null", 400, {"error": None}, "invalid_request"),
]


@pytest.mark.parametrize(("what", "status", "body", "code"), SENT, ids=[row[0] for row in SENT])
def test_what_was_sent_becomes_a_code(what: str, status: int | None, body: Any, code: str) -> None:
    found = refusal(OPENAI, body, status=status)
    assert found.code == code
    assert "'openai'" in found.message


def test_the_message_is_the_providers_in_one_line_and_short() -> None:
    said = refusal(OPENAI, error("no\n  such\tthing. " + "x" * 9999), status=400).message
    assert "answered 400: no such thing. xxx" in said
    assert len(said) < MESSAGE_CAP + 60


@pytest.mark.parametrize(
    "key", ["sk-proj-abcDEF123456_78", "sk-ant-api03-abcdef", "gsk_abcdef123456", "AIzaSyA1234567"]
)
def test_a_key_in_the_providers_words_is_masked(key: str) -> None:
    said = refusal(OPENAI, error(f"Incorrect API key provided: {key}."), status=401).message
    assert key not in said
    assert "[key]" in said


def test_a_page_is_not_quoted() -> None:
    said = refusal(OPENAI, "<!doctype html><script>alert(1)</script>", status=502).message
    assert "script" not in said


RETRY: list[tuple[dict[str, str], Any, float | None]] = [
    ({"retry-after": "7"}, {}, 7.0),
    ({"retry-after": "0.5"}, {}, 0.5),
    ({"retry-after": "-3"}, {}, 0.0),
    ({"retry-after": "soon"}, {}, None),
    ({"retry-after": "nan"}, {}, None),
    ({"retry-after": "inf"}, {}, None),
    ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, {}, 0.0),
    ({"retry-after-ms": "1500", "retry-after": "9"}, {}, 1.5),
    ({}, error(details=[{"@type": "x"}, {"retryDelay": "34s"}]), 34.0),
    ({}, error(details="none"), None),
    ({}, {}, None),
    ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m1.5s"}, {}, 361.5),
    ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "20ms"}, {}, 0.02),
    ({"x-ratelimit-reset-requests": "1h2m", "x-ratelimit-reset-tokens": "5s"}, {}, 3720.0),
    ({"x-ratelimit-remaining-requests": "7", "x-ratelimit-reset-requests": "1s"}, {}, None),
    (
        {
            "x-ratelimit-remaining-requests": "7",
            "x-ratelimit-reset-requests": "90s",
            "x-ratelimit-remaining-tokens": "0",
            "x-ratelimit-reset-tokens": "2.5s",
        },
        {},
        2.5,
    ),
    ({"x-ratelimit-reset": "12"}, {}, 12.0),
    ({"x-ratelimit-reset": "1445412480000"}, {}, 0.0),
    ({"x-ratelimit-reset": "soon"}, {}, None),
    ({"x-ratelimit-reset": ""}, {}, None),
    ({"anthropic-ratelimit-requests-reset": "2015-10-21T07:28:00Z"}, {}, 0.0),
    ({"retry-after": "7", "x-ratelimit-reset-requests": "1m0s"}, {}, 7.0),
]


@pytest.mark.parametrize(("headers", "body", "seconds"), RETRY)
def test_retry_after_in_every_form(
    headers: dict[str, str], body: Any, seconds: float | None
) -> None:
    assert refusal(OPENAI, body, status=429, headers=headers).retry_after_s == seconds


def test_retry_after_as_a_date() -> None:
    headers = {"retry-after": formatdate(time.time() + 60, usegmt=True)}
    seconds = refusal(OPENAI, {}, status=429, headers=headers).retry_after_s
    assert seconds is not None
    assert 30 < seconds <= 60


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("{seconds:.0f}", "x-ratelimit-reset"),
        ("{ms:.0f}", "x-ratelimit-reset"),
        ("{iso}", "anthropic-ratelimit-input-tokens-reset"),
    ],
)
def test_the_moment_of_a_reset(form: str, name: str) -> None:
    at = time.time() + 60
    iso = datetime.fromtimestamp(at, UTC).isoformat()
    headers = {name: form.format(seconds=at, ms=at * 1000, iso=iso)}
    seconds = refusal(OPENAI, {}, status=429, headers=headers).retry_after_s
    assert seconds is not None
    assert 30 < seconds <= 61


def test_limits_that_are_told_with_another_refusal_say_nothing_of_it() -> None:
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "60s"}
    assert refusal(OPENAI, {}, status=500, headers=headers).retry_after_s is None


def test_a_redirect_names_the_base_url() -> None:
    found = refusal(OPENAI, "", status=308)
    assert found.code == "invalid_request"
    assert OPENAI.base_url in found.message
