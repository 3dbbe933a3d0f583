"""Whose a call is, on its way from the door to the handlers. Knows nothing of keys (`batch.server.http.auth` does)."""

from __future__ import annotations

from typing import Any

from aiohttp import web

__all__ = ["owner_of", "set_owner"]

# Newer versions of aiohttp warn of keys that are plain strings, older ones have no others.
_OWNER: Any = web.RequestKey("owner", str) if hasattr(web, "RequestKey") else "owner"


def set_owner(request: web.Request, owner: str) -> None:
    """Note whose the call is: his name, or nothing where nobody was asked for a key."""
    request[_OWNER] = owner


def owner_of(request: web.Request) -> str:
    """The caller's name; empty on a server without keys, and on routes that are open to everybody."""
    owner: str = request.get(_OWNER, "")
    return owner
