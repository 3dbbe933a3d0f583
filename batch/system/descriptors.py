"""File descriptors: how many connections, files and processes a process may have open, and who gets them. Pure.

A process without a free descriptor cannot connect, accept, read a file, import a module or start a process. So all that
a run or a server opens is bounded by what its limit allows. Should one be missing all the same (the limit is also
one of the whole machine), the work waits and is done again: it is never a job's fault.
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
"""A limit above it is not asked for: nothing here needs more, and some programs look at every number up to theirs."""
_COMMON = 10_240
"""What macOS grants at most where it calls its hard limit unlimited."""

CONNECTIONS, HINTS, IMAGE_FILES = 256, 512, 8
"""What a run opens where the limit leaves it the choice."""
_CLIENT_RESERVE = 14
"""Opened later by a run: the pipes and the log of its endpoint, the results, a manifest file, a module."""
_SERVER_RESERVE = 10
"""Opened later by a server: the listing's database, SQLite's temporary files, a module, a key file."""
_WORKER = 3
"""Of one worker process: two pipes, and on some systems a descriptor of the process itself."""
_OUTGOING = 2
"""Of one outgoing request: its connection, and what the look-up of its host opens."""
_LEAST = 4
"""Connections below which nothing works any more."""
_ADVICE = "raise the limit, for example with `ulimit -n 256`"

PATIENCE = 30.0
"""Seconds for which a thread waits for a descriptor."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5
_NONE_FREE = frozenset({errno.EMFILE, errno.ENFILE})
_WORDS = "Too many open files"
"""The loader of compiled modules has no error numbers."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one process may open."""

    allowed: int | None
    """Descriptors at once; None: this system has no such limit."""
    before: int | None = None
    """What it was before it was raised."""
    in_use: int = 0

    @property
    def free(self) -> int:
        """How many more; many where there is no limit."""
        return (ENOUGH if self.allowed is None else self.allowed) - self.in_use


class ClientShare(NamedTuple):
    """What a run may open at once."""

    connections: int
    hints: int
    """Status streams, or connections of webhooks."""
    files: int
    """Images that are read or written."""
    is_bounded: bool
    """Whether the limit, and not our own choice, decided it."""


class ServerShare(NamedTuple):
    """What a server may open at once."""

    connections: int
    outgoing: int
    """Requests to other servers: source images, webhooks."""
    downloads: int
    """Files that are sent to callers."""
    threads: int
    """Threads that read and write files."""
    workers: int
    """Processes of the engine."""


def limits_to_try(soft: int, hard: int, infinity: int) -> list[int]:
    """Soft limits worth asking for, the best first; those up to the present one are not worth it."""
    if soft == infinity:
        return []
    best = ENOUGH if hard == infinity else min(hard, ENOUGH)
    return [limit for limit in dict.fromkeys((best, min(best, _COMMON))) if limit > soft]


def client_share(allowance: Allowance, *, hints: bool, nearby: bool) -> ClientShare:
    """What a run may open.

    Args:
        allowance: of its process.
        hints: whether it hears of ends by streams or webhooks, which have connections of their own.
        nearby: whether its target is the embedded endpoint: one host, under the same limit.

    Raises:
        InputError: too little is free for any run.
    """
    room = allowance.free - _CLIENT_RESERVE
    files = _within(room // 6, 1, IMAGE_FILES)
    heard = min(HINTS, (room - files) // 2) if hints else 0
    # Idle connections to one host are kept while there are active ones to another: three times as many in all.
    hosts = 1 if nearby else 3
    connections = min(CONNECTIONS, (room - files - heard) // hosts)
    if nearby and allowance.allowed is not None:  # its endpoint has to take them all
        connections = min(connections, allowance.allowed // 5)
        heard = min(heard, allowance.allowed // 10)
    if connections < _LEAST:
        raise _too_few(allowance, _LEAST * hosts + 1 + _CLIENT_RESERVE + (_LEAST if hints else 0))
    return ClientShare(connections, heard, files, connections < CONNECTIONS or heard < HINTS * hints)


def server_share(allowance: Allowance, workers: int = 0) -> ServerShare:
    """What a server may open.

    Args:
        allowance: of its process.
        workers: processes that its engine would start; it gets at least one of them.

    Raises:
        InputError: too little is free for any server.
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
    """Say what the limit allows, in one line."""
    if allowance.allowed is None:
        return f"open files: no limit; at most {connections:,} connections at once"
    is_raised = allowance.before is not None and allowance.before < allowance.allowed
    raised = f" (raised from {allowance.before:,})" if is_raised else ""
    return f"open files: {allowance.allowed:,} allowed{raised}; at most {connections:,} connections at once"


def lacks_descriptor(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that no descriptor was free."""
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
    """Do `work`, and again while it fails for want of a descriptor: others close theirs every moment.

    Args:
        work: leaves nothing half done when it raises.
        sleep: waits that many seconds.
        lacks: whether an error means that no descriptor was free.
        seconds: for which it is done again; then its error is raised.
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
