"""Every knob once, with its unit and its reason; read from ``BACKCHANNEL_…`` variables."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from backchannel.egress import AllowedHosts
from backchannel.tiers import NAMES, Tier

_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._~-]+")


class ProviderSettings(BaseModel):
    """Of one provider: ``BACKCHANNEL_PROVIDERS__<ID>__BASE_URL``, ``…__API_KEY`` and the like."""

    base_url: str | None = None
    api_key: SecretStr | None = None
    api_key_file: Path | None = None


class PriceSettings(BaseModel):
    """The operator's own price for one ``provider:model``, in dollars per million tokens."""

    input: Decimal
    output: Decimal
    cached: Decimal | None = None  # None: as input
    cache_write: Decimal | None = None  # None: as input


class LimitSettings(BaseModel):
    """What all processes together may ask of one provider; None: as much as one likes."""

    model_config = ConfigDict(extra="forbid")

    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    concurrency: int | None = Field(None, ge=1)


class Settings(BaseSettings):
    """One process's configuration; immutable after start."""

    model_config = SettingsConfigDict(
        env_prefix="BACKCHANNEL_", env_nested_delimiter="__", extra="ignore", frozen=True
    )

    home: Path = Field(
        Path(".backchannel"), description="Folder of the database, Valkey's data and the logs."
    )
    database_url: str = Field(
        "", description="Empty: SQLite in the home folder. Or postgresql://user:password@host/name."
    )
    redis_url: str = Field(
        "", description="Empty: the embedded Valkey of the home folder. Or redis://host:6379/0."
    )
    redis_prefix: str = Field(
        "backchannel:", description="Put before every Redis key, so one server can be shared."
    )
    api_url: str = Field(
        "http://127.0.0.1:8000", description="Where the command line finds the API."
    )
    api_key: SecretStr | None = Field(
        None, description="The caller's key that the command line sends, once there are any."
    )
    default_model: str = Field(
        "anthropic:claude-sonnet-4-5-20250929", description="The model of a job that names none."
    )
    default_provider: str = Field("anthropic", description="The provider of a bare model name.")
    providers: dict[str, ProviderSettings] = Field(
        default_factory=dict, description="Base URL and key per provider id."
    )
    master_key: SecretStr | None = Field(
        None,
        description="Opens the secrets in the database: stored keys, and what signs webhooks. "
        "Fernet keys; several, with commas: the first seals, all open. Unset: a file in the home "
        "folder, made at first use.",
    )
    prices: dict[str, PriceSettings] = Field(
        default_factory=dict,
        description="Own prices by provider:model, as JSON; they go before the price list.",
    )
    limits: dict[str, LimitSettings] = Field(
        default_factory=dict,
        description="What all processes together may ask of a built-in provider, by its id, as "
        "JSON: requests_per_minute, tokens_per_minute, concurrency.",
    )
    egress_allow: str = Field(
        "",
        description="Hosts that webhooks and custom providers may reach although they are not "
        "public https: host, host:port, address, network or loopback, with commas.",
    )
    tiers: dict[Tier, list[str]] = Field(
        default_factory=dict,
        description="Own models of a tier, fast, balanced or powerful, in the order they are "
        "tried, as JSON; or one tier alone in BACKCHANNEL_TIERS__FAST, as a JSON array.",
    )
    allow_open_bind: bool = Field(
        False,
        description="Let the API listen beyond loopback without callers' keys, as inside a compose "
        "network. Anybody who reaches the port can spend your money.",
    )

    processes: int = Field(1, ge=1, description="Worker processes; one per core is right.")
    jobs_in_flight: int = Field(
        200,
        ge=1,
        description="Jobs one worker process runs at once; they wait, they do not compute.",
    )
    grace_s: float = Field(
        20.0,
        ge=0,
        description="Seconds a stopping worker waits for running jobs before handing back.",
    )
    flower_events: bool = Field(
        True, description="Send Celery task events for Flower; about 0.5 ms of CPU a job."
    )
    log_level: str = Field("info", description="debug, info, warning or error.")

    lease_s: float = Field(20.0, description="Seconds a claim lives without a heartbeat.")
    heartbeat_s: float = Field(5.0, description="Seconds between heartbeats; three may be missed.")
    fence_s: float = Field(
        15.0,
        description="Seconds without a renewed lease after which a worker stops its own calls.",
    )
    max_crashes: int = Field(
        3, ge=1, description="Crashed attempts after which a job fails as poison."
    )
    max_retries: int = Field(
        5,
        description="Retries after provider errors that burn an attempt; 429, 529 and an "
        "open circuit do not.",
    )
    circuit_failures: int = Field(
        5, ge=1, description="Failed calls in a row after which an endpoint is left alone."
    )
    circuit_open_s: float = Field(
        30.0,
        gt=0,
        description="Seconds an endpoint is left alone before one call tries it again; its jobs "
        "wait without losing a retry.",
    )
    backoff_max_s: float = Field(60.0, description="Ceiling of the jittered wait between attempts.")
    job_deadline_s: float = Field(
        86_400.0, description="Seconds after accept at which an unfinished job expires."
    )
    first_byte_s: float = Field(
        120.0, description="Seconds to the first content; long prompts are slow."
    )
    idle_s: float = Field(
        60.0, description="Seconds without content; keep-alive comments do not count."
    )
    attempt_s: float = Field(900.0, description="Seconds one attempt may take in all.")
    max_body_bytes: int = Field(32 << 20, description="Cap of one request body: 32 MiB.")
    max_file_bytes: int = Field(2 << 30, description="Cap of one uploaded file: 2 GiB.")
    max_line_bytes: int = Field(
        1 << 20, description="Cap of one line of a provider's stream: 1 MiB."
    )
    max_answer_bytes: int = Field(8 << 20, description="Cap of one answer: 8 MiB.")

    @field_validator("providers", mode="before")
    @classmethod
    def _ids_have_dashes(cls, value: Any) -> Any:
        """Environment variables cannot hold a dash: ``MY_OLLAMA`` is the provider ``my-ollama``."""
        if isinstance(value, dict):
            return {str(key).lower().replace("_", "-"): item for key, item in value.items()}
        return value

    @field_validator("egress_allow")
    @classmethod
    def _hosts_can_be_read(cls, value: str) -> str:
        AllowedHosts.parse(value)
        return value

    @field_validator("tiers", mode="after")
    @classmethod
    def _tiers_name_models(cls, value: dict[Tier, list[str]]) -> dict[Tier, list[str]]:
        for tier, models in value.items():
            if not models:
                raise ValueError(f"tier {tier} is empty: name a model, or leave it out")
            if nested := [name for name in models if name in NAMES]:
                raise ValueError(f"tier {tier} names {nested[0]}, which is no model")
        return value

    @property
    def home_path(self) -> Path:
        """The home folder, absolute, so that a later chdir cannot move it."""
        return self.home.expanduser().absolute()

    @property
    def database(self) -> str:
        """The SQLAlchemy URL: PostgreSQL always through psycopg 3, else the SQLite file at home."""
        url = self.database_url
        if not url:
            return f"sqlite:///{self.home_path / 'backchannel.db'}"
        for scheme in ("postgresql://", "postgres://"):
            if url.startswith(scheme):
                return "postgresql+psycopg://" + url.removeprefix(scheme)
        return url

    @property
    def redis(self) -> str:
        """The Redis URL; the embedded server listens on a socket only this user can open.

        A socket's path has room for about 100 bytes and stands in a URL: a home that is longer, or
        not plain, gets a folder of its own under the system's temporary one.
        """
        if self.redis_url:
            return self.redis_url
        socket = self.home_path / "valkey.sock"
        if len(str(socket)) > 100 or not _PLAIN_PATH.fullmatch(str(socket)):
            home = hashlib.sha256(os.fsencode(self.home_path.resolve())).hexdigest()[:16]
            folder = f"backchannel-{os.getuid()}-{home}"
            socket = Path(tempfile.gettempdir(), folder, "valkey.sock")
        return f"unix://{socket}"


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """This process's settings, read once."""
    return Settings()
