"""The web page's routes: one template, static files, and the JSON of its live state.

Defines `/`, `/static/...` and `/page/state`, with their security headers. The page sends requests through the public
API like any client. Files are read and rendered on first use.
"""

from __future__ import annotations

import hashlib
import time
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import orjson
from aiohttp import web

from batch.fal import protocol
from batch.fal.endpoint import ImageToImageInput
from batch.server.http.auth import owner_of
from batch.server.http.page.state import numbers, request_card
from batch.server.http.routing import Route, read_routes
from batch.server.queue.service import QueueService
from batch.types import AppId

__all__ = ["routes"]

SHOWN_REQUESTS = 24
_FOLDER = Path(__file__).parent
_STATIC = {
    "api.js": "text/javascript",
    "icon.svg": "image/svg+xml",
    "live.js": "text/javascript",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "playground.js": "text/javascript",
    "recent.js": "text/javascript",
}
_WITHOUT_MODEL = {
    "preview": "preview: filters, no model runs",
    "echo": "echo: test cards, no model runs",
}
"""Notice for engines without a model."""
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_SAME_SITE = frozenset({"same-origin", "none"})


def routes(service: QueueService, app_id: AppId) -> list[Route]:
    """Build the route table."""
    page = _PageRoutes(service, app_id)
    paths = {"/": page.show, "/page/state": page.state, "/static/{name}": page.static}
    return [route for path, handler in paths.items() for route in read_routes(path, handler)]


class _StaticFile(NamedTuple):
    body: bytes
    content_type: str
    etag: str


class _PageRoutes:
    """The handlers and their dependencies."""

    def __init__(self, service: QueueService, app_id: AppId) -> None:
        self._service = service
        self._app_id = app_id
        self._read: dict[str, _StaticFile] = {}

    async def show(self, request: web.Request) -> web.Response:
        """Return the page."""
        return _answer(request, self._document)

    async def static(self, request: web.Request) -> web.Response:
        """Return a static file of the page."""
        name = request.match_info["name"]
        if name not in _STATIC:
            raise web.HTTPNotFound(text=f"File {name} not found")
        if name not in self._read:
            self._read[name] = _file((_FOLDER / "static" / name).read_bytes(), _STATIC[name])
        return _answer(request, self._read[name])

    async def state(self, request: web.Request) -> web.Response:
        """Return the numbers and the newest requests; a visible page polls this every 1.5 s."""
        if request.headers.get("sec-fetch-site", "none") not in _SAME_SITE:
            # A script of another site in the same browser must not read prompts and images.
            raise web.HTTPForbidden(text="The page's state is only available to the page")
        latest = await self._service.latest(SHOWN_REQUESTS, owner_of(request))
        counts, path_in = self._service.statistics(), self._service.storage.path_in
        body = {
            **numbers(self._service.tally, waiting=counts.waiting, running=counts.running, now=time.time()),
            "requests": [request_card(listed, view, path_in) for listed, view in latest],
        }
        headers = _HEADERS | {"content-type": protocol.CONTENT_JSON, "cache-control": "no-store"}
        return web.Response(body=orjson.dumps(body), headers=headers)

    @cached_property
    def _document(self) -> _StaticFile:
        """The rendered page; the server's facts are constant, so it is rendered once."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        environment = Environment(
            loader=FileSystemLoader(_FOLDER / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        info = self._service.engine
        html = environment.get_template("page.html").render(
            app_id=self._app_id,
            info=info,
            without_model=_WITHOUT_MODEL.get(info.name),
            inputs=ImageToImageInput.model_json_schema()["properties"],
        )
        return _file(html.encode(), "text/html")


def _file(body: bytes, content_type: str) -> _StaticFile:
    return _StaticFile(body, content_type, hashlib.blake2b(body, digest_size=12).hexdigest())


def _answer(request: web.Request, file: _StaticFile) -> web.Response:
    headers = _HEADERS | {"cache-control": "no-cache", "etag": f'"{file.etag}"'}
    if any(etag.value in {file.etag, "*"} for etag in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    return web.Response(body=file.body, headers=headers, content_type=file.content_type, charset="utf-8")
