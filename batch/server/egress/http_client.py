"""HTTP client with protection against SSRF; the server makes every outgoing request with it.

Limits schemes, ports, addresses, redirects, size and time. A host name is resolved once per connection; the resolved
addresses are checked, and only checked addresses are connected to. Error messages are safe to show to the client that
sent the URL: they do not distinguish a host that does not resolve from one in a private network, and contain no address
that was not in the URL.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from batch.server.egress.ssrf import AddressRefused, AddressRule, check_url, literal_address, public_only
from batch.system.descriptors import lacks_descriptor
from batch.system.http_session import open_session

__all__ = [
    "FetchLimits",
    "Lookup",
    "ResponseTooLarge",
    "SafeHttpClient",
    "Unreachable",
]

Lookup: TypeAlias = Callable[[str], Awaitable[list[str]]]
"""Resolves a host name to numeric addresses; raises OSError without any."""

CONNECT_SECONDS = 10.0
REQUESTS = 100
"""Maximum number of concurrent requests."""
_LOOKUP_THREADS = 16
"""Separate threads for lookups: a slow one must not block file access."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NO_ADDRESS = "its host has no address that this server may connect to"


class Unreachable(Exception):
    """The request failed, or its response is unusable.

    Args:
        reason: a clause about the URL ("its server ..."), for a message.
        retryable: whether a retry may succeed.
    """

    def __init__(self, reason: str, *, retryable: bool) -> None:
        super().__init__(reason)
        self.retryable = retryable


class ResponseTooLarge(Exception):
    """The body is larger than the limit, before or after decompression."""


class FetchLimits(NamedTuple):
    """Limits of one fetch, including its redirects."""

    size_bytes: int
    seconds: float
    redirects: int = 5


class SafeHttpClient:
    """Makes requests to addresses that the rule permits; an async context manager.

    Args:
        permitted: the rule for addresses.
        lookup: resolves host names; None: the system's resolver.
        limit: maximum number of concurrent requests; the time that a request waits for its turn does not count.
    """

    def __init__(
        self, permitted: AddressRule = public_only, lookup: Lookup | None = None, limit: int = REQUESTS
    ) -> None:
        self.permitted = permitted
        self._limit, self._free = limit, asyncio.Semaphore(limit)
        self._threads = ThreadPoolExecutor(min(limit, _LOOKUP_THREADS), "lookup")
        self._lookup = lookup or partial(_system_lookup, self._threads)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, url: str, limits: FetchLimits) -> bytes:
        """Fetch a URL and return the body. Redirects are followed; each one is checked like the first URL.

        Raises:
            AddressRefused: the URL, or one that it redirects to, is not permitted.
            Unreachable: no response, an invalid one, or a status other than 200.
            ResponseTooLarge: the body exceeds `limits.size_bytes`.
            OSError: no file descriptor is free (`lacks_descriptor`).
        """
        target = check_url(url, self.permitted)
        with _translated():
            async with self._free, asyncio.timeout(limits.seconds):
                for _ in range(limits.redirects + 1):
                    async with self._client().get(target, allow_redirects=False) as response:
                        if response.status in _REDIRECTS and "location" in response.headers:
                            target = self._next(target, response.headers["location"])
                            continue
                        return await _body(response, limits.size_bytes)
        raise Unreachable(f"it redirects more than {limits.redirects} times", retryable=False)

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], seconds: float) -> int:
        """Post a body and return the status of the response, without reading its body or following redirects.

        Raises:
            AddressRefused: the URL is not permitted.
            Unreachable: no response within `seconds`, or an invalid one.
            OSError: no file descriptor is free (`lacks_descriptor`).
        """
        target = check_url(url, self.permitted)
        with _translated():
            async with self._free, asyncio.timeout(seconds):
                response = await self._client().post(target, data=body, headers=headers, allow_redirects=False)
                response.close()
        return response.status

    def _next(self, target: URL, location: str) -> URL:
        try:
            joined = str(target.join(URL(location)))
        except ValueError:
            raise AddressRefused("it redirects to an invalid URL") from None
        try:
            return check_url(joined, self.permitted)
        except AddressRefused:
            raise AddressRefused("it redirects to a URL that is not permitted here") from None

    def _client(self) -> aiohttp.ClientSession:
        # Created on first use: many servers only ever use files that they store themselves.
        if self._session is None:
            connector = aiohttp.TCPConnector(
                resolver=_Resolver(self._lookup, self.permitted),
                use_dns_cache=False,
                limit=self._limit,
                force_close=self._limit < REQUESTS,  # few descriptors: keep no idle connection
                socket_factory=partial(_checked_socket, self.permitted),
            )
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
            self._session = open_session(connector, timeout, {"accept": "*/*"})
        return self._session


class _NotPermitted(PermissionError):
    """The address is not permitted. An OSError, so that aiohttp handles it as a failed lookup or connection."""

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "not permitted")


class _Resolver(AbstractResolver):
    """Resolves a host name when connecting and returns only permitted addresses."""

    def __init__(self, lookup: Lookup, permitted: AddressRule) -> None:
        self._lookup = lookup
        self._permitted = permitted

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,  # noqa: ARG002 - the connector passes both
    ) -> list[ResolveResult]:
        found = [address for text in await self._lookup(host) if (address := literal_address(text)) is not None]
        allowed = [address for address in dict.fromkeys(found) if self._permitted(address)]
        if not allowed:
            raise _NotPermitted if found else OSError(errno.EADDRNOTAVAIL, "no address")
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in allowed
        ]

    async def close(self) -> None:
        """Do nothing: there is nothing to release."""


def _checked_socket(permitted: AddressRule, info: tuple[Any, ...]) -> socket.socket:
    """Create a socket after a final check of the address that it connects to."""
    family, kind, protocol, _, address = info
    literal = literal_address(address[0])
    if literal is None or not permitted(literal):
        raise _NotPermitted
    return socket.socket(family, kind, protocol)


async def _system_lookup(threads: ThreadPoolExecutor, host: str) -> list[str]:
    return await asyncio.get_running_loop().run_in_executor(threads, _looked_up, host)


def _looked_up(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        # The error does not say if a descriptor was missing; opening a file raises EMFILE in that case.
        os.close(os.open(os.devnull, os.O_RDONLY))
        raise
    return [str(entry[4][0]) for entry in found]


async def _body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    if response.status != 200:
        retryable = response.status >= 500 or response.status in {408, 429}
        raise Unreachable(f"its server returned status {response.status}", retryable=retryable)
    packing = response.headers.get("content-encoding", "identity").strip().lower()
    if packing not in {"", "identity", "gzip", "x-gzip", "deflate"}:
        raise Unreachable(f"its server used the unrequested content-encoding {packing[:20]}", retryable=False)
    if (response.content_length or 0) > limit:
        raise ResponseTooLarge
    unpacker = zlib.decompressobj(wbits=47) if packing not in {"", "identity"} else None
    data = bytearray()
    async for chunk in response.content.iter_any():
        if unpacker is None:
            data += chunk
        else:
            # Stops one byte above the limit, so that a decompression bomb is never expanded.
            data += unpacker.decompress(chunk, limit + 1 - len(data))
        if len(data) > limit:
            raise ResponseTooLarge
        if unpacker is not None and unpacker.eof:
            break
    if unpacker is not None and not unpacker.eof:
        raise Unreachable("its server sent an invalid response", retryable=True)
    return bytes(data)


@contextmanager
def _translated() -> Iterator[None]:
    """Translate library errors, whose messages contain hosts and addresses."""
    try:
        yield
    except AddressRefused:
        raise
    except (aiohttp.ClientError, OSError, ValueError, zlib.error) as error:
        if lacks_descriptor(error):
            raise OSError(errno.EMFILE, "no file descriptor is free") from None
        raise _safe_error(error) from error


def _safe_error(error: Exception) -> AddressRefused | Unreachable:
    match error:
        case aiohttp.ClientConnectorDNSError(os_error=_NotPermitted()):
            return AddressRefused(_NO_ADDRESS, retryable=True)
        case aiohttp.ClientConnectorDNSError():
            return Unreachable(_NO_ADDRESS, retryable=True)
        case TimeoutError():
            return Unreachable("its server took too long", retryable=True)
        case aiohttp.ClientSSLError():
            return Unreachable("its server's TLS certificate cannot be verified", retryable=False)
        case aiohttp.ClientConnectorError():
            return Unreachable("its server cannot be reached", retryable=True)
        case _:
            return Unreachable("its server sent an invalid response", retryable=True)
