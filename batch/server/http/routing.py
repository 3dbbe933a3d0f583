"""Types and helpers that all routes of the server share: route tables, and responses from protocol replies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from aiohttp import web

from batch.fal.protocol import Reply

__all__ = ["Handler", "Route", "base_of", "read_routes", "response"]

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
Route: TypeAlias = tuple[str, str, Handler]
"""Method, path and handler."""


def read_routes(path: str, handler: Handler) -> list[Route]:
    """Make the routes of a path that is only read."""
    return [(method, path, handler) for method in ("GET", "HEAD")]


def response(reply: Reply) -> web.Response:
    """Convert a protocol reply to aiohttp's response."""
    return web.Response(status=reply.status, body=reply.body, headers=reply.headers)


def base_of(request: web.Request) -> str:
    """Scheme and host as the caller used them, so that URLs in the answer work for that caller."""
    return f"{request.scheme}://{request.host}"
