"""Where a request's source picture comes from: a data URI, our own files, or somebody's web server.

Owns the download and its bounds. Every fault is an `EngineFailure` that names the picture's URL: it is the request's
own fault and never the server's. Whether the bytes are a picture is the engine's business.
"""

from __future__ import annotations

import base64
import binascii
import errno
import ipaddress
import socket
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self, TypeAlias
from urllib.parse import unquote_to_bytes

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from batch.server.engines.base import EngineFailure
from batch.server.storage import Storage

__all__ = ["SOURCE_LIMIT_BYTES", "AddressRule", "DataUri", "Sources", "allow_any_address", "parse_data_uri"]

SOURCE_LIMIT_BYTES = 50 * 2**20
"""Precedent: the default cap of fal's own toolkit for images."""
REDIRECTS = 5
FETCH_SECONDS = 60.0
CONNECT_SECONDS = 10.0

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
AddressRule: TypeAlias = Callable[[Address], bool]
"""Whether a picture may be fetched from there. The one place that decides it."""


def allow_any_address(address: Address) -> bool:  # noqa: ARG001 - the rule that has no objection
    """For a server that only its own user can reach: loopback and private networks too."""
    return True


class DataUri(NamedTuple):
    """A data URI in its parts."""

    data: bytes
    content_type: str


def parse_data_uri(uri: str) -> DataUri:
    """Decode `data:[type][;base64],...`.

    Raises:
        ValueError: no comma, or broken base64.
    """
    head, comma, rest = uri.partition(",")
    if not comma or head[:5].lower() != "data:":
        raise ValueError("a data URI is data:TYPE;base64,BYTES")
    content_type, *parameters = head[5:].split(";")
    if any(parameter.strip().lower() == "base64" for parameter in parameters):
        try:
            data = base64.b64decode(rest if "%" not in rest else unquote_to_bytes(rest), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"its base64 is broken: {error}") from error
    else:
        data = unquote_to_bytes(rest)
    return DataUri(data, content_type.strip().lower() or "text/plain")


class Sources:
    """Fetches source pictures; an async context manager.

    Args:
        storage: our own files, read from disk under whatever host and port their URLs were given out.
        permitted: which addresses may be asked.
    """

    def __init__(self, storage: Storage, permitted: AddressRule = allow_any_address) -> None:
        self._storage = storage
        self._permitted = permitted
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def fetch(self, url: str) -> bytes:
        """The bytes behind a URL, at most `SOURCE_LIMIT_BYTES`.

        Raises:
            EngineFailure: `image_load_error` for a broken data URI, `file_too_large`, `file_download_error`.
        """
        if url[:5].lower() == "data:":
            try:
                data = parse_data_uri(url).data
            except ValueError as error:
                raise EngineFailure(422, "image_load_error", f"The data URI cannot be read: {error}") from error
            return _bounded(data)
        path = self._storage.path_in(url)
        own = await self._storage.read(path) if path is not None else None
        if own is not None:
            return own
        try:
            return await self._download(url)
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            raise _unreachable(url, reason, retryable=not isinstance(error, ValueError)) from error

    async def _download(self, url: str) -> bytes:
        target = URL(url)
        for _ in range(REDIRECTS + 1):
            self._check(target, url)
            async with self._client().get(target, allow_redirects=False) as response:
                if response.status in {301, 302, 303, 307, 308} and "location" in response.headers:
                    target = target.join(URL(response.headers["location"]))
                    continue
                if response.status != 200:
                    retryable = response.status >= 500 or response.status in {408, 429}
                    raise _unreachable(url, f"its server answered {response.status}", retryable=retryable)
                if (response.content_length or 0) > SOURCE_LIMIT_BYTES:
                    raise _too_large()
                data = bytearray()
                async for chunk in response.content.iter_any():
                    data += chunk
                    if len(data) > SOURCE_LIMIT_BYTES:
                        raise _too_large()
                return bytes(data)
        raise _unreachable(url, f"it redirects more than {REDIRECTS} times")

    def _check(self, target: URL, url: str) -> None:
        if target.scheme not in {"http", "https"} or not target.host:
            raise _unreachable(url, "only http and https URLs and data URIs can be fetched")
        try:
            literal = ipaddress.ip_address(target.host)
        except ValueError:
            return  # a name: what it resolves to is checked where it is resolved
        if not self._permitted(literal):
            raise _unreachable(url, f"fetching from {literal} is not permitted here")

    def _client(self) -> aiohttp.ClientSession:
        # Made when first needed: most servers are only ever given files that they hold themselves.
        if self._session is None:
            connector = aiohttp.TCPConnector(resolver=_CheckedResolver(self._permitted), limit=64)
            timeout = aiohttp.ClientTimeout(total=FETCH_SECONDS, sock_connect=CONNECT_SECONDS)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session


class _CheckedResolver(AbstractResolver):
    """Drops addresses that may not be asked, at the moment of connecting: a name cannot change in between."""

    def __init__(self, permitted: AddressRule) -> None:
        self._inner = aiohttp.ThreadedResolver()
        self._permitted = permitted

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        allowed = [entry for entry in found if self._permitted(ipaddress.ip_address(entry["host"].partition("%")[0]))]
        if found and not allowed:
            raise PermissionError(errno.EACCES, f"fetching from {host} is not permitted here")
        return allowed

    async def close(self) -> None:
        await self._inner.close()


def _bounded(data: bytes) -> bytes:
    if len(data) > SOURCE_LIMIT_BYTES:
        raise _too_large()
    return data


def _too_large() -> EngineFailure:
    limit = f"{SOURCE_LIMIT_BYTES // 2**20} MiB"
    return EngineFailure(
        422,
        "file_too_large",
        f"The source picture is larger than {limit}; send a smaller one",
        ctx={"max_size": SOURCE_LIMIT_BYTES},
    )


def _unreachable(url: str, reason: str, *, retryable: bool = False) -> EngineFailure:
    message = f"The source picture {url[:200]} could not be fetched: {reason}; check that the URL is public"
    return EngineFailure(422, "file_download_error", message, retryable=retryable)
