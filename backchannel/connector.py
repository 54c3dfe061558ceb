"""aiohttp's connections behind the egress guard: what was checked is what is connected to."""

from __future__ import annotations

import ipaddress
import socket
from contextvars import ContextVar
from typing import Any

from aiohttp import ClientRequest, TCPConnector
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.connector import Connection
from aiohttp.resolver import ThreadedResolver

from backchannel.egress import AllowedHosts, check_address, check_target, refuse

_target: ContextVar[tuple[str, int]] = ContextVar("egress_target")


class GuardedConnector(TCPConnector):
    """Refuses at the request, at the look-up and at the socket.

    Every request passes `connect`, also one that is given a connection from the pool, or that
    follows a redirect. Every look-up passes the resolver, which refuses a name if any of its
    addresses is refused, and whose numeric answer is connected to: a name that changes its mind
    in between changes nothing. Every socket passes `_socket`, with the address it is made for.
    """

    def __init__(
        self,
        allowed: AllowedHosts,
        *,
        loopback: bool = False,
        resolver: AbstractResolver | None = None,
        **options: Any,
    ) -> None:
        self._allowed = allowed
        self._loopback = loopback
        self._guarded = _GuardedResolver(resolver or ThreadedResolver(), self._check)
        super().__init__(resolver=self._guarded, socket_factory=self._socket, **options)

    async def connect(self, req: ClientRequest, traces: Any, timeout: Any) -> Connection:
        """See the class."""
        url = req.url
        if req.proxy is not None:
            refuse("No proxy stands between us and this URL: its addresses could not be checked.")
        host, port = url.raw_host or "", url.port
        check_target(url.scheme, host, port, self._allowed, loopback=self._loopback)
        token = _target.set((host, port or 0))
        try:
            return await super().connect(req, traces, timeout)
        finally:
            _target.reset(token)

    def _check(self, address: str, host: str, port: int) -> None:
        its = ipaddress.ip_address(address)
        check_address(its, host, port, self._allowed, loopback=self._loopback)

    def _socket(self, info: Any) -> socket.socket:
        family, kind, protocol, _, address = info
        self._check(address[0], *_target.get())
        return socket.socket(family=family, type=kind, proto=protocol)


class _GuardedResolver(AbstractResolver):
    def __init__(self, resolver: AbstractResolver, check: Any) -> None:
        self._resolver = resolver
        self._check = check

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        for each in found:
            self._check(each["host"], host, port)
        return found

    async def close(self) -> None:
        await self._resolver.close()
