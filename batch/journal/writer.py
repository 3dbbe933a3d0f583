"""The async journal of the runner: calls from many tasks, committed in groups by one worker thread.

Owns the grouping: calls made during a transaction go into the next one, so that hundreds of callers share one fsync.
Contains no SQL; `database` does the writing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import anyio
import anyio.to_thread

from batch.errors import StorageError
from batch.journal.database import JournalDatabase
from batch.journal.events import Event
from batch.journal.records import Counts, KnownJob, OpenJob
from batch.journal.states import State
from batch.types import JobKey

__all__ = ["JournalStatistics", "JournalWriter", "open_journal"]

_PAGE = 256
"""Jobs per read."""
_GATHER_SECONDS = 0.008
"""Delay before a commit, to collect more calls. A transaction costs as much as about twenty of its events. The delay
cuts a busy run's transactions to a tenth and adds 30 ms to a job, which needs four of them."""
_LARGEST_GROUP = 512
"""Calls per transaction. If ten thousand intents arrive at once, the first must not wait for the last."""
_SLOW_SECONDS = 0.2
"""After a slower transaction the next one takes all pending calls: the disk costs the time, not the size, and a stop
waits for the last call."""
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


class _CommitGroup:
    """Calls that form one transaction, and the result of each."""

    __slots__ = ("calls", "errors", "settled")

    def __init__(self) -> None:
        self.calls: list[tuple[Event, ...]] = []
        self.errors: list[Exception | None] = []
        self.settled = anyio.Event()

    def give_up(self) -> None:
        """Fail all calls: closing stopped waiting for them."""
        self.settle([_late()] * len(self.calls))

    def settle(self, errors: list[Exception | None]) -> None:
        """Report each call's error to its caller; None means that its events are on disk."""
        self.errors = errors
        self.settled.set()


def _late() -> StorageError:
    return StorageError("the disk did not write the last journal entries in time; run the same command again")


class JournalWriter:
    """A `batch.run.interfaces.Journal` on a file. Created by `open_journal`."""

    def __init__(self, file: JournalDatabase) -> None:
        self.file = file
        """The synchronous core, for the threads of the planner and the export."""
        self.session = file.session
        self._one_at_a_time = anyio.CapacityLimiter(1)
        self._group = _CommitGroup()
        self._full: deque[_CommitGroup] = deque()
        """Earlier groups that are full."""
        self._latest = self._group
        """The group of the last call."""
        self._refused: Exception | None = None
        self._is_slow = False
        self._wake = anyio.Event()
        self._shield = anyio.CancelScope(shield=True)
        self._closed = False
        self._events = self._commits = self._largest_group = 0

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        pending = sum(len(group.calls) for group in (*self._full, self._group))
        return f"<Journal {state} session={self.session} pending={pending}>"

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
        group = self._group
        if len(group.calls) >= _LARGEST_GROUP:
            self._full.append(group)
            group = self._group = _CommitGroup()
        place = len(group.calls)
        group.calls.append(events)
        self._latest = group
        self._wake.set()
        await group.settled.wait()
        error = group.errors[place]
        if error is not None:
            # The whole group may share one error: each caller raises its own copy, with its own traceback.
            raise type(error)(*error.args) from error

    async def settled(self) -> None:
        """Wait until all recorded events are on disk, including those whose callers were cancelled.

        Raises:
            StorageError: the disk refused some events, or did not write them within 30 s.
        """
        with anyio.move_on_after(_SETTLE_SECONDS):
            if self._latest.calls:
                await self._latest.settled.wait()
        if self._latest.calls and not self._latest.settled.is_set():
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

    @asynccontextmanager
    async def flushing(self, clock: Callable[[], float]) -> AsyncIterator[None]:
        """Commit events in the background during the block; then flush the rest and close the file."""
        failure: Exception | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._flush_until_closed)
                try:
                    yield
                except Exception as error:  # raised outside the task group, which would wrap it
                    failure = error
                finally:
                    self._closed = True
                    self._shield.deadline = anyio.current_time() + _SETTLE_SECONDS
                    self._wake.set()
        finally:
            if not self._shield.cancelled_caught:  # after a timeout a thread still uses the file
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(partial(self.file.close, now=clock()))
        if failure is not None:
            raise failure

    async def to_the_end(self, work: Callable[[], _T]) -> _T:
        """Run `work` in a thread and wait until it ends; a cancellation in the meantime has no effect.

        On a second Ctrl-C `asyncio.run` cancels every task of its loop, even inside a shield.
        """
        return await self._done_once(work, unless=lambda: False, shield=True)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await anyio.to_thread.run_sync(work, limiter=self._one_at_a_time)

    async def _done_once(self, work: Callable[[], _T], *, unless: Callable[[], bool], shield: bool = False) -> _T:
        once = _Once(work)
        while not once.result.done():
            with _uncancelled(unless=unless), anyio.CancelScope(shield=shield):
                await anyio.to_thread.run_sync(once, limiter=self._one_at_a_time, abandon_on_cancel=True)
        return once.result.result()

    async def _flush_until_closed(self) -> None:
        with self._shield:
            while self._full or self._group.calls or not self._closed:
                with _uncancelled(unless=self._is_given_up):
                    await self._flush_once()
        for group in (*self._full, self._group):
            group.give_up()

    async def _flush_once(self) -> None:
        if not (self._full or self._group.calls):
            self._wake = anyio.Event()
            await self._wake.wait()
            return
        if not (self._full or self._closed):
            await anyio.sleep(_GATHER_SECONDS)
        await self._flush(self._next())

    def _is_given_up(self) -> bool:
        """Whether closing has reached its timeout."""
        return self._shield.cancel_called

    def _next(self) -> list[_CommitGroup]:
        """Return the oldest pending calls as one transaction; on a slow disk, all of them."""
        if self._full and not self._is_slow:
            return [self._full.popleft()]
        groups = [*self._full, self._group]
        self._full.clear()
        self._group = _CommitGroup()
        return groups

    async def _flush(self, groups: list[_CommitGroup]) -> None:
        calls = [call for group in groups for call in group.calls]
        errors: list[Exception | None] = [_late()] * len(calls)
        try:
            errors, seconds = await self._done_once(partial(self._commit, calls), unless=self._is_given_up)
        except Exception as error:  # raised in the callers, which wait for it
            errors = [error] * len(calls)
            self._refused = error
        else:
            refused = {place for place, error in enumerate(errors) if error is not None}
            self._events += sum(len(call) for place, call in enumerate(calls) if place not in refused)
            self._commits += 1
            self._is_slow = seconds > _SLOW_SECONDS
            self._largest_group = max(self._largest_group, len(calls))
        finally:
            for group in groups:
                size = len(group.calls)
                group.settle(errors[:size])
                del errors[:size]

    def _commit(self, calls: list[tuple[Event, ...]]) -> tuple[list[Exception | None], float]:
        """Commit and measure inside the thread, so that a busy event loop does not count as a slow disk."""
        began = time.perf_counter()
        return self.file.commit(calls), time.perf_counter() - began


class _Once(Generic[_T]):
    """Work that runs once, however many threads call it; each call returns when the work is done."""

    __slots__ = ("_begun", "_work", "result")

    def __init__(self, work: Callable[[], _T]) -> None:
        self._work, self._begun = work, threading.Lock()
        self.result: Future[_T] = Future()

    def __call__(self) -> None:
        if not self._begun.acquire(blocking=False):
            wait([self.result])
            return
        try:
            self.result.set_result(self._work())
        except BaseException as error:  # raised in the caller
            self.result.set_exception(error)


@contextmanager
def _uncancelled(*, unless: Callable[[], bool]) -> Iterator[None]:
    """Suppress a cancellation that reaches a shielded task: asyncio's own, which cancels all tasks."""
    try:
        yield
    except anyio.get_cancelled_exc_class():
        if unless():
            raise


@asynccontextmanager
async def open_journal(
    path: Path, *, version: str = "", clock: Callable[[], float] = time.time, lost: str | None = None
) -> AsyncIterator[JournalWriter]:
    """Open a journal for writing, create it if missing, and begin a session.

    On exit pending events are flushed, shielded from cancellation for at most 30 s.

    Args:
        path: the SQLite file; its folder exists.
        version: version of the tool, stored with the session.
        clock: returns Unix seconds, for the session's start and end.
        lost: error message for a missing or empty file; None creates the file instead.

    Raises:
        RunDirectoryError: not a restyle journal, written by a newer restyle, or missing while `lost` is given.
        StorageError: the disk refused.
    """
    opening = partial(JournalDatabase.open, path, now=clock(), version=version, lost=lost)
    journal = JournalWriter(await anyio.to_thread.run_sync(opening))
    async with journal.flushing(clock):
        yield journal
