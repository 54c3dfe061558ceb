"""Names become a provider and a model, or a sentence that says what to do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from backchannel.errors import InvalidRequest, ProviderKeyMissing, ProviderNotFound, SetupError
from backchannel.registry import PROVIDER_ID, Limits, Registry, get_registry
from backchannel.settings import get_settings

KEYS = {
    "anthropic": "ANTHROPIC_API_KEY",
    "openai": "OPENAI_API_KEY",
    "groq": "GROQ_API_KEY",
    "gemini": "GEMINI_API_KEY",
}


@pytest.fixture
def all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in KEYS.values():
        monkeypatch.setenv(variable, "key")


@pytest.mark.usefixtures("all_keys")
@pytest.mark.parametrize(
    ("name", "becomes"),
    [
        ("groq:llama-3.3-70b-versatile", "groq:llama-3.3-70b-versatile"),
        ("groq:openai/gpt-oss-120b", "groq:openai/gpt-oss-120b"),
        # an id alone is its default model
        ("openai", "openai:gpt-5-mini"),
        ("openai:", "openai:gpt-5-mini"),
        ("echo", "echo:echo-1"),
        # the first colon only, and only after a known id: tags have colons too
        ("ollama:llama3.2:1b", "ollama:llama3.2:1b"),
        ("openai:ft:gpt-4.1-mini:acme::x", "openai:ft:gpt-4.1-mini:acme::x"),
        # a bare name goes to the default provider
        ("claude-haiku-4-5", "anthropic:claude-haiku-4-5"),
        ("gpt-5", "anthropic:gpt-5"),
        # no name: the default model
        (None, "anthropic:claude-sonnet-4-5-20250929"),
        ("", "anthropic:claude-sonnet-4-5-20250929"),
    ],
)
def test_a_name_becomes_a_provider_and_a_model(name: str | None, becomes: str) -> None:
    assert get_registry().resolve(name).id == becomes


def test_a_tag_alone_is_fine_where_the_default_provider_has_tags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BACKCHANNEL_DEFAULT_PROVIDER", "ollama")
    assert get_registry().resolve("llama3.2:1b").id == "ollama:llama3.2:1b"


@pytest.mark.usefixtures("all_keys")
@pytest.mark.parametrize("name", ["nobody:model", "llama3.2:1b", ":model", "OPENAI:gpt-5"])
def test_an_unknown_provider_is_never_another_one(name: str) -> None:
    with pytest.raises(
        ProviderNotFound, match=r"There is no provider '.*Known providers: anth"
    ) as e:
        get_registry().resolve(name)
    assert (e.value.status, e.value.code, e.value.param) == (400, "provider_not_found", "model")


@pytest.mark.parametrize("name", [" openai:gpt-5", "openai:gpt-5\n", " "])
def test_spaces_around_a_name_are_a_mistake(name: str) -> None:
    with pytest.raises(InvalidRequest, match="spaces"):
        get_registry().resolve(name)


def test_a_wrong_default_provider_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCHANNEL_DEFAULT_PROVIDER", "nobody")
    with pytest.raises(ProviderNotFound, match="nobody"):
        get_registry().resolve("gpt-5")


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(("provider_id", "variable"), KEYS.items())
def test_a_missing_key_names_the_variable_to_set(provider_id: str, variable: str) -> None:
    with pytest.raises(ProviderKeyMissing, match=f"Set {variable} where") as error:
        get_registry().resolve(provider_id)
    assert error.value.code == "provider_key_missing"


def test_a_key_in_our_own_variable_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCHANNEL_PROVIDERS__GROQ__API_KEY", "key")
    assert get_registry().resolve("groq").provider.id == "groq"


@pytest.mark.parametrize("provider_id", ["ollama", "lmstudio", "echo"])
def test_what_needs_no_key_is_always_available(provider_id: str) -> None:
    assert get_registry().resolve(provider_id).provider.id == provider_id


# ---------------------------------------------------------------- the registry itself


def test_ids_are_plain_and_types_are_known() -> None:
    for provider in get_registry().providers.values():
        assert PROVIDER_ID.match(provider.id)
        assert provider.type in {"anthropic", "openai-compatible", "echo"}


def test_a_base_url_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCHANNEL_PROVIDERS__OLLAMA__BASE_URL", "http://gpu:11434/v1")
    registry = get_registry()
    assert registry.get("ollama").base_url == "http://gpu:11434/v1"
    assert registry.get("lmstudio").base_url == "http://127.0.0.1:1234/v1"


def test_limits_of_built_in_providers_are_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCHANNEL_LIMITS", '{"openai": {"requests_per_minute": 500}}')
    registry = get_registry()
    assert registry.get("openai").limits == Limits(requests_per_minute=500)
    assert registry.get("openai").limits
    assert not registry.get("groq").limits


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ('{"attic": {"concurrency": 1}}', "BACKCHANNEL_LIMITS names 'attic'"),
        ('{"openai": {"concurrency": 0}}', "greater than or equal to 1"),
        ('{"openai": {"rpm": 1}}', "limits.openai.rpm"),
    ],
)
def test_limits_that_mean_nothing_are_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, limits: str, said: str
) -> None:
    monkeypatch.setenv("BACKCHANNEL_LIMITS", limits)
    with pytest.raises((SetupError, ValidationError), match=re.escape(said)):
        get_registry()


def test_a_process_builds_its_registry_once() -> None:
    built: list[Registry] = []

    def build(settings: object) -> Registry:
        built.append(Registry([], get_settings()))
        return built[-1]

    assert get_registry(build) is get_registry(build) is built[0]
    assert len(built) == 1


FORK = """
import os, sys
from backchannel.registry import get_registry
parent = get_registry()
child = os.fork()
if child == 0:
    os._exit(0 if get_registry() is not parent and get_registry() is get_registry() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or get_registry() is not parent)
"""


def test_a_forked_process_builds_its_own() -> None:
    # in a process of its own: this one has threads, which a fork would not carry over
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", FORK], cwd=root, timeout=60, check=False)
    assert run.returncode == 0
