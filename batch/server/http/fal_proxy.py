"""fal's host names on this server, and the proxy route of fal's JavaScript client.

With `proxyUrl`, the client sends every request to one URL, with the real target in a header. This server handles such
a request itself: the target's host selects one of fal's services, and its path is routed as if requested directly.
Nothing is forwarded to another server.
"""

from __future__ import annotations

from functools import lru_cache

from aiohttp import web
from yarl import URL

from batch.server.http.cors import host_of
from batch.server.http.routing import Route

__all__ = ["PATH", "TARGET", "is_direct", "own_path", "routes"]

PATH = "/api/fal/proxy"
TARGET = "x-fal-target-url"
_PREFIXES = {
    "queue.fal.run": "",
    "queue.falrun.com": "",
    "fal.run": "/run",
    "falrun.com": "/run",
    "rest.fal.ai": "",
    "rest.alpha.fal.ai": "",
    "v3.fal.media": "",
    "api.fal.ai": "",
}
"""The path prefix on this server for each of fal's hosts."""
_DIRECT = ("fal.run", "falrun.com")
"""Hosts for direct calls; their subdomains count too, except those of the queue."""


def routes() -> list[Route]:
    """Build the route table."""
    return [(method, PATH, _forward) for method in ("GET", "POST", "PUT", "DELETE")]


def own_path(target: str) -> URL | None:
    """Return the path and query on this server for a URL on one of fal's hosts; None for any other URL."""
    try:
        url = URL(target)
        prefix = _PREFIXES.get(url.host or "")
        if prefix is None or url.scheme != "https" or url.explicit_port is not None or url.user is not None:
            return None
        return URL.build(path=prefix + url.raw_path, query_string=url.raw_query_string, encoded=True)
    except ValueError:
        return None


async def _forward(request: web.Request) -> web.StreamResponse:
    target = request.headers.get(TARGET)
    path = own_path(target) if target else None
    if path is None:
        given = repr(target[:200]) if target else "nothing"
        raise web.HTTPBadRequest(text=f"{TARGET} must be an https URL on one of fal's hosts, got {given}")
    # Without the header, so that a request for the proxy route itself is rejected above, not repeated forever.
    headers = request.headers.copy()
    del headers[TARGET]
    inner = request.clone(rel_url=path, headers=headers)
    match = await request.app.router.resolve(inner)
    inner.match_info.clear()
    inner.match_info.update(match)
    return await match.handler(inner)


@lru_cache(maxsize=64)
def is_direct(authority: str) -> bool:
    """Whether a `Host` header selects direct calls instead of the queue.

    If fal's host names resolve to this server (a hosts file, a tunnel), unmodified clients post to `fal.run` for a
    direct call and to `queue.fal.run` for a submit, with the same path.
    """
    host = (host_of(authority) or "").lower().rstrip(".")
    below = any(host == direct or host.endswith(f".{direct}") for direct in _DIRECT)
    return below and "queue" not in host.split(".")
