"""What may be said of a provider of one's own: its address, what it can and what it costs."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
)

from backchannel.registry import Capabilities
from backchannel.schemas import Name, NullsAreNotGiven, whole

MAX_MODELS = 1_000
# Of a provider that says nothing about itself: refused at accept is cheaper than at the provider.
MODEST = Capabilities(structured_output=False, multimodal=False, tools=True)


def slug(name: str) -> str:
    """The id that a name becomes, in full: ``My Ollama (2)`` is ``my-ollama-2``."""
    plain = unicodedata.normalize("NFKD", name.casefold()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _has_letters(name: str) -> str:
    if not slug(name):
        raise ValueError("a name needs a letter from a to z or a digit, for the id is made of them")
    return name


def _is_base_url(url: str) -> str:
    parts = urlsplit(url)  # its ValueErrors are sentences
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a base URL is the root of an API, as https://llm.example.com/v1")
    if parts.username is not None or parts.password is not None:
        raise ValueError("no user or password: a key is stored by backchannel keys set")
    if parts.query or parts.fragment or "?" in url or "#" in url:
        raise ValueError("it ends with its path: paths are appended to it")
    if not url.isascii() or any(each <= " " or each == "\x7f" for each in url) or "\\" in url:
        raise ValueError("only plain characters, and no space")
    _ = parts.port
    return url.rstrip("/")


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Dollars = Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)]


class Price(_Said):
    """What a model costs, in dollars per million tokens; cached ones as input if not said."""

    input: Dollars
    output: Dollars
    cached: Dollars | None = None
    cache_write: Dollars | None = None


class SaidCapabilities(_Said):
    """What requests may contain; what is left out stays modest."""

    structured_output: bool = MODEST.structured_output
    multimodal: bool = MODEST.multimodal
    tools: bool = MODEST.tools


Limit = Annotated[int, Field(ge=1, le=1_000_000_000), BeforeValidator(whole)]


class SaidLimits(_Said):
    """What all processes together may ask of it; null or left out: as much as one likes."""

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrency: Limit | None = None


ProviderName = Annotated[
    str,
    StringConstraints(min_length=1, max_length=50, strip_whitespace=True),
    AfterValidator(_has_letters),
]
BaseURL = Annotated[str, StringConstraints(max_length=2048), AfterValidator(_is_base_url)]
ModelName = Annotated[Name, StringConstraints(pattern=r"^\S+$")]
Models = Annotated[list[ModelName], Field(max_length=MAX_MODELS)]
Prices = Annotated[
    dict[Name, Price],
    Field(max_length=MAX_MODELS, description="Per model; `*` is every other one."),
]


class EditProvider(NullsAreNotGiven):
    """What shall be another; what is left out stays."""

    base_url: BaseURL | None = None
    default_model: ModelName | None = None
    models: Models | None = None
    capabilities: SaidCapabilities | None = None
    prices: Prices | None = None
    limits: SaidLimits | None = None
    needs_key: bool | None = None
    allow_loopback: bool | None = None
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] | None = None
    reports_stream_usage: bool | None = None


class NewProvider(_Said):
    """A provider to be added."""

    name: ProviderName = Field(description="Its id is made of it: `My Ollama` is `my-ollama`.")
    type: Literal["openai-compatible", "anthropic"] = "openai-compatible"
    base_url: BaseURL
    default_model: ModelName
    models: Models = []
    capabilities: SaidCapabilities = SaidCapabilities()
    prices: Prices = {}
    limits: SaidLimits = SaidLimits()
    needs_key: bool = Field(False, description="True: not available before its key is stored.")
    allow_loopback: bool = Field(
        False, description="Of who asks from this machine: the server may be on it."
    )
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    reports_stream_usage: bool = Field(
        True, description="False: the server refuses `stream_options.include_usage`."
    )
