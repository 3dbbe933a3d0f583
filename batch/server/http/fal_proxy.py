"""Fal's host names on this server; what browsers need of us: the client's proxy route, and calls across origins.

The client of fal's own makes can be told to send everything to one URL, the true target in a header
(`proxyUrl`). Here the target is ourselves: its host says which of fal's roles is meant, its path is routed as if it
had been asked for directly. Nothing is ever sent anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import TypeAlias

from aiohttp import web
from yarl import URL

from batch.fal.protocol import is_loopback
from batch.server.http.auth import Denied

__all__ = ["PATH", "TARGET", "Crossing", "is_direct", "own_path", "routes"]

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
_AUTHORITY = re.compile(r"[^\s/?#@\\\ud800-\udfff]{1,512}")
"""A host and perhaps a port; bytes that are not UTF-8 arrive as lone surrogates."""
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_CORS = {
    "access-control-allow-origin": "*",
    # By name: `*` does not stand for Authorization.
    "access-control-allow-headers": "Accept, Authorization, Content-Type, Idempotency-Key, X-Fal-File-Name,"
    " X-Fal-No-Retry, X-Fal-Object-Lifecycle, X-Fal-Object-Lifecycle-Preference, X-Fal-Queue-Priority,"
    " X-Fal-Request-Start-Timeout, X-Fal-Request-Timeout, X-Fal-Runner-Hint, X-Fal-Store-IO, X-Fal-Tags,"
    " X-Fal-Target-Url, X-App-Fal-Disable-Fallback",
    "access-control-allow-methods": "GET, HEAD, POST, PUT, DELETE",
    "access-control-expose-headers": "*",
    "access-control-max-age": "86400",
    "vary": "origin",
}

_FOREIGN_HOST = (
    "Without keys this server answers to localhost and 127.0.0.1 only, not to {!r};"
    " give it keys (--keys) to serve others"
)

_Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


def routes() -> list[tuple[str, str, _Handler]]:
    """Method, path and handler of each route."""
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
def _host(authority: str) -> str | None:
    """The host in a `Host` header; None where the header is not one: no URL could be made with it."""
    try:
        return URL(f"http://{authority}").host if _AUTHORITY.fullmatch(authority) else None
    except ValueError:
        return None


@lru_cache(maxsize=64)
def is_direct(authority: str) -> bool:
    """Whether a `Host` header names a host by which fal runs directly what is posted to the path of an app.

    With fal's host names led here (a hosts file, a tunnel) the unchanged clients ask `fal.run` for a direct call and
    `queue.fal.run` for a submit, both under the same path.
    """
    host = (_host(authority) or "").lower().rstrip(".")
    below = any(host == direct or host.endswith(f".{direct}") for direct in _DIRECT)
    return below and "queue" not in host.split(".")


class Crossing:
    """Which other origins a browser may call us from, and under which names.

    Args:
        keyed: whether callers need a key. Without keys only pages of this machine may: else any page that its user
            looks at could submit pictures and read the answers.
    """

    def __init__(self, *, keyed: bool) -> None:
        self._keyed = keyed

    def allow(self, origin: str, answer: web.StreamResponse) -> None:
        """Tell the browser that its page may ask, and read the answer, if it may."""
        if self._permits(origin) and not answer.prepared:
            answer.headers.update(_CORS)

    def check(self, authority: str) -> None:
        """Refuse a `Host` header that is invalid, or not one of ours.

        Without keys only this machine may ask. A page whose own name is made to resolve to 127.0.0.1 (DNS rebinding)
        asks from this machine too, and is of the same origin to its browser; but its requests bear its name.

        Raises:
            Denied: 403.
            HTTPBadRequest: it is not a host and a port.
        """
        host = _host(authority)
        if not self._keyed and not is_loopback(host or ""):
            raise Denied(403, _FOREIGN_HOST.format(authority[:200]))
        if host is None and authority:
            raise web.HTTPBadRequest(text=f"The Host header {authority[:200]!r} is not a host and a port")

    def _permits(self, origin: str) -> bool:
        if self._keyed:
            return True
        try:
            return URL(origin).host in _LOOPBACK
        except ValueError:
            return False
