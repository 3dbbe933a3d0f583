"""HTTP sessions of the client's side. All connections of a run are opened here, by the same rules.

Proxies are those of the environment (`HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`, `NO_PROXY`), on macOS and Windows those
of the system where the environment names none. This machine itself is always reached directly. aiohttp's own
`trust_env` is not used: it asks at each request, sends loopback through the proxy too, and reads `.netrc`, whose
password it sends to the host, or refuses a request with our key for it.

No cookies are kept, redirects are not followed, and bodies are neither asked for compressed nor unpacked: no small body
becomes a large one. Certificates are checked against the system's, or those of `SSL_CERT_FILE`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Self
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from batch.errors import ConfigError
from batch.fal import protocol
from batch.system.http_session import open_session

__all__ = ["Http", "Proxies", "within"]

CONNECT_TIMEOUT = 10.0
"""Seconds until a connection stands; nothing of the request was sent before."""
DIAL_SECONDS = 30.0
"""The same with the look-up of the name, which has no limit of its own."""
KEEP_ALIVE = 8.0
"""Seconds that an idle connection is kept: well under what servers and balancers keep (15 - 75 s). A server
that closes one just as a submit is written would leave that submit's outcome unknown."""
_NAMES_SECONDS = 60
"""For so long a host's addresses are remembered."""


def within(seconds: float | None, silence: float | None = None) -> aiohttp.ClientTimeout:
    """The limits of one exchange: from its start to its end, and without a byte."""
    return aiohttp.ClientTimeout(total=seconds, connect=DIAL_SECONDS, sock_connect=CONNECT_TIMEOUT, sock_read=silence)


class Http:
    """One session; an async context manager.

    Args:
        limit: connections at once. Idle ones are not counted: to each host as many may be kept.
        timeout: of an exchange that names no other.
        user_agent: what is sent as such.
        headers: sent with every request.
        keep: whether idle connections are kept for the next request.
    """

    def __init__(
        self,
        *,
        limit: int,
        timeout: aiohttp.ClientTimeout,
        user_agent: str = "restyle",
        headers: Mapping[str, str] | None = None,
        keep: bool = True,
    ) -> None:
        self._limit, self._timeout, self._keep = limit, timeout, keep
        self._headers = {"user-agent": user_agent, **(headers or {})}
        self._proxies = Proxies()
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"<Http limit={self._limit}>"

    async def __aenter__(self) -> Self:
        keeping: dict[str, Any] = {"keepalive_timeout": KEEP_ALIVE} if self._keep else {"force_close": True}
        connector = aiohttp.TCPConnector(limit=self._limit, ttl_dns_cache=_NAMES_SECONDS, **keeping)
        self._session = open_session(connector, self._timeout, self._headers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    def request(self, method: str, url: str, **options: Any) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """One exchange; the options are aiohttp's `headers`, `data` and `timeout`.

        Raises:
            aiohttp.ClientError, TimeoutError, OSError: it failed. aiohttp.InvalidURL: also for a proxy of no use.
        """
        assert self._session is not None, "use `async with Http(...)`"
        return self._session.request(method, url, allow_redirects=False, proxy=self._proxies.of(url), **options)


class Proxies:
    """What the environment says, asked once for each origin."""

    def __init__(self) -> None:
        self._known: dict[str, URL | None] = {}

    def of(self, url: str) -> URL | None:
        """The proxy for a URL, with its credentials if it has any; None: it is reached directly.

        Raises:
            aiohttp.InvalidURL: the proxy is of no use.
        """
        origin = "/".join(url.split("/", 3)[:3])
        if origin not in self._known:
            try:
                self._known[origin] = _proxy_of(origin)
            except ConfigError:
                raise aiohttp.InvalidURL(origin, "its proxy cannot be used") from None
        return self._known[origin]

    def check(self, url: str) -> None:
        """Refuse a proxy that cannot be used, before anything is sent to this URL.

        Raises:
            ConfigError: where it stands and what is wrong, without its value: there may be a password in it.
        """
        _proxy_of(url)


def _proxy_of(url: str) -> URL | None:
    scheme, host, port = protocol.origin_of(url)
    if not host or _is_here(host):
        return None
    proxies = getproxies()
    variable = scheme if proxies.get(scheme) else "all"
    proxy = proxies.get(variable)
    # With its port, as an exception for one port names it; urllib looks for the host alone, too.
    if not proxy or proxy_bypass(f"{host}:{port}") or _in_networks(host, proxies.get("no", "")):
        return None
    return _usable(proxy, f"{variable.upper()}_PROXY", host)


def _usable(proxy: str, variable: str, host: str) -> URL:
    try:
        url = URL(proxy if "://" in proxy else f"http://{proxy}")
    except ValueError:
        url = URL()
    if url.scheme.startswith("socks"):
        raise ConfigError(
            f"{variable} names a SOCKS proxy, which restyle cannot use; name one that begins with http://, or add"
            f" {host} to NO_PROXY"
        )
    if url.scheme not in {"http", "https"} or not url.host:
        raise ConfigError(
            f"{variable} is not the address of a proxy; write it as http://host:port or http://user:password@host:port,"
            " with %23 for # and %2F for / in a password"
        )
    return url


def _is_here(host: str) -> bool:
    """Whether it is this machine, by whatever name."""
    host = host.rstrip(".")
    if host.endswith(".localhost") or protocol.is_loopback(host):
        return True
    address = _address(host)
    mapped = getattr(address, "ipv4_mapped", None)
    return address is not None and (address.is_unspecified or (mapped is not None and mapped.is_loopback))


def _in_networks(host: str, exceptions: str) -> bool:
    """Whether an address lies in one of the networks that `NO_PROXY` lists, as in 10.0.0.0/8."""
    address = _address(host)
    if address is None:
        return False
    for part in exceptions.split(","):
        try:
            network = ipaddress.ip_network(part.strip(), strict=False)
        except ValueError:
            continue
        if address.version == network.version and address in network:
            return True
    return False


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
