"""Files over HTTP: both official upload mechanisms for single-part files, and the files themselves.

Owns the routes below `/storage` and `/files`. Files are public to whoever knows their name, as on fal; names cannot
be guessed. Parts of larger uploads are a later room.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

import orjson
from aiohttp import web

from batch.fal import protocol
from batch.server.keys import Authenticator
from batch.server.service import QueueService
from batch.server.storage import TooLarge, content_type_of

__all__ = ["UPLOAD_LIMIT_BYTES", "routes"]

UPLOAD_LIMIT_BYTES = 100 * 2**20
"""The official clients send anything larger in parts."""
_FILE_HEADERS = {
    # Somebody else's bytes under our origin: a browser must neither guess what they are nor run them.
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; sandbox",
    "cache-control": "public, max-age=31536000, immutable",
    "access-control-allow-origin": "*",
}

_Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


def routes(service: QueueService, authenticator: Authenticator) -> list[tuple[str, str, _Handler]]:
    """Method, path and handler of each route."""
    files = _Files(service, authenticator)
    return [
        ("POST", "/storage/auth/token", files.token),
        ("POST", "/storage/upload/initiate", files.initiate),
        ("PUT", "/storage/upload/{token}{path:/files/.+}", files.put),
        ("POST", "/files/upload", files.upload),
        ("GET", "/files/{prefix}/{name}", files.get),
        ("HEAD", "/files/{prefix}/{name}", files.get),
    ]


class _Files:
    """The handlers, with what they need."""

    def __init__(self, service: QueueService, authenticator: Authenticator) -> None:
        self._service = service
        self._authenticator = authenticator
        self._storage = service.storage

    async def token(self, request: web.Request) -> web.Response:
        """A CDN token, as Python's client wants one before it uploads: it stands in for the caller's key."""
        token = self._authenticator.token(request["owner"])
        answer = {
            "token": token.text,
            "token_type": "Bearer",
            "base_url": _base(request),
            # With an offset, not with Z: older Pythons cannot read that.
            "expires_at": datetime.fromtimestamp(token.expires_at, UTC).isoformat(),
        }
        return self._json(answer)

    async def initiate(self, request: web.Request) -> web.Response:
        """Announce an upload: where to put the bytes and where they will be found (the JavaScript client's way)."""
        try:
            wanted = orjson.loads(await request.read() or b"{}")
        except orjson.JSONDecodeError as error:
            raise web.HTTPUnprocessableEntity(text=f"The body is not JSON: {error}") from error
        content_type = wanted.get("content_type") if isinstance(wanted, dict) else None
        reserved = self._storage.reserve(content_type if isinstance(content_type, str) else None)
        base = _base(request)
        return self._json(
            {
                "upload_url": f"{base}/storage/upload/{reserved.token}{reserved.path}",
                "file_url": base + reserved.path,
            }
        )

    async def put(self, request: web.Request) -> web.Response:
        """The bytes of an announced upload; the token in the path is the permission."""
        path, token = request.match_info["path"], request.match_info["token"]
        if not self._storage.may_write(path, token):
            raise web.HTTPForbidden(text="This upload was not announced; POST to /storage/upload/initiate first")
        await self._receive(request, path)
        return self._json({}, etag=f'"{path.rpartition("/")[2]}"')

    async def upload(self, request: web.Request) -> web.Response:
        """Raw bytes in, URL out (Python's way)."""
        path = await self._receive(request, None)
        return self._json({"access_url": _base(request) + path}, etag=f'"{path.rpartition("/")[2]}"')

    async def get(self, request: web.Request) -> web.StreamResponse:
        """A file: with type, length, ETag, ranges and HEAD."""
        path = request.path
        found = await self._storage.find(path)
        if found is None:
            raise web.HTTPNotFound(text=f"There is no file {path}")
        headers = {"content-type": content_type_of(path), **_FILE_HEADERS}
        if isinstance(found, Path):
            return web.FileResponse(found, headers=headers)
        name = path.rpartition("/")[2]  # a hash of the bytes
        headers["etag"] = f'"{name}"'
        if any(etag.value in {name, "*"} for etag in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(body=found, headers=headers)

    async def _receive(self, request: web.Request, path: str | None) -> str:
        too_large = f"The file is larger than {UPLOAD_LIMIT_BYTES // 2**20} MiB; send a smaller one"
        if (request.content_length or 0) > UPLOAD_LIMIT_BYTES:
            raise web.HTTPRequestEntityTooLarge(UPLOAD_LIMIT_BYTES, text=too_large)
        chunks, content_type = request.content.iter_any(), request.headers.get("content-type")
        try:
            return await self._storage.receive(chunks, content_type, UPLOAD_LIMIT_BYTES, path)
        except TooLarge as error:
            raise web.HTTPRequestEntityTooLarge(UPLOAD_LIMIT_BYTES, text=too_large) from error

    def _json(self, value: dict[str, str], **headers: str) -> web.Response:
        own = {"content-type": protocol.CONTENT_JSON, protocol.REQUEST_ID: self._service.new_id()}
        return web.Response(body=orjson.dumps(value), headers=own | headers)


def _base(request: web.Request) -> str:
    return f"{request.scheme}://{request.host}"
