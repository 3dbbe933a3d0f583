"""Raise and read the limit of open files of this process. Edge: the process."""

from __future__ import annotations

import os
from contextlib import suppress
from types import ModuleType

from batch.system.descriptors import ENOUGH, Allowance, limits_to_try

__all__ = ["allowance"]

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows, which has no such limit for sockets
    resource = None

_LISTINGS = ("/proc/self/fd", "/dev/fd")
_GUESS = 40
"""Assumed descriptors in use if the system does not list them."""


def allowance() -> Allowance:
    """Raise the soft limit to the hard one, within reason; return what this process may open now."""
    if resource is None:
        return Allowance(None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = ENOUGH if soft == resource.RLIM_INFINITY else soft
    before = _first(allowed)
    for limit in limits_to_try(soft, hard, resource.RLIM_INFINITY):
        with suppress(OSError, ValueError):  # macOS has an additional limit that it does not report
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            allowed = limit
            break
    return Allowance(allowed, before, min(allowed, _in_use(allowed)))


_firsts: list[int] = []


def _first(limit: int) -> int:
    """Return the limit before it was first raised."""
    if not _firsts:
        _firsts.append(limit)
    return _firsts[0]


def _in_use(allowed: int) -> int:
    for listing in _LISTINGS:
        try:
            return len(os.listdir(listing)) - 1  # noqa: PTH208 - without the listing's own descriptor
        except FileNotFoundError:
            continue
        except OSError:  # no descriptor is free
            return allowed
    return _GUESS
