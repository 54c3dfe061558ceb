"""The egress guard: the rules in words, and a listener on loopback that nothing may reach."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from backchannel.egress import AllowedHosts, check_address, check_url, guarded_connector
from backchannel.errors import InvalidRequest, SetupError
from tests.backchannel.egress_corpus import NEVER, OPEN, REFUSED

NOTHING = AllowedHosts()
# a real connection would be made to an address
OPEN_NAMES = [url for url in OPEN if not url.startswith(("https://1.", "https://["))]
EVERYTHING = AllowedHosts.parse("0.0.0.0/0, ::/0, loopback")


class Listener:
    """Counts connections and the requests on them; answers each with the next of `answers`."""

    def __init__(self) -> None:
        self.connections = 0
        self.requests: list[bytes] = []
        self.answers: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.requests.append(head)
                ok = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
                writer.write(self.answers.pop(0) if self.answers else ok)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def listener() -> AsyncIterator[tuple[Listener, int]]:
    """One on 127.0.0.1, with its port."""
    listening = Listener()
    server = await asyncio.start_server(listening.serve, "127.0.0.1", 0)
    async with server:
        yield listening, server.sockets[0].getsockname()[1]


class Names(AbstractResolver):
    """A name server of a test: each look-up of any name gives the next list of addresses."""

    def __init__(self, *answers: list[str]) -> None:
        self._answers = list(answers)
        self.asked = 0

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked += 1
        found = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return [
            ResolveResult(
                hostname=host, host=each, port=port, proto=0, flags=socket.AI_NUMERICHOST,
                family=socket.AF_INET6 if ":" in each else socket.AF_INET,
            )
            for each in found
        ]  # fmt: skip

    async def close(self) -> None:
        pass


def session(allowed: AllowedHosts = NOTHING, **options: Any) -> aiohttp.ClientSession:
    """As webhooks are sent with."""
    timeout = aiohttp.ClientTimeout(total=5)
    return aiohttp.ClientSession(connector=guarded_connector(allowed, **options), timeout=timeout)


async def refused(calling: aiohttp.ClientSession, url: str, **options: Any) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await calling.get(url, **options)
    assert refusal.value.code == "egress_refused"


# ---------------------------------------------------------------- the corpus


def test_the_corpus_is_large_enough() -> None:
    assert len(set(REFUSED)) + len(set(NEVER)) >= 140


@pytest.mark.parametrize("url", [*REFUSED, *NEVER])
def test_what_is_not_public_https_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        check_url(url.replace("{port}", "8443"), NOTHING)
    assert refusal.value.code == "egress_refused"


@pytest.mark.parametrize("url", NEVER)
def test_metadata_and_link_local_stay_closed_whatever_is_allowed(url: str) -> None:
    with pytest.raises(InvalidRequest):
        check_url(url, EVERYTHING, loopback=True)


@pytest.mark.parametrize("url", OPEN)
def test_public_https_is_open(url: str) -> None:
    check_url(url, NOTHING)


async def test_nothing_of_the_corpus_reaches_loopback(listener: tuple[Listener, int]) -> None:
    listening, port = listener
    async with session(resolver=Names(["127.0.0.1"])) as calling:
        for url in [*REFUSED, *NEVER, *OPEN_NAMES]:
            with pytest.raises((InvalidRequest, aiohttp.ClientError, ValueError, AssertionError)):
                await calling.get(url.replace("{port}", str(port)), ssl=False)
    assert listening.connections == 0


async def test_without_the_guard_it_would_be_reached(listener: tuple[Listener, int]) -> None:
    listening, port = listener
    connector = aiohttp.TCPConnector(resolver=Names(["127.0.0.1"]))
    reaching = ("https://127.0.0.1", "https://localhost", "https://example.com", "http://")
    async with aiohttp.ClientSession(connector=connector) as calling:
        for url in REFUSED:
            if "{port}" in url and url.startswith(reaching):
                with contextlib.suppress(aiohttp.ClientError, ValueError, OSError):
                    here = url.replace("{port}", str(port)).replace("https://", "http://")
                    await calling.get(here)
    assert len(listening.requests) > 10


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["1.1.1.1", "127.0.0.1"],
        ["127.0.0.1", "2606:4700:4700::1111"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["169.254.169.254"],
        ["fe80::1%2"],
    ],
)
async def test_a_name_is_refused_for_any_of_its_addresses(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    gone_to = nowhere(monkeypatch)
    async with session(resolver=Names(addresses)) as calling:
        for port in (443, 8443):
            await refused(calling, f"https://rebind.example.com:{port}/")
    assert gone_to == []


def nowhere(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """From now on no connection of this loop is made; returns where they would have gone."""
    gone_to: list[Any] = []

    async def connect(_socket: socket.socket, address: Any) -> None:
        gone_to.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", connect)
    return gone_to


async def test_what_was_checked_is_what_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    gone_to = nowhere(monkeypatch)
    # public at the first look, loopback at every later one
    names = Names(["1.1.1.1"], ["127.0.0.1"])
    async with session(resolver=names, use_dns_cache=False) as calling:
        with pytest.raises(aiohttp.ClientConnectorError):
            await calling.get("https://flip.example.com/")
        await refused(calling, "https://flip.example.com/")
    assert gone_to == [("1.1.1.1", 443)]
    assert names.asked == 2


async def test_a_socket_is_made_for_no_other_address(monkeypatch: pytest.MonkeyPatch) -> None:
    gone_to = nowhere(monkeypatch)

    class Lying(Names):
        """Shows the guard one address and aiohttp another."""

        async def resolve(self, *args: Any, **named: Any) -> list[ResolveResult]:
            found = await super().resolve(*args, **named)

            class Twice(list[ResolveResult]):
                looked = 0

                def __iter__(self) -> Iterator[ResolveResult]:
                    Twice.looked += 1
                    host = "1.1.1.1" if Twice.looked == 1 else "127.0.0.1"
                    return iter([{**found[0], "host": host}])  # type: ignore[misc]

            return Twice(found)

    async with session(resolver=Lying(["1.1.1.1"]), use_dns_cache=False) as calling:
        with pytest.raises((InvalidRequest, aiohttp.ClientError)) as failure:
            await calling.get("https://lying.example.com/")
    assert "is not a public address" in str(failure.value)
    assert gone_to == []


# ---------------------------------------------------------------- redirects, reuse, proxies


async def test_a_redirect_is_a_request_like_any_other(listener: tuple[Listener, int]) -> None:
    listening, port = listener
    here = f"http://127.0.0.1:{port}"
    listening.answers = [
        f"HTTP/1.1 302 Found\r\nlocation: {where}\r\ncontent-length: 0\r\n\r\n".encode()
        for where in (f"http://localhost:{port}/", "http://169.254.169.254/", "http://[::1]:80/")
    ]
    async with session(AllowedHosts.parse(f"127.0.0.1:{port}")) as calling:
        for _ in range(3):
            await refused(calling, here)
    assert len(listening.requests) == 3  # the allowed ones


async def test_a_connection_that_is_kept_alive_is_checked_when_it_is_used_again(
    listener: tuple[Listener, int],
) -> None:
    listening, port = listener
    url = f"http://kept.example.com:{port}/"
    connector: Any = guarded_connector(
        AllowedHosts.parse(f"kept.example.com:{port}"), resolver=Names(["127.0.0.1"])
    )
    async with aiohttp.ClientSession(connector=connector) as calling:
        for _ in range(2):
            async with calling.get(url) as answer:
                await answer.read()
        assert (listening.connections, len(listening.requests)) == (1, 2)
        connector._allowed = NOTHING
        await refused(calling, url)
    assert len(listening.requests) == 2


async def test_no_proxy_stands_between(
    listener: tuple[Listener, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    listening, port = listener
    gone_to = nowhere(monkeypatch)
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    connector = guarded_connector(AllowedHosts.parse("127.0.0.1"))
    async with aiohttp.ClientSession(connector=connector, trust_env=True) as calling:
        await refused(calling, "https://example.com/")
        await refused(calling, "https://example.com/", proxy=f"http://127.0.0.1:{port}")
    assert (gone_to, listening.connections) == ([], 0)


# ---------------------------------------------------------------- what is allowed


@pytest.mark.parametrize(
    ("setting", "url"),
    [
        ("loopback", "http://127.0.0.1:11434/v1"),
        ("loopback", "http://localhost:11434/v1"),
        ("loopback", "http://[::1]:11434/v1"),
        ("ollama:11434", "http://ollama:11434/v1"),
        ("ollama", "http://OLLAMA:99/v1"),
        ("x.example.com, 10.0.0.0/8", "http://10.1.2.3:8080/"),
        ("10.1.2.3:8080", "http://10.1.2.3:8080/"),
        ("[fd12::1]:80", "http://[fd12::1]/"),
        ("fd12::/16", "https://[fd12::1]/"),
        ("example.com:9000", "https://example.com:9000/"),
        ("example.com", "http://example.com/"),
    ],
)
def test_the_operator_can_allow(setting: str, url: str) -> None:
    with pytest.raises(InvalidRequest, match="BACKCHANNEL_EGRESS_ALLOW="):
        check_url(url, NOTHING)
    check_url(url, AllowedHosts.parse(setting))


@pytest.mark.parametrize(
    ("setting", "url"),
    [
        ("ollama:11434", "http://ollama:11435/v1"),
        ("example.com", "http://www.example.com/"),
        ("example.com", "http://example.com.evil.com/"),
        ("10.1.2.3:8080", "http://10.1.2.3:8081/"),
        ("10.0.0.0/8", "http://11.0.0.1/"),
        ("localhost", "http://localhost.evil.com/"),
        ("loopback", "http://10.0.0.1/"),
        ("loopback", "http://localhost.evil.com/"),
    ],
)
def test_and_allows_that_and_no_more(setting: str, url: str) -> None:
    with pytest.raises(InvalidRequest):
        check_url(url, AllowedHosts.parse(setting))


@pytest.mark.parametrize(
    "setting",
    ["http://ollama", "ollama:0", "ollama:99999", "10.0.0.1/8", "169.254.169.254", "fe80::/10",
     "metadata.google.internal", "127.1", "a b", "*.example.com", "0x7f000001", "[::1"],
)  # fmt: skip
def test_an_entry_that_means_nothing_or_must_not_is_said(setting: str) -> None:
    with pytest.raises(SetupError, match="BACKCHANNEL_EGRESS_ALLOW"):
        AllowedHosts.parse(f"ollama, {setting}")


def test_loopback_can_be_allowed_by_the_caller_of_the_guard() -> None:
    check_url("http://127.0.0.1:8000/", NOTHING, loopback=True)
    check_url("http://localhost:8000/", NOTHING, loopback=True)
    for url in ("http://10.0.0.1/", "http://localhost.evil.com/", "http://ollama/"):
        with pytest.raises(InvalidRequest):
            check_url(url, NOTHING, loopback=True)
    with pytest.raises(InvalidRequest):  # a name that only resolves to it
        check_address(
            ipaddress.ip_address("127.0.0.1"), "evil.example.com", 443, NOTHING, loopback=True
        )


async def test_an_allowed_name_reaches_its_private_address(listener: tuple[Listener, int]) -> None:
    listening, port = listener
    allowed = AllowedHosts.parse(f"receiver:{port}")
    async with session(allowed, resolver=Names(["127.0.0.1"])) as calling:
        answer = await calling.get(f"http://receiver:{port}/")
        assert answer.status == 200
    assert len(listening.requests) == 1
    async with session(allowed, resolver=Names(["169.254.169.254"])) as calling:
        await refused(calling, f"http://receiver:{port}/")
