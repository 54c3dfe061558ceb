"""Settings: what the environment may say, and what it becomes."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from pydantic import ValidationError

from backchannel.settings import Settings, get_settings


def test_nothing_set_is_a_laptop_with_sqlite_and_its_own_valkey() -> None:
    settings = Settings()
    home = Path.cwd() / ".backchannel"
    assert settings.database == f"sqlite:///{home / 'backchannel.db'}"
    assert settings.redis == f"unix://{home / 'valkey.sock'}"
    assert settings.api_url == "http://127.0.0.1:8000"
    assert settings.default_model == "anthropic:claude-sonnet-4-5-20250929"


def test_variables_have_our_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBS_IN_FLIGHT", "7")
    monkeypatch.setenv("BACKCHANNEL_GRACE_S", "3.5")
    settings = Settings()
    assert settings.jobs_in_flight == 200
    assert settings.grace_s == 3.5


@pytest.mark.parametrize(
    ("name", "value"), [("PROCESSES", "0"), ("JOBS_IN_FLIGHT", "many"), ("GRACE_S", "-1")]
)
def test_a_wrong_value_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"BACKCHANNEL_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()


def test_home_moves_everything_and_a_later_chdir_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKCHANNEL_HOME", "~/jobs")
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = Settings()
    assert settings.database == f"sqlite:///{tmp_path}/jobs/backchannel.db"
    assert settings.redis == f"unix://{tmp_path}/jobs/valkey.sock"
    monkeypatch.setenv("BACKCHANNEL_HOME", "here")
    assert Settings().home_path.is_absolute()


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ("postgresql://u:p@h/n", "postgresql+psycopg://u:p@h/n"),
        (
            "postgres://u:p@h:5433/n?sslmode=require",
            "postgresql+psycopg://u:p@h:5433/n?sslmode=require",
        ),
        ("postgresql+psycopg://u@h/n", "postgresql+psycopg://u@h/n"),
        ("sqlite:////srv/jobs.db", "sqlite:////srv/jobs.db"),
    ],
)
def test_postgresql_goes_through_one_driver(
    given: str, becomes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKCHANNEL_DATABASE_URL", given)
    assert Settings().database == becomes


def test_a_redis_url_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCHANNEL_REDIS_URL", "redis://cache:6379/3")
    assert Settings().redis == "redis://cache:6379/3"


def test_a_providers_id_may_have_dashes_which_a_variable_may_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BACKCHANNEL_PROVIDERS__MY_OLLAMA__BASE_URL", "http://gpu:11434/v1")
    monkeypatch.setenv("BACKCHANNEL_PROVIDERS__MY_OLLAMA__API_KEY", "secret")
    monkeypatch.setenv("BACKCHANNEL_PROVIDERS__GROQ__API_KEY", "other")
    providers = Settings().providers
    assert set(providers) == {"my-ollama", "groq"}
    assert providers["my-ollama"].base_url == "http://gpu:11434/v1"
    assert providers["my-ollama"].api_key is not None
    assert providers["my-ollama"].api_key.get_secret_value() == "secret"


def test_a_key_is_not_in_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCHANNEL_PROVIDERS__GROQ__API_KEY", "gsk-123")
    settings = Settings()
    assert "gsk-123" not in f"{settings!r}{settings}{settings.model_dump_json()}"


def test_own_prices_are_exact_decimals(monkeypatch: pytest.MonkeyPatch) -> None:
    prices = '{"groq:llama": {"input": "0.1", "output": "0.30"}}'
    monkeypatch.setenv("BACKCHANNEL_PRICES", prices)
    own = Settings().prices["groq:llama"]
    assert (own.input, own.output, own.cached) == (Decimal("0.1"), Decimal("0.30"), None)


def test_settings_are_read_once_and_cannot_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = get_settings()
    monkeypatch.setenv("BACKCHANNEL_PROCESSES", "9")
    assert get_settings() is settings
    with pytest.raises(ValidationError, match="frozen"):
        settings.processes = 2
