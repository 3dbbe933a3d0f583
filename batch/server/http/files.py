"""Upload and download files over HTTP, with both official upload mechanisms, whole and multipart.

Defines the routes below `/storage`, `/files` and `/tokens`. Files are public, as on fal, but their names cannot be
guessed. The path of an announced upload contains a token, because fal's JavaScript client sends no key with the bytes.
The token, also used as the upload id, is a signature of the path, so that announcements need no storage.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from pydantic import ValidationError

from batch.fal import protocol
from batch.server.files.multipart import PARTS, BadParts, Part, UploadTooLarge
from batch.server.files.storage import Reservation, content_type_of
from batch.server.http.auth import Authenticator, owner_of
from batch.server.http.bodies import (
    Body,
    EmptyBody,
    JoinedBody,
    MultipartBody,
    PartBody,
    PartListBody,
    ReservedBody,
    StoredBody,
    TokenBody,
)
from batch.server.http.routing import Route, base_of, read_routes, response
from batch.server.limits import DEFAULT_LIMITS, ServerLimits
from batch.server.queue.service import QueueService
from batch.system.descriptors import patiently
from batch.types import JsonObject

__all__ = ["routes"]

_FILE_HEADERS = {
    # Uploads have the server's origin: a browser must neither guess their type nor execute them.
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; sandbox",
    "cache-control": "public, max-age=31536000, immutable",
    "access-control-allow-origin": "*",
}

_PATH = "{path:/files/[^/]+/[^/]+}"


def routes(
    service: QueueService,
    authenticator: Authenticator,
    downloads: int | None = None,
    limits: ServerLimits = DEFAULT_LIMITS,
) -> list[Route]:
    """Build the route table. At most `downloads` large files are sent concurrently; others wait."""
    files = _Files(service, authenticator, downloads, limits)
    return [
        ("POST", "/storage/auth/token", files.token),
        ("POST", "/tokens/", files.realtime_token),
        ("POST", "/storage/upload/initiate", files.initiate),
        ("POST", "/storage/upload/initiate-multipart", files.initiate),
        ("PUT", "/storage/upload/{token}" + _PATH, files.put),
        ("PUT", "/storage/upload/{token}" + _PATH + "/{number}", files.put_part),
        ("POST", "/storage/upload/{token}" + _PATH + "/complete", files.complete),
        ("POST", "/files/upload", files.upload),
        ("POST", "/files/upload/multipart", files.begin),
        ("PUT", "/files/{prefix}/{name}/multipart/{token}/{number}", files.put_part),
        ("POST", "/files/{prefix}/{name}/multipart/{token}/complete", files.complete),
        *read_routes("/files/{prefix}/{name}", files.get),
    ]


class _Files:
    """The handlers and their dependencies."""

    def __init__(
        self, service: QueueService, authenticator: Authenticator, downloads: int | None, limits: ServerLimits
    ) -> None:
        self._sending = nullcontext() if downloads is None else asyncio.Semaphore(downloads)
        self._service = service
        self._authenticator = authenticator
        self._storage = service.storage
        self._limits = limits

    async def token(self, request: web.Request) -> web.Response:
        """Return an upload token, which fal's Python client requests before an upload and uses instead of the key."""
        token = self._authenticator.token(owner_of(request))
        # With an offset, because Python 3.10 cannot parse Z.
        expires_at = datetime.fromtimestamp(token.expires_at, UTC).isoformat()
        base, kind = base_of(request), "Bearer"
        return self._json(TokenBody(token=token.text, token_type=kind, base_url=base, expires_at=expires_at))

    async def realtime_token(self, request: web.Request) -> web.Response:
        """Return a short-lived token as a JSON string. The server has no websocket that accepts it."""
        text = self._authenticator.token(owner_of(request)).text
        own = {"content-type": protocol.CONTENT_JSON, protocol.REQUEST_ID: self._service.new_id()}
        return web.Response(body=orjson.dumps(text), headers=own)

    async def initiate(self, request: web.Request) -> web.Response:
        """Announce an upload: return the URL for the bytes and the URL of the file (JavaScript's client)."""
        content_type = (await self._object_in(request)).get("content_type")
        reserved = await self._reserve(request, content_type if isinstance(content_type, str) else None)
        base = base_of(request)
        upload_url = f"{base}/storage/upload/{reserved.token}{reserved.path}"
        return self._json(ReservedBody(upload_url=upload_url, file_url=base + reserved.path))

    async def begin(self, request: web.Request) -> web.Response:
        """Announce a multipart upload (Python's client)."""
        reserved = await self._reserve(request, request.headers.get("content-type"))
        return self._json(MultipartBody(access_url=base_of(request) + reserved.path, uploadId=reserved.token))

    async def put(self, request: web.Request) -> web.Response:
        """Store the bytes of an announced upload; the token in the path authorises it."""
        path = self._announced(request)
        await self._receive(request, path)
        return self._json(EmptyBody(), etag=f'"{path.rpartition("/")[2]}"')

    async def put_part(self, request: web.Request) -> web.Response:
        """Store one part of an announced upload. Python reads the `etag` header, JavaScript the body."""
        path, number = self._announced(request), request.match_info["number"]
        if re.fullmatch("[1-9][0-9]{0,3}", number) is None or int(number) > PARTS:
            raise web.HTTPBadRequest(text=f"Invalid part number {number[:20]}: use 1 to {PARTS}")
        chunks = _chunks(request, self._limits.silence_seconds)
        try:
            tag = await self._storage.receive_part(path, int(number), chunks, request.content_length)
        except UploadTooLarge as error:
            raise web.HTTPRequestEntityTooLarge(0, text=f"The upload is too large: {error}") from error
        etag = f'"{tag}"'
        return self._json(PartBody(partNumber=int(number), etag=etag), etag=etag)

    async def complete(self, request: web.Request) -> web.Response:
        """Join all parts of an announced upload into the file."""
        path = self._announced(request)
        try:
            await self._storage.join_parts(path, _parts_in(await self._object_in(request)))
        except BadParts as error:
            raise web.HTTPBadRequest(text=f"The upload cannot be completed: {error}") from error
        url = base_of(request) + path
        return self._json(JoinedBody(access_url=url, file_url=url), etag=f'"{path.rpartition("/")[2]}"')

    async def upload(self, request: web.Request) -> web.Response:
        """Store a file and return its URL (Python's client)."""
        path = await self._receive(request, None)
        return self._json(StoredBody(access_url=base_of(request) + path), etag=f'"{path.rpartition("/")[2]}"')

    async def get(self, request: web.Request) -> web.StreamResponse:
        """Send a file, with type, length, ETag, ranges and HEAD."""
        path = request.path
        found = await self._storage.find(path)
        if found is None:
            raise web.HTTPNotFound(text=f"File {path} not found")
        headers = {"content-type": content_type_of(path), **_FILE_HEADERS}
        if isinstance(found, Path):
            return _FileResponse(found, headers, self._sending)
        name = path.rpartition("/")[2]  # a hash of the bytes
        headers["etag"] = f'"{name}"'
        if any(etag.value in {name, "*"} for etag in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(body=found, headers=headers)

    async def _reserve(self, request: web.Request, content_type: str | None) -> Reservation:
        reserved, life = self._storage.reserve(content_type), protocol.lifetime_in(request.headers)
        if life is not None:
            await self._storage.limit_life(reserved.path, life)
        return reserved

    def _announced(self, request: web.Request) -> str:
        """Return the announced path of an upload."""
        known = request.match_info
        path = known["path"] if "path" in known else f"/files/{known['prefix']}/{known['name']}"
        if self._storage.path_in(path) != path or not self._storage.may_write(path, known["token"]):
            raise web.HTTPForbidden(text="The upload was not announced; POST to /storage/upload/initiate first")
        return path

    async def _receive(self, request: web.Request, path: str | None) -> str:
        limit = self._limits.upload_bytes
        too_large = f"The file is larger than {limit // 2**20} MiB; use a multipart upload or a smaller file"
        if (request.content_length or 0) > limit:
            raise web.HTTPRequestEntityTooLarge(limit, text=too_large)
        chunks, content_type = _chunks(request, self._limits.silence_seconds), request.headers.get("content-type")
        life = protocol.lifetime_in(request.headers) if path is None else None
        try:
            return await self._storage.receive(chunks, content_type, limit, path, life)
        except UploadTooLarge as error:
            raise web.HTTPRequestEntityTooLarge(limit, text=too_large) from error

    async def _object_in(self, request: web.Request) -> JsonObject:
        """Read the JSON object in the body; an empty body is an empty object."""
        try:
            async with asyncio.timeout(self._limits.silence_seconds):
                body = await request.read()
            return protocol.read_object(body or b"{}")
        except TimeoutError as error:
            raise _silent(self._limits.silence_seconds) from error
        except protocol.Malformed as error:
            raise web.HTTPUnprocessableEntity(text=f"The body must be a JSON object: {error}") from error

    def _json(self, body: Body, **headers: str) -> web.Response:
        return response(protocol.json_reply(200, body.model_dump(), self._service.new_id(), headers))


class _FileResponse(web.FileResponse):
    """A file on disk that stays open during the transfer."""

    def __init__(self, path: Path, headers: dict[str, str], turn: AbstractAsyncContextManager[object]) -> None:
        super().__init__(path, headers=headers)
        self._turn = turn

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        async with self._turn:
            return await super().prepare(request)

    def _make_response(self, *arguments: Any) -> Any:
        """Open the file, in a thread. Without retries, aiohttp returns 404 if no file descriptor is free."""
        return patiently(partial(super()._make_response, *arguments), time.sleep)


async def _chunks(request: web.Request, silence_seconds: float) -> AsyncIterator[bytes]:
    """Yield the body in chunks as they arrive."""
    while True:
        try:
            async with asyncio.timeout(silence_seconds):
                chunk = await request.content.readany()
        except TimeoutError as error:
            raise _silent(silence_seconds) from error
        if not chunk:
            return
        yield chunk


def _silent(seconds: float) -> web.HTTPRequestTimeout:
    return web.HTTPRequestTimeout(text=f"No data received for {seconds:.0f} s")


def _parts_in(body: JsonObject) -> list[Part]:
    """Read the list of parts that form the file.

    Raises:
        BadParts: the list is missing, empty or malformed.
    """
    try:
        listed = PartListBody.model_validate(body, strict=True)
    except ValidationError as error:
        raise BadParts('list each part as {"partNumber": 1, "etag": "..."}') from error
    return [Part(part.partNumber, part.etag.removeprefix("W/").strip('"')) for part in listed.parts]
