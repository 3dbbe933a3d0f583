"""Which hosts and origins a browser may use to call this server."""

from __future__ import annotations

import re
from functools import lru_cache

from aiohttp import web
from yarl import URL

from batch.fal.protocol import is_loopback
from batch.server.http.auth import Denied

__all__ = ["CorsPolicy", "host_of"]

_AUTHORITY = re.compile(r"[^\s/?#@\\\ud800-\udfff]{1,512}")
"""A host with an optional port; bytes that are not UTF-8 arrive as lone surrogates."""
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_CORS = {
    "access-control-allow-origin": "*",
    # By name, because `*` does not include Authorization.
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
    "Without keys, this server accepts the hosts localhost and 127.0.0.1 only, not {!r};"
    " start it with --keys to serve other hosts"
)


@lru_cache(maxsize=64)
def host_of(authority: str) -> str | None:
    """Return the host in a `Host` header; None if the header is invalid."""
    try:
        return URL(f"http://{authority}").host if _AUTHORITY.fullmatch(authority) else None
    except ValueError:
        return None


class CorsPolicy:
    """The origins and host names that browsers may use.

    Args:
        keyed: whether the server has keys. Without keys, only pages from this machine may call it: otherwise any page
            open in a browser on this machine could submit images and read the responses.
    """

    def __init__(self, *, keyed: bool) -> None:
        self._keyed = keyed

    def allow(self, origin: str, answer: web.StreamResponse) -> None:
        """Add the CORS headers if the origin is permitted."""
        if self._permits(origin) and not answer.prepared:
            answer.headers.update(_CORS)

    def check(self, authority: str) -> None:
        """Reject an invalid or foreign `Host` header.

        Without keys, only this machine may call the server. A page whose domain resolves to 127.0.0.1 (DNS rebinding)
        has the same origin in the browser, but its requests still carry its own host name.

        Raises:
            Denied: 403, the host is not loopback.
            HTTPBadRequest: the header is not a host with an optional port.
        """
        host = host_of(authority)
        if not self._keyed and not is_loopback(host or ""):
            raise Denied(403, _FOREIGN_HOST.format(authority[:200]))
        if host is None and authority:
            raise web.HTTPBadRequest(text=f"Invalid Host header {authority[:200]!r}")

    def _permits(self, origin: str) -> bool:
        if self._keyed:
            return True
        try:
            return URL(origin).host in _LOOPBACK
        except ValueError:
            return False
