"""The one way out: every request that the server makes to somebody else's address goes through this guard.

Owns what may be asked and how much may come back: schemes, ports, addresses, redirects, bytes and seconds. A name is
resolved once for each connection; the addresses are judged then, and the connection is made to the judged ones. Knows
nothing of images and callbacks. Its messages are safe to show to whoever named the URL: they never tell a name that
does not resolve from one that resolves into our own network, and carry no address that the caller did not write.
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
"""The numeric addresses of a host name; raises OSError where it has none."""

CONNECT_SECONDS = 10.0
REQUESTS = 100
"""Made at once."""
_LOOKUP_THREADS = 16
"""Of their own: names that hang must not hold up the threads that read and write files."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NO_ADDRESS = "its host has no address that may be asked from here"


class Unreachable(Exception):
    """Nothing usable came back.

    Args:
        reason: half a sentence.
        retryable: whether another try may help.
    """

    def __init__(self, reason: str, *, retryable: bool) -> None:
        super().__init__(reason)
        self.retryable = retryable


class ResponseTooLarge(Exception):
    """More bytes came than are wanted, before or after they were unpacked."""


class FetchLimits(NamedTuple):
    """What one fetch may take, all redirects together."""

    size_bytes: int
    seconds: float
    redirects: int = 5


class SafeHttpClient:
    """Makes requests to addresses that the rule permits; an async context manager.

    Args:
        permitted: the rule.
        lookup: how names are resolved; None: as the system does it.
        limit: requests at once; further ones wait, which is not part of their time.
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
        """The body behind a URL, over redirects, each judged like the first.

        Raises:
            Refused: the URL, or one that it leads to, may not be asked.
            Unreachable: no answer, a broken one, or one that is not 200.
            ResponseTooLarge: more than `limits.size_bytes`.
            OSError: no descriptor is free (`lacks_descriptor`).
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
        """Send a body; the status of the answer, whose own body is not read. Redirects are not followed.

        Raises:
            Refused: the URL may not be asked.
            Unreachable: no answer within `seconds`, or a broken one.
            OSError: no descriptor is free (`lacks_descriptor`).
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
            raise AddressRefused("it redirects to something that is no URL") from None
        try:
            return check_url(joined, self.permitted)
        except AddressRefused:
            raise AddressRefused("it redirects to a URL that is not permitted here") from None

    def _client(self) -> aiohttp.ClientSession:
        # Made when first needed: most servers are only ever given files that they hold themselves.
        if self._session is None:
            connector = aiohttp.TCPConnector(
                resolver=_Resolver(self._lookup, self.permitted),
                use_dns_cache=False,
                limit=self._limit,
                force_close=self._limit < REQUESTS,  # few can be open: none is kept for a host that may not come again
                socket_factory=partial(_checked_socket, self.permitted),
            )
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
            self._session = open_session(connector, timeout, {"accept": "*/*"})
        return self._session


class _NotPermitted(PermissionError):
    """An OSError, so that aiohttp takes it for a failed lookup or connection."""

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "not permitted")


class _Resolver(AbstractResolver):
    """Resolves a name at the moment of connecting and hands on only what may be asked."""

    def __init__(self, lookup: Lookup, permitted: AddressRule) -> None:
        self._lookup = lookup
        self._permitted = permitted

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,  # noqa: ARG002 - the connector asks for both
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
        """Nothing is held here."""


def _checked_socket(permitted: AddressRule, info: tuple[Any, ...]) -> socket.socket:
    """The last look: whatever way an address took, it is judged right before it is connected to."""
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
        # Without a descriptor no name is found, for a reason that is not told; opening anything tells it.
        os.close(os.open(os.devnull, os.O_RDONLY))
        raise
    return [str(entry[4][0]) for entry in found]


async def _body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    if response.status != 200:
        retryable = response.status >= 500 or response.status in {408, 429}
        raise Unreachable(f"its server answered {response.status}", retryable=retryable)
    packing = response.headers.get("content-encoding", "identity").strip().lower()
    if packing not in {"", "identity", "gzip", "x-gzip", "deflate"}:
        raise Unreachable(f"its server packed it as {packing[:20]}, which was not asked for", retryable=False)
    if (response.content_length or 0) > limit:
        raise ResponseTooLarge
    unpacker = zlib.decompressobj(wbits=47) if packing not in {"", "identity"} else None
    data = bytearray()
    async for chunk in response.content.iter_any():
        if unpacker is None:
            data += chunk
        else:
            # One byte over the limit is enough to know: a bomb is never unpacked.
            data += unpacker.decompress(chunk, limit + 1 - len(data))
        if len(data) > limit:
            raise ResponseTooLarge
        if unpacker is not None and unpacker.eof:
            break
    if unpacker is not None and not unpacker.eof:
        raise Unreachable("its server sent a broken answer", retryable=True)
    return bytes(data)


@contextmanager
def _translated() -> Iterator[None]:
    """Foreign errors in our words: their own name hosts and addresses."""
    try:
        yield
    except AddressRefused:
        raise
    except (aiohttp.ClientError, OSError, ValueError, zlib.error) as error:
        if lacks_descriptor(error):
            raise OSError(errno.EMFILE, "no descriptor is free") from None
        raise _in_our_words(error) from error


def _in_our_words(error: Exception) -> AddressRefused | Unreachable:
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
            return Unreachable("its server sent a broken answer", retryable=True)
