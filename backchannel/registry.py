"""Providers as data: adapters follow the type, keys, ledger and limits the id."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from backchannel.errors import InvalidRequest, ProviderKeyMissing, ProviderNotFound, SetupError
from backchannel.settings import PriceSettings, Settings, get_settings
from backchannel.tiers import AUTO, DEFAULT_TIERS, NAMES, USUAL, Tier, tier_of
from backchannel.vault import Source, source_of, variable

ProviderType = Literal["anthropic", "openai-compatible", "echo"]
PROVIDER_ID = re.compile(r"^[a-z0-9-]+$")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What requests to a provider may contain."""

    structured_output: bool = True
    multimodal: bool = True
    tools: bool = True


@dataclass(frozen=True, slots=True)
class Limits:
    """What a provider may be asked for, by all processes together; None: as much as one likes."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None

    def __bool__(self) -> bool:
        return self != NO_LIMITS


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Provider:
    """One place that answers chats.

    Attributes:
        id: Its name in ``provider:model``, in keys, in the books.
        type: Which adapter speaks to it.
        base_url: The root the SDK appends its paths to.
        key_env: The well-known environment variable of its key.
        needs_key: False for servers that take any key, or none.
        max_tokens_field: What a compatible server calls the cap on output tokens.
        reports_stream_usage: Whether it takes ``stream_options.include_usage``.
        colons_in_models: Whether its model names contain colons (Ollama tags, OpenAI's ``ft:…``).
        price_provider: Its name in genai-prices; None where a built-in one costs nothing per token.
        limited: What some of its models can, where that is less than the provider can.
        prices: Per model, ``*`` for any other: what whoever added the provider says it costs.
        allow_loopback: A custom one may be on this machine.
        limits: What it may be asked for, by all processes together.
    """

    id: str
    name: str
    type: ProviderType
    base_url: str
    default_model: str
    models: tuple[str, ...] = ()
    key_env: str | None = None
    needs_key: bool = True
    capabilities: Capabilities = field(default_factory=Capabilities)
    limited: Mapping[str, Capabilities] = field(default_factory=dict, hash=False)
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    reports_stream_usage: bool = True
    colons_in_models: bool = False
    price_provider: str | None = None
    prices: Mapping[str, PriceSettings] = field(default_factory=dict, hash=False)
    allow_loopback: bool = False
    builtin: bool = True
    limits: Limits = NO_LIMITS

    def can(self, model: str) -> Capabilities:
        """What requests to one of its models may contain."""
        return self.limited.get(model, self.capabilities)


BUILT_IN: tuple[Provider, ...] = (
    Provider(
        id="anthropic",
        name="Anthropic",
        type="anthropic",
        base_url="https://api.anthropic.com",
        default_model="claude-sonnet-4-5-20250929",
        models=("claude-sonnet-4-5-20250929", "claude-haiku-4-5", "claude-opus-4-5"),
        key_env="ANTHROPIC_API_KEY",
        price_provider="anthropic",
    ),
    Provider(
        id="openai",
        name="OpenAI",
        type="openai-compatible",
        base_url="https://api.openai.com/v1",
        default_model="gpt-5-mini",
        models=("gpt-5-mini", "gpt-5", "gpt-4.1-mini"),
        key_env="OPENAI_API_KEY",
        # Reasoning models refuse max_tokens; every current model takes this name.
        max_tokens_field="max_completion_tokens",
        price_provider="openai",
        colons_in_models=True,
    ),
    Provider(
        id="groq",
        name="Groq",
        type="openai-compatible",
        base_url="https://api.groq.com/openai/v1",
        default_model="llama-3.3-70b-versatile",
        models=("llama-3.3-70b-versatile", "llama-3.1-8b-instant", "openai/gpt-oss-120b"),
        key_env="GROQ_API_KEY",
        # https://console.groq.com/docs: its llama-3 models read no images and know no schemas
        limited={
            "llama-3.3-70b-versatile": Capabilities(structured_output=False, multimodal=False),
            "llama-3.1-8b-instant": Capabilities(structured_output=False, multimodal=False),
            "openai/gpt-oss-120b": Capabilities(multimodal=False),
        },
        max_tokens_field="max_completion_tokens",
        price_provider="groq",
    ),
    Provider(
        id="gemini",
        name="Google Gemini",
        type="openai-compatible",
        base_url="https://generativelanguage.googleapis.com/v1beta/openai",
        default_model="gemini-2.5-flash",
        models=("gemini-2.5-flash", "gemini-2.5-pro", "gemini-2.5-flash-lite"),
        key_env="GEMINI_API_KEY",
        price_provider="google",
    ),
    Provider(
        id="ollama",
        name="Ollama",
        type="openai-compatible",
        base_url="http://127.0.0.1:11434/v1",
        default_model="llama3.2",
        needs_key=False,
        colons_in_models=True,
    ),
    Provider(
        id="lmstudio",
        name="LM Studio",
        type="openai-compatible",
        base_url="http://127.0.0.1:1234/v1",
        default_model="local-model",
        needs_key=False,
        colons_in_models=True,
    ),
    Provider(
        id="echo",
        name="Echo (offline)",
        type="echo",
        base_url="",
        default_model="echo-1",
        models=("echo-1",),
        needs_key=False,
    ),
)


NAMED = "named by the request"


@dataclass(frozen=True, slots=True)
class Resolved:
    """A model name made unambiguous, and why it became this one."""

    provider: Provider
    model: str
    reason: str

    @property
    def id(self) -> str:
        """``provider:model``."""
        return f"{self.provider.id}:{self.model}"


class Registry:
    """The providers one process knows. Immutable: a change builds a new one.

    Args:
        version: Of the table of providers that is in it.
        stored: The ids with a stored key, and the version it was set with.
        set_aside: The ids of rows that cannot be used, and why.
    """

    def __init__(
        self,
        providers: Iterable[Provider],
        settings: Settings,
        *,
        version: int = 0,
        stored: Mapping[str, int] | None = None,
        set_aside: Mapping[str, str] | None = None,
    ) -> None:
        self.providers: Mapping[str, Provider] = {each.id: each for each in providers}
        self.version = version
        self.stored = stored or {}
        self.set_aside = set_aside or {}
        self._settings = settings

    def get(self, provider_id: str) -> Provider:
        """The provider with this id.

        Raises:
            ProviderNotFound: Nobody registered it.
        """
        try:
            return self.providers[provider_id]
        except KeyError:
            if provider_id in self.set_aside:
                raise ProviderNotFound(
                    f"Provider '{provider_id}' is set aside: {self.set_aside[provider_id]} Correct "
                    f"it: backchannel providers edit {provider_id}",
                    param="model",
                ) from None
            known = ", ".join(sorted(self.providers))
            raise ProviderNotFound(
                f"There is no provider '{provider_id}'. Known providers: {known}.", param="model"
            ) from None

    def key_present(self, provider: Provider) -> bool:
        """Whether a call could be authorised. Never returns the key itself."""
        return not provider.needs_key or self.key_source(provider) is not None

    def key_source(self, provider: Provider) -> Source | None:
        """Where a provider's key is taken from; None if there is none."""
        return source_of(provider, self._settings, self.stored)

    def knows(self, name: str | None) -> bool:
        """Whether a name says which provider is meant; a bare name may be that of a new one."""
        return not name or name in NAMES or name.partition(":")[0] in self.providers

    def resolve(self, name: str | None) -> Resolved:
        """Turn what a caller wrote into a provider and its model name.

        ``provider:model`` is split on the first colon only if the left part is a registered id,
        because Ollama tags contain colons; an id alone means its default model; a bare name goes to
        the default provider, a name with a colon only if that provider's names have them;
        a tier takes the first available of its list, ``auto`` the usual tier: which one a request
        calls for, `backchannel.choice.choose` says.

        Raises:
            ProviderNotFound: The name cannot be placed.
            ProviderKeyMissing: The provider needs a key that is not set.
        """
        asked = name or self.default_model
        tier = USUAL if asked == AUTO else tier_of(asked)
        if tier is not None:
            return self.of_tier(tier, f"'{asked}'")[0]
        resolved = self.place(asked, NAMED if name else "the default model")
        if not self.key_present(resolved.provider):
            raise self.key_missing(resolved.provider)
        return resolved

    @property
    def default_model(self) -> str:
        """What a job that names no model is asked of; it may be a tier."""
        return self._settings.default_model

    def key_missing(self, provider: Provider) -> ProviderKeyMissing:
        """The error that says which key to set."""
        name = provider.key_env or variable(provider.id, "API_KEY")
        return ProviderKeyMissing(
            f"Provider '{provider.id}' has no key. Set {name} where the API and the workers "
            f"start, type: backchannel keys set {provider.id}, or use the offline model "
            "'echo:echo-1'.",
            param="model",
        )

    def place(self, asked: str, why: str) -> Resolved:
        """A model's name with its provider, whether or not that one could be called.

        Raises:
            ProviderNotFound: The name cannot be placed.
        """
        if asked != asked.strip() or not asked:
            raise InvalidRequest("A model name has no spaces around it.", param="model")
        left, colon, right = asked.partition(":")
        if left in self.providers or left in self.set_aside:
            provider = self.get(left)
            return Resolved(provider, right or provider.default_model, why)
        provider = self.get(self._settings.default_provider)
        if colon and not provider.colons_in_models:
            known = ", ".join(sorted(self.providers))
            raise ProviderNotFound(
                f"There is no provider '{left}'. Known providers: {known}. "
                f"For a tag write the provider too, as in 'ollama:{asked}'.",
                param="model",
            )
        return Resolved(provider, asked, f"{why}; a bare name goes to {provider.id}")

    def of_tier(
        self, tier: Tier, named: str, unfit: Callable[[Resolved], str | None] = lambda _: None
    ) -> list[Resolved]:
        """The models of a tier that could be asked now, in order; the reason names the others.

        Args:
            named: What the reason begins with: how the tier came to be asked for.
            unfit: Why a model cannot answer this request; None if it can.

        Raises:
            ProviderKeyMissing: There are none.
        """
        found, skipped = [], []
        for name in self._settings.tiers.get(tier) or DEFAULT_TIERS[tier]:
            try:
                resolved = self.place(name, "")
            except ProviderNotFound:
                skipped.append(f"{name} (no such provider)")
                continue
            able = self.key_present(resolved.provider)
            if (why := unfit(resolved) if able else "no key") is None:
                found.append(resolved)
            elif not found:
                skipped.append(f"{resolved.id} ({why})")
        if not found:
            raise ProviderKeyMissing(
                f"No model of tier '{tier}' can be asked: {', '.join(skipped)}. Set one of "
                f"{', '.join(p.key_env for p in self.providers.values() if p.key_env)}, or give "
                f"the tier other models with {_TIERS}{tier.upper()}.",
                param="model",
            )
        reason = f"{named}; first available is {found[0].provider.id}"
        if skipped:
            reason += f"; skipped {', '.join(skipped)}"
        return [replace(found[0], reason=reason), *found[1:]]


_TIERS = "BACKCHANNEL_TIERS__"


def built_in(settings: Settings) -> list[Provider]:
    """The built-in providers with the operator's base URLs and limits.

    Raises:
        SetupError: The settings give a base URL or limits to a provider that is not built in.
    """
    ids = {provider.id for provider in BUILT_IN}
    known = ", ".join(sorted(ids))
    if unknown := settings.limits.keys() - ids:
        own = min(unknown)
        raise SetupError(
            f"BACKCHANNEL_LIMITS names '{own}', which is no built-in provider. Those are: {known}. "
            f"Those of one of your own are set by: backchannel providers edit {own}"
        )
    limits = {name: Limits(**own.model_dump()) for name, own in settings.limits.items()}
    moved = {name: own.base_url for name, own in settings.providers.items() if own.base_url}
    if unknown := moved.keys() - ids:
        raise SetupError(
            f"{variable(min(unknown), 'BASE_URL')} names no built-in provider. Those are: {known}. "
            "One of your own is added by: backchannel providers add"
        )
    return [
        replace(
            each,
            base_url=moved.get(each.id, each.base_url),
            limits=limits.get(each.id, each.limits),
        )
        for each in BUILT_IN
    ]


def build_registry(settings: Settings) -> Registry:
    """The registry before anybody has added a provider.

    Raises:
        SetupError: The settings name a provider that is not there.
    """
    return Registry(built_in(settings), settings)


_registry: tuple[int, Registry] | None = None


def get_registry(build: Callable[[Settings], Registry] = build_registry) -> Registry:
    """This process's registry: built at first use, and again after a fork."""
    global _registry
    pid = os.getpid()
    if _registry is None or _registry[0] != pid:
        _registry = (pid, build(get_settings()))
    return _registry[1]
