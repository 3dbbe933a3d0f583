"""File descriptors: how many connections, files and processes a process may open, and what each part gets. Pure.

A process without a free descriptor cannot connect, accept, read a file, import a module or start a process. So a run or
a server limits everything it opens. If a descriptor is missing nevertheless (the whole machine has a limit too), the
work waits and is repeated; the job does not fail.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from batch.errors import InputError

__all__ = [
    "Allowance",
    "ClientShare",
    "ServerShare",
    "client_share",
    "described",
    "lacks_descriptor",
    "limits_to_try",
    "patiently",
    "require",
    "server_share",
]

T = TypeVar("T")

ENOUGH = 65_536
"""Highest limit requested: nothing here needs more, and some programs loop over all descriptors up to the limit."""
_COMMON = 10_240
"""Highest limit that macOS grants where its hard limit is unlimited."""

CONNECTIONS, HINTS, IMAGE_FILES = 256, 512, 8
"""Preferred numbers for a run, if the limit allows them."""
_CLIENT_RESERVE = 14
"""Opened later by a run: the pipes and the log of its endpoint, the results, a manifest file, a module."""
_SERVER_RESERVE = 10
"""Opened later by a server: the listing's database, SQLite's temporary files, a module, a key file."""
_WORKER = 3
"""Descriptors of one worker process: two pipes, and on some systems one of the process itself."""
_OUTGOING = 2
"""Descriptors of one outgoing request: its connection, and the DNS look-up."""
_LEAST = 4
"""Minimum connections for a working run or server."""
_ADVICE = "raise the limit, for example with `ulimit -n 256`"

PATIENCE = 30.0
"""Seconds that a thread waits for a descriptor."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5
_NONE_FREE = frozenset({errno.EMFILE, errno.ENFILE})
_WORDS = "Too many open files"
"""The loader of compiled modules raises ImportError without an error number."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """The limit of one process and its use."""

    allowed: int | None
    """Maximum open descriptors; None: the system has no such limit."""
    before: int | None = None
    """The limit before it was raised."""
    in_use: int = 0

    @property
    def free(self) -> int:
        """How many more may be opened; a large number without a limit."""
        return (ENOUGH if self.allowed is None else self.allowed) - self.in_use


class ClientShare(NamedTuple):
    """Maximum numbers that a run may have open."""

    connections: int
    hints: int
    """Status streams, or webhook connections."""
    files: int
    """Images being read or written."""
    is_bounded: bool
    """Whether the limit reduced any of these numbers."""


class ServerShare(NamedTuple):
    """Maximum numbers that a server may have open."""

    connections: int
    outgoing: int
    """Requests to other servers: source images, webhooks."""
    downloads: int
    """Files being sent to clients."""
    threads: int
    """Threads that read and write files."""
    workers: int
    """Worker processes of the engine."""


def limits_to_try(soft: int, hard: int, infinity: int) -> list[int]:
    """Return soft limits above the current one to request, best first."""
    if soft == infinity:
        return []
    best = ENOUGH if hard == infinity else min(hard, ENOUGH)
    return [limit for limit in dict.fromkeys((best, min(best, _COMMON))) if limit > soft]


def client_share(allowance: Allowance, *, hints: bool, nearby: bool) -> ClientShare:
    """Return what a run may open.

    Args:
        allowance: of its process.
        hints: whether it uses streams or webhooks, which have their own connections.
        nearby: whether its target is the embedded endpoint: a single host, under the same limit.

    Raises:
        InputError: too few descriptors for any run.
    """
    room = allowance.free - _CLIENT_RESERVE
    files = _within(room // 6, 1, IMAGE_FILES)
    heard = min(HINTS, (room - files) // 2) if hints else 0
    # Up to `connections` idle ones to one host are kept while others are active: three times as many in total.
    hosts = 1 if nearby else 3
    connections = min(CONNECTIONS, (room - files - heard) // hosts)
    if nearby and allowance.allowed is not None:  # the endpoint accepts all of them, under the same limit
        connections = min(connections, allowance.allowed // 5)
        heard = min(heard, allowance.allowed // 10)
    if connections < _LEAST:
        raise _too_few(allowance, _LEAST * hosts + 1 + _CLIENT_RESERVE + (_LEAST if hints else 0))
    return ClientShare(connections, heard, files, connections < CONNECTIONS or heard < HINTS * hints)


def server_share(allowance: Allowance, workers: int = 0) -> ServerShare:
    """Return what a server may open.

    Args:
        allowance: of its process.
        workers: worker processes that its engine would start; it gets at least one.

    Raises:
        InputError: too few descriptors for any server.
    """
    room = allowance.free - _SERVER_RESERVE
    started = min(workers, max(1, room // 4 // _WORKER))
    downloads, threads = max(1, room // 8), _within(room // 16, 1, 32)
    outgoing = _within(room // 16, 2, 100)
    connections = room - downloads - threads - outgoing * _OUTGOING - started * _WORKER
    if connections < _LEAST:
        raise _too_few(allowance, _SERVER_RESERVE + 2 + 2 * _OUTGOING + started * _WORKER + _LEAST)
    return ServerShare(connections, outgoing, downloads, threads, started)


def require(allowance: Allowance, more: int) -> None:
    """Check that a process may open that many more.

    Raises:
        InputError: it may not.
    """
    if allowance.free < more:
        raise _too_few(allowance, more)


def described(allowance: Allowance, connections: int) -> str:
    """Describe the limit in one line."""
    if allowance.allowed is None:
        return f"open files: no limit; at most {connections:,} connections at once"
    is_raised = allowance.before is not None and allowance.before < allowance.allowed
    raised = f" (raised from {allowance.before:,})" if is_raised else ""
    return f"open files: {allowance.allowed:,} allowed{raised}; at most {connections:,} connections at once"


def lacks_descriptor(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, means that no descriptor was free."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NONE_FREE:
            return True
        if isinstance(error, ImportError) and _WORDS in str(error):
            return True
        if isinstance(error, BaseExceptionGroup):
            return any(lacks_descriptor(one) for one in error.exceptions)
        error = error.__cause__
    return False


def patiently(
    work: Callable[[], T],
    sleep: Callable[[float], None],
    *,
    lacks: Callable[[BaseException], bool] = lacks_descriptor,
    seconds: float = PATIENCE,
) -> T:
    """Do `work`; repeat it while it fails for lack of a descriptor, since others are closed all the time.

    Args:
        work: leaves nothing half done when it raises.
        sleep: waits that many seconds.
        lacks: whether an error means that no descriptor was free.
        seconds: time limit; then the error is raised.
    """
    pause, waited = _FIRST_PAUSE, 0.0
    while True:
        try:
            return work()
        except Exception as error:
            if waited >= seconds or not lacks(error):
                raise
        sleep(pause)
        waited += pause
        pause = min(2 * pause, _LONGEST_PAUSE)


def _within(number: int, low: int, high: int) -> int:
    return max(low, min(number, high))


def _too_few(allowance: Allowance, more: int) -> InputError:
    return InputError(
        f"open files: {allowance.allowed} are allowed and {allowance.in_use} are in use, {more} more are needed;"
        f" {_ADVICE}"
    )
