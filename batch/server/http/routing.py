"""Shared types and helpers of the routes: route tables, responses from protocol replies."""

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
    """Return the GET and HEAD routes of a read-only path."""
    return [(method, path, handler) for method in ("GET", "HEAD")]


def response(reply: Reply) -> web.Response:
    """Convert a protocol reply to an aiohttp response."""
    return web.Response(status=reply.status, body=reply.body, headers=reply.headers)


def base_of(request: web.Request) -> str:
    """Return the scheme and host that the client used, so that URLs in the response work for that client."""
    return f"{request.scheme}://{request.host}"
