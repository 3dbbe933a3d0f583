"""Which URLs and addresses the server may ask: the judgement alone, without asking anybody.

Owns the table of addresses that do not belong to the public internet, the ports that web servers use, and the ways to
spell an address. Whoever makes a request is the guard (`batch.server.egress.http_client`).
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

from yarl import URL

__all__ = [
    "Address",
    "AddressRefused",
    "AddressRule",
    "address_rule",
    "check_url",
    "literal_address",
    "private_too",
    "public_only",
]

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
AddressRule: TypeAlias = Callable[[Address], bool]
"""Whether an address may be asked. The one place that decides it."""

URL_LIMIT = 8192
"""Characters."""
_HOST = re.compile(r"[0-9A-Za-z._-]{1,253}")
_LOW_PORTS = frozenset({80, 443})
_OTHER_SERVICES = frozenset(
    {1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, *range(6665, 6670), 6679, 6697, 10080}
)
"""Ports above 1023 that browsers refuse too (the Fetch standard's "bad ports", read in autumn 2026)."""


def _networks(text: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(map(ipaddress.ip_network, text.split()))


# Written out rather than asked of `ipaddress`, whose idea of "global" changes with Python's version.
_SPECIAL = _networks(
    "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24"
    " 192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3"
    " 2001::/23 2001:db8::/32 3fff::/20"
)
"""IANA's registries of special addresses; of IPv6 only what lies inside 2000::/3."""
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_PRIVATE = _networks("10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 172.16.0.0/12 192.168.0.0/16 ::1/128 fc00::/7")
_METADATA = _networks("100.100.100.200/32 168.63.129.16/32 fd00:ec2::254/128 fd20:ce::254/128")
"""Clouds' metadata services that lie outside of the link-local range (Alibaba, Azure, AWS, Google)."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class AddressRefused(ValueError):
    """The URL, or every address behind it, may not be asked.

    Args:
        reason: half a sentence.
        retryable: what the caller is told; true where a name is at fault, as for one that does not resolve: otherwise
            the two could be told apart, and names of our own network be guessed.
    """

    def __init__(self, reason: str, *, retryable: bool = False) -> None:
        super().__init__(reason)
        self.retryable = retryable


def public_only(address: Address) -> bool:
    """The strict rule: addresses of the public internet. An IPv4 address inside of an IPv6 one is judged itself."""
    plain = _inner(address)
    if isinstance(plain, ipaddress.IPv6Address) and plain not in _GLOBAL_V6:
        return False
    return not _within(plain, _SPECIAL) and not _within(plain, _METADATA)


def private_too(address: Address) -> bool:
    """For tests and closed networks: loopback, private and carrier-grade ranges too; never link-local or metadata."""
    plain = _inner(address)
    return public_only(plain) or (_within(plain, _PRIVATE) and not _within(plain, _METADATA))


def address_rule(*, allow_private: bool) -> AddressRule:
    """The rule that `--allow-private` chooses."""
    return private_too if allow_private else public_only


def check_url(url: str, permitted: AddressRule) -> URL:
    """Everything about a URL that can be judged without asking the network.

    An address in one of its older spellings (`2130706433`, `0x7f.1`, `0177.0.0.1`) comes back in the usual one.

    Raises:
        Refused: scheme, port, credentials, host or literal address.
    """
    if len(url) > URL_LIMIT:
        raise AddressRefused(f"its URL is longer than {URL_LIMIT} characters")
    try:
        target = URL(url)
        host, port = target.raw_host, target.port
    except ValueError:
        raise AddressRefused("it is not a URL") from None
    if target.scheme not in {"http", "https"} or not host:
        raise AddressRefused("only http and https URLs can be asked")
    if target.raw_user is not None or target.raw_password is not None:
        raise AddressRefused("a URL with a user name or password in it is not asked")
    if port is None or not (port in _LOW_PORTS or (port >= 1024 and port not in _OTHER_SERVICES)):
        raise AddressRefused(f"port {port} is not one that web servers use")
    literal = literal_address(host)
    if literal is None:
        if not _HOST.fullmatch(host):
            raise AddressRefused("its host is not a name")
        return target
    if not permitted(literal):
        raise AddressRefused(f"fetching from {literal} is not permitted here")
    return target.with_host(str(literal))


def literal_address(host: str) -> Address | None:
    """The address that a host spells, also in the forms that C libraries understand.

    None for a name, and for an address with a zone: that can only be one of our own links.
    """
    with suppress(ValueError):
        return ipaddress.ip_address(host) if "%" not in host else None
    with suppress(OSError):
        return ipaddress.IPv4Address(socket.inet_aton(host)) if _HOST.fullmatch(host) else None
    return None


def _inner(address: Address) -> Address:
    """The IPv4 address inside a mapped, 6to4 or NAT64 one; any other as it is."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _within(address: Address, networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]) -> bool:
    return any(address in network for network in networks)
