"""HTTP sessions of the client side. Every connection of a run is opened here, by the same rules.

Proxies come from the environment (`HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`, `NO_PROXY`), on macOS and Windows from the
system if the environment names none. The local machine is always reached directly. aiohttp's own `trust_env` is not
used: it looks proxies up for each request, sends loopback through the proxy too, and reads `.netrc`, whose password it
sends to the host, or refuses a request that already has our key.

Cookies are not kept and redirects are not followed. Compressed bodies are neither requested nor unpacked, so a small
body cannot become a large one. Certificates are checked against the system's, or those of `SSL_CERT_FILE`.
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
"""Seconds for establishing a connection; nothing of the request is sent before."""
DIAL_SECONDS = 30.0
"""The same including the DNS look-up, which has no limit of its own."""
KEEP_ALIVE = 8.0
"""Seconds that an idle connection is kept: well below the 15 to 75 s of servers and load balancers. A server that
closes a connection just as a submit is written would leave the outcome of that submit unknown."""
_NAMES_SECONDS = 60
"""Lifetime of cached DNS answers."""


def within(seconds: float | None, silence: float | None = None) -> aiohttp.ClientTimeout:
    """Return the timeouts of one exchange: total, and without a byte."""
    return aiohttp.ClientTimeout(total=seconds, connect=DIAL_SECONDS, sock_connect=CONNECT_TIMEOUT, sock_read=silence)


class Http:
    """One session; an async context manager.

    Args:
    limit: maximum concurrent connections. Idle ones do not count: as many may be kept to each host.
    timeout: default for exchanges without their own.
    user_agent: the `User-Agent` header.
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
        """Do one exchange; the options are aiohttp's `headers`, `data` and `timeout`.

        Raises:
            aiohttp.ClientError, TimeoutError, OSError: it failed. aiohttp.InvalidURL: also for an unusable proxy.
        """
        assert self._session is not None, "use `async with Http(...)`"
        return self._session.request(method, url, allow_redirects=False, proxy=self._proxies.of(url), **options)


class Proxies:
    """Proxies of the environment, looked up once per origin."""

    def __init__(self) -> None:
        self._known: dict[str, URL | None] = {}

    def of(self, url: str) -> URL | None:
        """Return the proxy for a URL, with its credentials if it has any; None: no proxy.

        Raises:
            aiohttp.InvalidURL: the proxy is unusable.
        """
        origin = "/".join(url.split("/", 3)[:3])
        if origin not in self._known:
            try:
                self._known[origin] = _proxy_of(origin)
            except ConfigError:
                raise aiohttp.InvalidURL(origin, "its proxy cannot be used") from None
        return self._known[origin]

    def check(self, url: str) -> None:
        """Refuse an unusable proxy before anything is sent to this URL.

        Raises:
            ConfigError: names the variable and the fault, without the value, which may contain a password.
        """
        _proxy_of(url)


def _proxy_of(url: str) -> URL | None:
    scheme, host, port = protocol.origin_of(url)
    if not host or _is_here(host):
        return None
    proxies = getproxies()
    variable = scheme if proxies.get(scheme) else "all"
    proxy = proxies.get(variable)
    # With the port, because an exception may name one; urllib also checks the host alone.
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
            f"{variable} names a SOCKS proxy, which is not supported; use an http:// proxy, or add {host} to NO_PROXY"
        )
    if url.scheme not in {"http", "https"} or not url.host:
        raise ConfigError(
            f"{variable} is not the address of a proxy; use http://host:port or http://user:password@host:port, with"
            " %23 for # and %2F for / in a password"
        )
    return url


def _is_here(host: str) -> bool:
    """Return whether the host is this machine, under any name."""
    host = host.rstrip(".")
    if host.endswith(".localhost") or protocol.is_loopback(host):
        return True
    address = _address(host)
    mapped = getattr(address, "ipv4_mapped", None)
    return address is not None and (address.is_unspecified or (mapped is not None and mapped.is_loopback))


def _in_networks(host: str, exceptions: str) -> bool:
    """Return whether an address belongs to a network listed in `NO_PROXY`, such as 10.0.0.0/8."""
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
