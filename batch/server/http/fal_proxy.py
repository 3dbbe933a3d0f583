"""Fal's host names on this server; what browsers need of us: the client's proxy route, and calls across origins.

The client of fal's own makes can be told to send everything to one URL, the true target in a header
(`proxyUrl`). Here the target is ourselves: its host says which of fal's roles is meant, its path is routed as if it
had been asked for directly. Nothing is ever sent anywhere.
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
"""Where the paths of fal's hosts lie on this server."""
_DIRECT = ("fal.run", "falrun.com")
"""Hosts that run at once what is posted to them, and so does every host below them but those of the queue."""


def routes() -> list[Route]:
    """Build the route table."""
    return [(method, PATH, _forward) for method in ("GET", "POST", "PUT", "DELETE")]


def own_path(target: str) -> URL | None:
    """Path and query on this server of a URL on one of fal's hosts; None for any other URL."""
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
        said = f"{target[:200]!r} is not" if target else "none is named"
        raise web.HTTPBadRequest(text=f"{TARGET} has to be an https URL on one of fal's hosts; {said}")
    # Without the header: whoever asks the proxy for the proxy ends at the refusal above.
    headers = request.headers.copy()
    del headers[TARGET]
    inner = request.clone(rel_url=path, headers=headers)
    match = await request.app.router.resolve(inner)
    inner.match_info.clear()
    inner.match_info.update(match)
    return await match.handler(inner)


@lru_cache(maxsize=64)
def is_direct(authority: str) -> bool:
    """Whether a `Host` header names a host by which fal runs directly what is posted to the path of an app.

    With fal's host names led here (a hosts file, a tunnel) the unchanged clients ask `fal.run` for a direct call and
    `queue.fal.run` for a submit, both under the same path.
    """
    host = (host_of(authority) or "").lower().rstrip(".")
    below = any(host == direct or host.endswith(f".{direct}") for direct in _DIRECT)
    return below and "queue" not in host.split(".")
