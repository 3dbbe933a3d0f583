"""The limit of open files of this process: raised as far as may be, and read. Edge: the process."""

from __future__ import annotations

import os
from contextlib import suppress
from types import ModuleType

from batch.system.descriptors import ENOUGH, Allowance, limits_to_try

__all__ = ["allowance"]

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows, where sockets have no such limit
    resource = None

_LISTINGS = ("/proc/self/fd", "/dev/fd")
_GUESS = 40
"""Descriptors in use where the system does not list them."""


def allowance() -> Allowance:
    """Raise the soft limit to the hard one, within reason, and say what this process may open now."""
    if resource is None:
        return Allowance(None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = ENOUGH if soft == resource.RLIM_INFINITY else soft
    before = _first(allowed)
    for limit in limits_to_try(soft, hard, resource.RLIM_INFINITY):
        with suppress(OSError, ValueError):  # macOS refuses what is above its own, unnamed, limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            allowed = limit
            break
    return Allowance(allowed, before, min(allowed, _in_use(allowed)))


_firsts: list[int] = []


def _first(limit: int) -> int:
    """The limit as it was when it was first asked for: by now it may be raised."""
    if not _firsts:
        _firsts.append(limit)
    return _firsts[0]


def _in_use(allowed: int) -> int:
    for listing in _LISTINGS:
        try:
            return len(os.listdir(listing)) - 1  # noqa: PTH208 - without the descriptor of the listing itself
        except FileNotFoundError:
            continue
        except OSError:  # not one is free
            return allowed
    return _GUESS
