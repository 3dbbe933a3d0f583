"""The async journal of the runner: calls from many tasks, committed in groups by one thread.

Sets how long a transaction waits for more calls and how long the end waits for the disk. `batch.system.group_commit`
forms the groups; `batch.journal.database` writes. Contains no SQL.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import anyio
import anyio.to_thread

from batch.errors import StorageError
from batch.journal.database import BUSY_SECONDS, JournalDatabase
from batch.journal.events import Event
from batch.journal.records import Counts, KnownJob, OpenJob
from batch.journal.states import State
from batch.system.group_commit import GroupCommit
from batch.types import JobKey

__all__ = ["JournalStatistics", "JournalWriter", "open_journal"]

_PAGE = 256
"""Jobs per read."""
_GATHER_SECONDS = 0.008
"""Delay before a commit, to collect more calls. A transaction costs as much as about twenty of its events. The delay
cuts a busy run's transactions to a tenth and adds 30 ms to a job, which needs four of them."""
_LARGEST_GROUP = 512
"""Calls in a transaction, on a disk that is not slow."""
_SLOW_SECONDS = 0.2
"""After a slower transaction the next one takes all pending calls: a stop waits for the last of them."""
_SETTLE_SECONDS = 30.0
"""How long the end of a run and closing wait for the disk."""

_T = TypeVar("_T")


class JournalStatistics(NamedTuple):
    """Counters of one open journal."""

    events: int
    """Events on disk."""
    commits: int
    """Successful transactions."""
    largest_group: int
    """Most calls in one transaction."""


def _late() -> StorageError:
    return StorageError("the disk did not write the last journal entries in time; run the same command again")


class JournalWriter:
    """A `batch.run.interfaces.Journal` on a file. Created by `open_journal`."""

    def __init__(
        self,
        file: JournalDatabase,
        *,
        slow_seconds: float = _SLOW_SECONDS,
        settle_seconds: float = _SETTLE_SECONDS,
    ) -> None:
        self.file = file
        """The synchronous core, for the threads of the planner and the export."""
        self.session = file.session
        self._one_at_a_time = anyio.CapacityLimiter(1)
        self._group: GroupCommit[tuple[Event, ...], None] = GroupCommit(
            self._commit,
            "journal",
            limit=_LARGEST_GROUP,
            gather_seconds=_GATHER_SECONDS,
            slow_seconds=slow_seconds,
        )
        self._settle_seconds = settle_seconds
        self._refused: Exception | None = None
        self._closed = False
        self._events = self._commits = self._largest_group = 0

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Journal {state} session={self.session} pending={self._group.waiting}>"

    def statistics(self) -> JournalStatistics:
        """Return the counters since the journal was opened."""
        return JournalStatistics(self._events, self._commits, self._largest_group)

    async def record(self, *events: Event) -> None:
        """Write events in this order; durable on return.

        The events are written even if the caller is cancelled while it waits.

        Raises:
            StorageError: the disk refused; nothing of this call is written.
            IllegalTransition: the state machine does not allow an event; nothing of this call is written.
            RuntimeError: the journal is closed.
        """
        if self._closed:
            raise RuntimeError("the journal is closed")
        try:
            await self._group.put(events)
        except Exception as error:
            # One error may belong to the whole group; each caller raises its own copy, with its own traceback.
            raise type(error)(*error.args) from error

    async def settled(self) -> None:
        """Wait until all recorded events are on disk, including those whose callers were cancelled.

        Raises:
            StorageError: the disk refused some events, or did not write them within 30 s.
        """
        with anyio.move_on_after(self._settle_seconds) as scope:
            await self._group.settled()
        if scope.cancelled_caught:
            raise _late()
        if isinstance(self._refused, StorageError):
            raise StorageError(*self._refused.args) from self._refused

    async def find(self, keys: Sequence[JobKey]) -> dict[JobKey, KnownJob]:
        """Return the jobs of the given keys that are in the journal."""
        return await self._in_thread(partial(self.file.find, keys))

    async def entries(self, states: Collection[State]) -> AsyncGenerator[OpenJob, None]:
        """Yield the jobs in these states, oldest intent first; read in pages.

        Each job appears at most once: it must be in one of the states at the start and when its page is read.
        """
        ids = await self._in_thread(partial(self.file.entry_ids, states))
        for start in range(0, len(ids), _PAGE):
            page = ids[start : start + _PAGE]
            for entry in await self._in_thread(partial(self.file.read_entries, page, states)):
                yield entry

    async def uploaded(self, sha256: str, since: float) -> str | None:
        """Return the URL of an image uploaded at or after `since`, or None."""
        return await self._in_thread(partial(self.file.uploaded, sha256, since))

    async def requests(self, ids: Sequence[str]) -> set[str]:
        """Return the request ids that belong to a job or to one of its ended attempts."""
        return await self._in_thread(partial(self.file.requests, ids))

    async def counts(self) -> Counts:
        """Return totals over all sessions."""
        return await self._in_thread(self.file.counts)

    async def aclose(self, clock: Callable[[], float]) -> None:
        """Commit all recorded events, then record the end of the session and close the file.

        Calls that the disk does not write within 30 s get a `StorageError`. A cancellation takes effect after that.
        """
        self._closed = True
        cancelled: asyncio.CancelledError | None = None
        with anyio.CancelScope(shield=True, deadline=anyio.current_time() + self._settle_seconds) as scope:
            is_written = False
            while not is_written:
                try:
                    await self._group.settled()
                    is_written = True
                except asyncio.CancelledError as error:
                    if scope.cancel_called:
                        raise
                    cancelled = error  # asyncio's own, of all tasks at once, which no shield holds off
        if scope.cancelled_caught:
            self._group.give_up(_late())  # and leave the file open: a thread is still stuck in it
        else:
            await self.to_the_end(partial(self.file.close, now=clock()))
            await self._group.aclose()
        if cancelled is not None:
            raise cancelled

    async def to_the_end(self, work: Callable[[], _T]) -> _T:
        """Run `work` in a thread and wait until it ends; a cancellation in the meantime has no effect.

        On a second Ctrl-C `asyncio.run` cancels every task of its loop, even inside a shield.
        """
        result = self._group.call(work)
        with anyio.CancelScope(shield=True):
            while not result.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([result])
        return result.result()

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await anyio.to_thread.run_sync(work, limiter=self._one_at_a_time)

    def _commit(self, calls: list[tuple[Event, ...]]) -> Sequence[Exception | None]:
        """In the thread of the group; None for a call that is on disk."""
        try:
            refusals = self.file.commit(calls)
        except Exception as error:
            self._refused = error
            raise
        self._events += sum(len(call) for call, refusal in zip(calls, refusals, strict=True) if refusal is None)
        self._commits += 1
        self._largest_group = max(self._largest_group, len(calls))
        return refusals


@asynccontextmanager
async def open_journal(
    path: Path,
    *,
    version: str = "",
    clock: Callable[[], float] = time.time,
    lost: str | None = None,
    busy_seconds: float = BUSY_SECONDS,
    slow_seconds: float = _SLOW_SECONDS,
    settle_seconds: float = _SETTLE_SECONDS,
) -> AsyncIterator[JournalWriter]:
    """Open a journal for writing, create it if missing, and begin a session.

    On exit pending events are flushed, shielded from cancellation for at most 30 s.

    Args:
        path: the SQLite file; its folder exists.
        version: version of the tool, stored with the session.
        clock: returns Unix seconds, for the session's start and end.
        lost: error message for a missing or empty file; None creates the file instead.
        busy_seconds: how long a transaction waits for another process that writes.
        slow_seconds: after a transaction that took longer, the next one takes all calls.
        settle_seconds: how long the end waits for the disk.

    Raises:
        RunDirectoryError: not a restyle journal, written by a newer restyle, or missing while `lost` is given.
        StorageError: the disk refused.
    """
    opening = partial(JournalDatabase.open, path, now=clock(), version=version, lost=lost, busy_seconds=busy_seconds)
    file = await anyio.to_thread.run_sync(opening)
    journal = JournalWriter(file, slow_seconds=slow_seconds, settle_seconds=settle_seconds)
    try:
        yield journal
    finally:
        await journal.aclose(clock)
