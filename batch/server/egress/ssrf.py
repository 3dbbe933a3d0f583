"""The rules for URLs and addresses that the server may connect to, without network access.

Defines the addresses outside the public internet, the permitted ports and the spellings of an address.
`batch.server.egress.http_client` makes the requests.
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
"""Whether the server may connect to an address. The only place that decides it."""

URL_LIMIT = 8192
"""Maximum length of a URL in characters."""
_HOST = re.compile(r"[0-9A-Za-z._-]{1,253}")
_LOW_PORTS = frozenset({80, 443})
_OTHER_SERVICES = frozenset(
    {1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, *range(6665, 6670), 6679, 6697, 10080}
)
"""Blocked ports above 1023. Source: "bad ports" of the Fetch standard, autumn 2026."""


def _networks(text: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(map(ipaddress.ip_network, text.split()))


# Listed here, because `is_global` of `ipaddress` changes with Python's version.
_SPECIAL = _networks(
    "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24"
    " 192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3"
    " 2001::/23 2001:db8::/32 3fff::/20"
)
"""IANA's special-purpose addresses; for IPv6 only those inside 2000::/3."""
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_PRIVATE = _networks("10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 172.16.0.0/12 192.168.0.0/16 ::1/128 fc00::/7")
_METADATA = _networks("100.100.100.200/32 168.63.129.16/32 fd00:ec2::254/128 fd20:ce::254/128")
"""Cloud metadata services outside the link-local range (Alibaba, Azure, AWS, Google)."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class AddressRefused(ValueError):
    """The URL, or every address of its host, is not permitted.

    Args:
        reason: a clause about the URL, for a message.
        retryable: reported to the client; true for a host name, as for one that does not resolve. Otherwise a client
            could find out which names exist in the private network.
    """

    def __init__(self, reason: str, *, retryable: bool = False) -> None:
        super().__init__(reason)
        self.retryable = retryable


def public_only(address: Address) -> bool:
    """Permit addresses of the public internet. For an IPv4 address embedded in an IPv6 one, the former counts."""
    plain = _inner(address)
    if isinstance(plain, ipaddress.IPv6Address) and plain not in _GLOBAL_V6:
        return False
    return not _within(plain, _SPECIAL) and not _within(plain, _METADATA)


def private_too(address: Address) -> bool:
    """Permit loopback, private and carrier-grade NAT addresses too, but never link-local or metadata ones."""
    plain = _inner(address)
    return public_only(plain) or (_within(plain, _PRIVATE) and not _within(plain, _METADATA))


def address_rule(*, allow_private: bool) -> AddressRule:
    """Return the rule for `--allow-private`."""
    return private_too if allow_private else public_only


def check_url(url: str, permitted: AddressRule) -> URL:
    """Check a URL as far as possible without network access.

    A literal address in an old spelling (`2130706433`, `0x7f.1`, `0177.0.0.1`) is normalised.

    Raises:
        AddressRefused: scheme, port, credentials, host or literal address are not permitted.
    """
    if len(url) > URL_LIMIT:
        raise AddressRefused(f"its URL is longer than {URL_LIMIT} characters")
    try:
        target = URL(url)
        host, port = target.raw_host, target.port
    except ValueError:
        raise AddressRefused("it is not a URL") from None
    if target.scheme not in {"http", "https"} or not host:
        raise AddressRefused("only http and https URLs are supported")
    if target.raw_user is not None or target.raw_password is not None:
        raise AddressRefused("a URL with a user name or password is not permitted")
    if port is None or not (port in _LOW_PORTS or (port >= 1024 and port not in _OTHER_SERVICES)):
        raise AddressRefused(f"port {port} is not permitted")
    literal = literal_address(host)
    if literal is None:
        if not _HOST.fullmatch(host):
            raise AddressRefused("its host name is invalid")
        return target
    if not permitted(literal):
        raise AddressRefused(f"fetching from {literal} is not permitted here")
    return target.with_host(str(literal))


def literal_address(host: str) -> Address | None:
    """Parse a literal address, also in the spellings that C libraries accept.

    None for a name, and for an address with a zone, which is always link-local.
    """
    with suppress(ValueError):
        return ipaddress.ip_address(host) if "%" not in host else None
    with suppress(OSError):
        return ipaddress.IPv4Address(socket.inet_aton(host)) if _HOST.fullmatch(host) else None
    return None


def _inner(address: Address) -> Address:
    """Return the IPv4 address inside a mapped, 6to4 or NAT64 address; any other address unchanged."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _within(address: Address, networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]) -> bool:
    return any(address in network for network in networks)
