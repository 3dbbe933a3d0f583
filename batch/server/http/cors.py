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


@lru_cache(maxsize=64)
def host_of(authority: str) -> str | None:
    """The host in a `Host` header; None where the header is not one: no URL could be made with it."""
    try:
        return URL(f"http://{authority}").host if _AUTHORITY.fullmatch(authority) else None
    except ValueError:
        return None


class CorsPolicy:
    """Which other origins a browser may call us from, and under which names.

    Args:
        keyed: whether callers need a key. Without keys only pages of this machine may: else any page that its user
            looks at could submit images and read the answers.
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
        host = host_of(authority)
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
