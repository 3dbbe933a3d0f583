"""Fetch a request's source image: from a data URI, the server's own files, or another web server.

Limits the download's size and time; `SafeHttpClient` checks the addresses. Every error is an `EngineFailure` of the
request and contains the image's URL. The engine checks whether the bytes are an image.
"""

from __future__ import annotations

import base64
import binascii
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from batch.server.egress.http_client import FetchLimits, ResponseTooLarge, SafeHttpClient, Unreachable
from batch.server.egress.ssrf import AddressRefused
from batch.server.engines.base import EngineFailure
from batch.server.files.multipart import UploadTooLarge
from batch.server.files.storage import Storage
from batch.server.limits import DEFAULT_LIMITS

__all__ = ["DataUri", "SourceFetcher", "parse_data_uri"]

REDIRECTS = 5
FETCH_SECONDS = 60.0


class DataUri(NamedTuple):
    """The parts of a data URI."""

    data: bytes
    content_type: str


def parse_data_uri(uri: str) -> DataUri:
    """Decode `data:[type][;base64],...`.

    Raises:
        ValueError: no `data:`, no comma, or invalid base64.
    """
    head, comma, rest = uri.partition(",")
    if not comma or head[:5].lower() != "data:":
        raise ValueError("a data URI is data:TYPE;base64,BYTES")
    content_type, *parameters = head[5:].split(";")
    if any(parameter.strip().lower() == "base64" for parameter in parameters):
        try:
            data = base64.b64decode(rest if "%" not in rest else unquote_to_bytes(rest), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"its base64 is invalid: {error}") from error
    else:
        data = unquote_to_bytes(rest)
    return DataUri(data, content_type.strip().lower() or "text/plain")


class SourceFetcher:
    """Fetches source images.

    Args:
        storage: the server's own files, recognised by path, whatever the host and port of the URL.
        client: makes the requests to other servers.
        limit_bytes: size limit of an image.
    """

    def __init__(
        self, storage: Storage, client: SafeHttpClient, *, limit_bytes: int = DEFAULT_LIMITS.source_bytes
    ) -> None:
        self._storage = storage
        self._client = client
        self._limit_bytes = limit_bytes

    async def fetch(self, url: str) -> bytes:
        """Fetch the bytes of a URL, at most `limit_bytes`.

        Raises:
            EngineFailure: `image_load_error` (invalid data URI), `file_too_large` or `file_download_error`.
        """
        if url[:5].lower() == "data:":
            try:
                data = parse_data_uri(url).data
            except ValueError as error:
                raise EngineFailure(422, "image_load_error", f"The data URI cannot be read: {error}") from error
            return self._bounded(data)
        path = self._storage.path_in(url)
        try:
            own = await self._storage.read(path, self._limit_bytes) if path is not None else None
        except UploadTooLarge as error:
            raise self._too_large() from error
        if own is not None:
            return own
        try:
            return await self._client.fetch(url, FetchLimits(self._limit_bytes, FETCH_SECONDS, REDIRECTS))
        except ResponseTooLarge as error:
            raise self._too_large() from error
        except (AddressRefused, Unreachable) as error:
            raise _unreachable(url, str(error), retryable=error.retryable) from error

    def _bounded(self, data: bytes) -> bytes:
        if len(data) > self._limit_bytes:
            raise self._too_large()
        return data

    def _too_large(self) -> EngineFailure:
        limit = f"{self._limit_bytes // 2**20} MiB"
        return EngineFailure(
            422,
            "file_too_large",
            f"The source image is larger than {limit}; send a smaller one",
            ctx={"max_size": self._limit_bytes},
        )


def _unreachable(url: str, reason: str, *, retryable: bool = False) -> EngineFailure:
    message = f"The source image {url[:200]} could not be fetched: {reason}; check that the URL is public"
    return EngineFailure(422, "file_download_error", message, retryable=retryable)
