"""One SDK client per (provider id, key, base URL): found again, bounded, closed when unused."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import ssl
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import httpx2

from backchannel.egress import AllowedHosts, guarded_connector
from backchannel.errors import ProviderKeyMissing
from backchannel.garbage import settle
from backchannel.registry import Provider
from backchannel.settings import Settings
from workers.circuit import Circuit
from workers.endpoint import Endpoint
from workers.keys import Keys

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic
    from openai import AsyncOpenAI

MAX_CLIENTS = 32  # providers times keys of one process; each holds a connection pool
CONNECT_S = 15.0  # TCP and TLS
RESOLVE_AND_CONNECT_S = 30.0  # and the name before it
MAX_CONNECTIONS = 10_000  # admission bounds the jobs in flight; the pool must not do it again
KEEP_ALIVE_S = 4.0  # below the 5 s of Node's servers, whose closing would race our next request
ERROR_BODY_CAP = 64 << 10  # of an error's body, which is read whole
NO_KEY = "no-key-needed"  # the SDKs insist on one; keyless servers ignore it

SDK = {"openai-compatible": "openai", "anthropic": "anthropic"}
# What a first call would import, the resources that the SDKs load lazily included.
SDK_MODULES = {
    "openai": ("openai",),
    "anthropic": ("anthropic",),
}


def _import(modules: tuple[str, ...]) -> None:
    for module in modules:
        importlib.import_module(module)
    settle()


class _Key(NamedTuple):
    provider_id: str
    key_hash: str
    base_url: str


def _key(provider: Provider, secret: str) -> _Key:
    return _Key(provider.id, hashlib.sha256(secret.encode()).hexdigest(), provider.base_url)


@dataclass(slots=True)
class _Entry:
    client: Endpoint
    users: int = 0
    retired: bool = False


class ClientCache:
    """The SDK clients of one process, on one event loop.

    A client lives while it is among the `MAX_CLIENTS` used last or a stream still runs on it. Its
    base URL and key never change: new ones make a new client beside the old one.
    """

    def __init__(self, settings: Settings, max_clients: int = MAX_CLIENTS) -> None:
        self.keys = Keys(settings)
        self._settings = settings
        self._max_clients = max_clients
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._retired: list[_Entry] = []
        self._circuits: dict[_Key, Circuit] = {}
        self._imports: dict[str, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, provider: Provider) -> Endpoint | None:
        """The client of a provider, None for echo. Calls are made under `use`, which keeps it open.

        Raises:
            ProviderKeyMissing: The provider needs a key that is not set.
        """
        entry = self._entry(provider)
        return entry.client if entry else None

    @asynccontextmanager
    async def use(self, provider: Provider) -> AsyncGenerator[Endpoint | None]:
        """The client of a provider, open until the block ends even if it is evicted meanwhile.

        Raises:
            ProviderKeyMissing: The provider needs a key that is not set.
        """
        await self.prepare(provider)
        entry = self._entry(provider)
        if entry is None:
            yield None
            return
        entry.users += 1
        try:
            yield entry.client
        finally:
            entry.users -= 1
            await self._close_unused()

    async def prepare(self, provider: Provider) -> None:
        """Have a call of a provider be made at once: its SDK is there."""
        if sdk := SDK.get(provider.type):
            await self._imported(sdk)

    def circuit(self, provider: Provider) -> Circuit:
        """The circuit of a provider's endpoint; other keys and addresses have their own.

        It outlives its client, which may be evicted while nobody calls, and needs no SDK.
        """
        secret = None
        with suppress(ProviderKeyMissing):  # the call itself says so
            secret = self.keys.get(provider)
        key = _key(provider, secret or NO_KEY)
        if key not in self._circuits:
            name = f"Provider '{provider.id}' at {provider.base_url}"
            settings = self._settings
            self._circuits[key] = Circuit(name, settings.circuit_failures, settings.circuit_open_s)
        return self._circuits[key]

    async def _imported(self, sdk: str) -> None:
        """Import an SDK in a thread: 1-2 s and more, in which other streams and heartbeats go on.

        Every job waits for the same import. Asking `sys.modules` is not enough: a half-imported SDK
        stands there already, and touching it would block the loop on the import lock.
        """
        if sdk not in self._imports:
            loading = asyncio.to_thread(_import, SDK_MODULES[sdk])
            self._imports[sdk] = asyncio.create_task(loading, name=f"import-{sdk}")
        await asyncio.shield(self._imports[sdk])

    async def reset(self, provider_id: str) -> None:
        """Forget a provider's clients: its key or address changed. Running streams finish."""
        for key in [key for key in self._entries if key.provider_id == provider_id]:
            self._retire(key)
        for key in [key for key in self._circuits if key.provider_id == provider_id]:
            del self._circuits[key]
        await self._close_unused()

    async def aclose(self) -> None:
        """Close every client, also those in use: the process ends."""
        for key in list(self._entries):
            self._retire(key)
        for entry in self._retired:
            entry.users = 0
        await self._close_unused()

    def _entry(self, provider: Provider) -> _Entry | None:
        if provider.type == "echo":
            return None
        secret = self.keys.get(provider) or NO_KEY
        key = _key(provider, secret)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(self._make(provider, secret))
            while len(self._entries) > self._max_clients:
                self._retire(next(iter(self._entries)))
        self._entries.move_to_end(key)
        return entry

    def _make(self, provider: Provider, secret: str) -> Endpoint:
        http = _http(provider.type)
        if not provider.builtin:
            allowed = AllowedHosts.parse(self._settings.egress_allow)
            _guard(http, allowed, loopback=provider.allow_loopback)
        if provider.type == "anthropic":
            return Endpoint(
                _anthropic(provider.base_url, secret, http), http, "/v1/messages", "/v1/models"
            )
        return Endpoint(
            _openai(provider.base_url, secret, http), http, "/chat/completions", "/models"
        )

    def _retire(self, key: _Key) -> None:
        entry = self._entries.pop(key)
        entry.retired = True
        self._retired.append(entry)

    async def _close_unused(self) -> None:
        unused = [entry for entry in self._retired if entry.users == 0]
        # removed before the first await, so no two callers close the same client
        self._retired = [entry for entry in self._retired if entry.users > 0]
        for entry in unused:
            await entry.client.close()


def _http(kind: str) -> httpx2.AsyncClient:
    if kind == "anthropic":
        from anthropic import DefaultAioHttpClient as AnthropicHttp

        return AnthropicHttp(**_transport())
    from openai import DefaultAioHttpClient as OpenAIHttp

    return OpenAIHttp(**_transport())


def _openai(base_url: str, key: str, http: httpx2.AsyncClient) -> AsyncOpenAI:
    from openai import AsyncOpenAI

    client = AsyncOpenAI(
        api_key=key,
        base_url=base_url,
        max_retries=0,
        timeout=_timeout(),
        http_client=http,
    )
    # None and {} as arguments mean "look into the environment": OPENAI_ORG_ID, OPENAI_PROJECT_ID
    # and OPENAI_CUSTOM_HEADERS would go to whatever server this is.
    client.organization = None
    client.project = None
    client._custom_headers = {}
    return client


def _anthropic(base_url: str, key: str, http: httpx2.AsyncClient) -> AsyncAnthropic:
    from anthropic import AsyncAnthropic

    client = AsyncAnthropic(
        api_key=key,
        base_url=base_url,
        max_retries=0,
        timeout=_timeout(),
        open_telemetry=False,  # the engine has a span of its own for the call
        http_client=http,
    )
    client._custom_headers = {}  # ANTHROPIC_CUSTOM_HEADERS, as above
    return client


def _guard(http: httpx2.AsyncClient, allowed: AllowedHosts, *, loopback: bool) -> None:
    """Have a client connect where a custom provider may be, and nowhere else."""

    def session() -> aiohttp.ClientSession:
        connector = guarded_connector(
            allowed,
            loopback=loopback,
            limit=MAX_CONNECTIONS,
            keepalive_timeout=KEEP_ALIVE_S,
            ssl=_tls(),
        )
        return aiohttp.ClientSession(connector=connector)

    transport: Any = http._transport
    transport.client = session  # asked at the first request, as the transport would make its own


def _timeout() -> httpx2.Timeout:
    """No read timeout: keep-alive comments defeat it, and the engine watches the content itself."""
    return httpx2.Timeout(None, connect=CONNECT_S, pool=RESOLVE_AND_CONNECT_S)


def _transport() -> dict[str, Any]:
    return {
        "timeout": _timeout(),
        "limits": httpx2.Limits(max_connections=MAX_CONNECTIONS, keepalive_expiry=KEEP_ALIVE_S),
        "follow_redirects": False,
        "trust_env": False,
        "verify": _tls(),
        "event_hooks": {"response": [_cap_error_body]},
    }


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    """One TLS context for all: loading the certificates takes tens of milliseconds.

    Proxies of the environment are refused, its certificates (SSL_CERT_FILE) are not: a company's
    own authority is the operator's word about this machine.
    """
    return httpx2.create_ssl_context()


class _Capped(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = ERROR_BODY_CAP
        async for chunk in self._stream:
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                return

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _cap_error_body(response: httpx2.Response) -> None:
    if not response.is_success and isinstance(response.stream, httpx2.AsyncByteStream):
        response.stream = _Capped(response.stream)
