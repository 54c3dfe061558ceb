"""The egress guard: which hosts, ports and addresses a URL that somebody gave us may lead to.

Public https is open. Everything else, http, other ports, private addresses, is for the hosts that
the operator allowed (``BACKCHANNEL_EGRESS_ALLOW``). Link-local addresses and those of clouds'
metadata are closed whatever is allowed: what answers there hands out the machine's credentials.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from backchannel.errors import EgressRefused, SetupError

if TYPE_CHECKING:
    import aiohttp

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

SETTING = "BACKCHANNEL_EGRESS_ALLOW"
PUBLIC_PORTS = frozenset({443, 8443})


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


# Whatever is allowed. The clouds' metadata and platform addresses beyond link-local are those of
# AWS (fd00:ec2::254), Google (fd20:ce::254), Alibaba (100.100.100.200), Oracle (192.0.0.192) and
# Azure (168.63.129.16, in the middle of the public space).
_NEVER = _networks(
    "0.0.0.0/8", "169.254.0.0/16", "100.100.100.200/32", "192.0.0.192/32", "168.63.129.16/32",
    "224.0.0.0/4", "240.0.0.0/4", "::/128", "fd00:ec2::/32", "fd20:ce::254/128", "fe80::/10",
    "ff00::/8",
)  # fmt: skip
_NEVER_NAMES = frozenset(
    {
        "metadata", "metadata.google.internal", "metadata.goog", "metadata.azure.internal",
        "metadata.tencentyun.com", "instance-data", "instance-data.ec2.internal",
    }
)  # fmt: skip
# Not public, from the IANA registries of special-purpose addresses: a table of our own, because
# Python 3.11's is_global takes 192.0.0.0/24, 64:ff9b:1::/48 and others for public in some releases.
_PRIVATE = _networks(
    "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24",
    "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
    "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "2001::/23", "2001:db8::/32",
    "2002::/16", "2620:4f:8000::/48", "3fff::/20",
)  # fmt: skip
_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
_LOOPBACK = _networks("127.0.0.0/8", "::1/128")

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NAT64_LOCAL = ipaddress.IPv6Network("64:ff9b:1::/48")
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")
_ISATAP = frozenset({0x00005EFE, 0x02005EFE})  # the upper half of the interface id, RFC 5214

_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_NOT_PUBLIC_NAME = re.compile(r"[^.]+|.*\.(localhost|local|internal|home\.arpa)")
_PRINTABLE = re.compile(r"[\x21-\x7e]+")


def refuse(why: str, param: str | None = None) -> NoReturn:
    """Say no: the rule, and what would allow it."""
    raise EgressRefused(why, param=param)


# ---------------------------------------------------------------- what the operator allowed


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """Hosts and networks that may be private, speak http and listen anywhere; by port if given."""

    names: frozenset[tuple[str, int | None]] = frozenset()
    networks: tuple[tuple[Network, int | None], ...] = ()

    @classmethod
    def parse(cls, text: str) -> AllowedHosts:
        """Read the setting: ``host``, ``host:port``, address, CIDR or ``loopback``, with commas.

        Raises:
            SetupError: An entry is none of these, or names what is never allowed.
        """
        names: set[tuple[str, int | None]] = set()
        networks: list[tuple[Network, int | None]] = []
        for entry in filter(None, (part.strip().lower() for part in text.split(","))):
            if entry == "loopback":
                names.add(("localhost", None))
                networks += [(network, None) for network in _LOOPBACK]
                continue
            host, port = _entry(entry)
            try:
                network = ipaddress.ip_network(host)
            except ValueError:
                host = host.rstrip(".")
                last = host.rpartition(".")[2]
                if not _NAME.fullmatch(host) or _NUMBER.fullmatch(last) or host in _NEVER_NAMES:
                    _bad_entry(entry)
                names.add((host, port))
            else:
                if any(network.version == n.version and _within(network, n) for n in _NEVER):
                    _bad_entry(entry)
                networks.append((network, port))
        return cls(frozenset(names), tuple(networks))

    def has_name(self, host: str, port: int) -> bool:
        """Whether an entry names this host, for this port."""
        return (host, None) in self.names or (host, port) in self.names

    def has_address(self, address: Address, port: int) -> bool:
        """Whether an entry holds this address, for this port."""
        return any(address in network and its in (None, port) for network, its in self.networks)


def _entry(entry: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"\[([^\]]+)\](?::(\d{1,5}))?|([^:]+)(?::(\d{1,5}))?", entry)
    if found is None:
        return entry, None  # an IPv6 address or network without brackets
    port = found[2] or found[4]
    if port is not None and not 0 < int(port) < 65536:
        _bad_entry(entry)
    return found[1] or found[3], int(port) if port else None


def _bad_entry(entry: str) -> NoReturn:
    raise SetupError(
        f"{SETTING}: '{entry}' is not a host, host:port, address, network or loopback, or is one "
        "that is never allowed (link-local and metadata addresses)."
    )


def _within(inner: Network, outer: Network) -> bool:
    return inner[0] in outer and inner[-1] in outer


# ---------------------------------------------------------------- the rules


def check_url(url: str, allowed: AllowedHosts, *, loopback: bool = False) -> None:
    """Refuse a URL that we may not call. Names are not looked up: that is `GuardedConnector`'s.

    Args:
        loopback: This machine is allowed as well, with any port.

    Raises:
        EgressRefused: The rule, and what would allow it.
    """
    # whatever two parsers could read differently is refused before either of them reads it
    if not _PRINTABLE.fullmatch(url) or "\\" in url:
        refuse("Write the URL in plain ASCII, without blanks, control characters or backslashes.")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        refuse(f"It is not a URL: {error}.")
    if "@" in parts.netloc or "%" in parts.netloc:
        refuse("The URL must have no user, password or % before its path.")
    if parts.fragment:
        refuse("The URL must have no fragment (#).")
    if parts.netloc.startswith("[") != (":" in host):
        refuse("It is not a URL: a host in brackets is an IPv6 address.")
    check_target(parts.scheme, host, port, allowed, loopback=loopback)


def check_target(
    scheme: str, host: str, port: int | None, allowed: AllowedHosts, *, loopback: bool = False
) -> None:
    """`check_url` for a URL that was taken apart already."""
    if scheme not in ("http", "https"):
        refuse("The URL must begin with https://, or http:// where the host is allowed.")
    port = port if port is not None else 443 if scheme == "https" else 80
    address = _literal(host)
    if address is not None:
        check_address(address, host, port, allowed, loopback=loopback)
        open_ = _is_open(address, host, port, allowed, loopback=loopback)
    else:
        host = plain(host)
        if host in _NEVER_NAMES:
            refuse(f"'{host}' is a cloud's metadata service, which is never called.")
        open_ = allowed.has_name(host, port) or (loopback and host == "localhost")
        if not open_ and _NOT_PUBLIC_NAME.fullmatch(host):
            refuse(f"'{host}' is not a public host. {_would_allow(host, port)}")
    if not open_ and scheme != "https":
        refuse(f"http:// is for allowed hosts only; use https://. {_would_allow(host, port)}")
    if not open_ and port not in PUBLIC_PORTS:
        refuse(f"Port {port} is not open: 443 and 8443 are. {_would_allow(host, port)}")


def check_address(
    address: Address, host: str, port: int, allowed: AllowedHosts, *, loopback: bool = False
) -> None:
    """Refuse an address that a connection to this host may not go to.

    Raises:
        EgressRefused: As above.
    """
    for each in (address, *_embedded(address)):
        if any(each in network for network in _NEVER) or each.is_link_local:
            refuse(f"{_of(host, address)} is a link-local, metadata or reserved address: never.")
    if _is_open(address, host, port, allowed, loopback=loopback):
        return
    if not _is_public(address):
        refuse(f"{_of(host, address)} is not a public address. {_would_allow(host, port)}")


def plain(host: str) -> str:
    """A name as the rules compare it."""
    host = host.lower().rstrip(".")
    if len(host) > 253 or not _NAME.fullmatch(host):
        refuse("It is not a URL: its host is not a name. Write international names as xn--….")
    return host


def _literal(host: str) -> Address | None:
    """The address that a host is written as; None: it is a name.

    Raises:
        InvalidRequest: Another spelling of an address: decimal, octal, hexadecimal or short.
    """
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        last = host.lower().rstrip(".").rpartition(".")[2]
        if ":" in host or _NUMBER.fullmatch(last):
            refuse("Write an IP address plainly: four decimal numbers, or IPv6 in brackets.")
        return None


def _is_open(
    address: Address, host: str, port: int, allowed: AllowedHosts, *, loopback: bool
) -> bool:
    if loopback and any(address in network for network in _LOOPBACK):
        return _literal(host) is not None or plain(host) == "localhost"
    if allowed.has_address(address, port):
        return True
    return _literal(host) is None and allowed.has_name(plain(host), port)


def _is_public(address: Address) -> bool:
    inside = _embedded(address)
    if not all(map(_is_public, inside)):
        return False
    if inside and (address in _MAPPED or address in _NAT64):
        return True  # the same host in the words of IPv6
    if any(address in network for network in _PRIVATE) or not address.is_global:
        return False
    return address.version == 4 or address in _PUBLIC_IPV6


def _embedded(address: Address) -> tuple[ipaddress.IPv4Address, ...]:
    """The IPv4 addresses that an IPv6 address is another spelling of, or tunnels to."""
    if isinstance(address, ipaddress.IPv4Address):
        return ()
    if address.ipv4_mapped is not None:
        return (address.ipv4_mapped,)
    if address.sixtofour is not None:
        return (address.sixtofour,)
    if address.teredo is not None:
        return address.teredo
    number = int(address)
    if address in _NAT64 or address in _NAT64_LOCAL or (number >> 32) & 0xFFFFFFFF in _ISATAP:
        return (ipaddress.IPv4Address(number & 0xFFFFFFFF),)
    if address in _COMPATIBLE and number > 1:
        return (ipaddress.IPv4Address(number & 0xFFFFFFFF),)
    return ()


def _of(host: str, address: Address) -> str:
    return host if _literal(host) is not None else f"'{host}' resolves to {address}, which"


def _would_allow(host: str, port: int) -> str:
    entry = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"The operator can allow it with {SETTING}={entry}"


# ---------------------------------------------------------------- at the connect


def guarded_connector(
    allowed: AllowedHosts, *, loopback: bool = False, **options: Any
) -> aiohttp.TCPConnector:
    """Connections of aiohttp that are checked when they are made; ``options`` are its own.

    Raises:
        EgressRefused: From a request, before anything is sent.
    """
    from backchannel.connector import GuardedConnector  # aiohttp takes 0.2 s to import

    return GuardedConnector(allowed, loopback=loopback, **options)
