"""Group commit: one thread writes items in groups; items that arrive during a write form the next group.

A disk does few durable writes per second, whatever their size, and a group costs one.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

from batch.system.descriptors import lacks_descriptor, patiently

__all__ = ["Grouped", "in_open_database"]

Item = TypeVar("Item")
Gain = TypeVar("Gain")
Value = TypeVar("Value")


def in_open_database(work: Callable[[], Value]) -> Value:
    """Run work on an open database; retry while SQLite has no file descriptor for a temporary file.

    Args:
        work: one statement, or a transaction that is rolled back when it raises.
    """
    return patiently(work, time.sleep, lacks=_lacks)


def _lacks(error: BaseException) -> bool:
    """Whether a descriptor is missing. SQLite only reports that it cannot open a file."""
    cause: BaseException | None = error
    while cause is not None:
        code = getattr(cause, "sqlite_errorcode", 0) if isinstance(cause, sqlite3.Error) else 0
        if code & 0xFF == sqlite3.SQLITE_CANTOPEN:
            return True
        cause = cause.__cause__
    return lacks_descriptor(error)


class Grouped(Generic[Item, Gain]):
    """A writer thread with an asyncio interface.

    Args:
        work: writes a group, in order, in the thread; returns a value or an exception per item. If it raises, every
            item of the group gets the exception.
        name: the name of the thread.
        limit: maximum number of items per group.
    """

    def __init__(self, work: Callable[[list[Item]], Sequence[Gain | Exception]], name: str, limit: int = 1000) -> None:
        self._work = work
        self._limit = limit
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._loop = asyncio.get_running_loop()
        self._pending: list[tuple[Item, asyncio.Future[Gain]]] = []
        self._busy = False

    def put(self, item: Item) -> asyncio.Future[Gain]:
        """Add an item; the future resolves when it is written."""
        answer: asyncio.Future[Gain] = self._loop.create_future()
        self._pending.append((item, answer))
        if not self._busy:
            self._busy = True
            # In the next iteration of the event loop, so that all items of this one share a group.
            self._loop.call_soon(self._begin)
        return answer

    async def call(self, function: Callable[[], Value]) -> Value:
        """Run a function in the same thread, between two groups."""
        return await self._loop.run_in_executor(self._thread, in_open_database, function)

    async def aclose(self) -> None:
        """Finish pending items, then stop the thread."""
        while self._busy:
            await asyncio.wait([self._pending[-1][1]] if self._pending else [self._running])
            await asyncio.sleep(0)
        self._thread.shutdown()

    def _begin(self) -> None:
        group, self._pending = self._pending[: self._limit], self._pending[self._limit :]
        self._running = self._loop.create_future()
        work = partial(self._work, [item for item, _ in group])
        done = self._thread.submit(in_open_database, work)
        answers = [answer for _, answer in group]
        done.add_done_callback(lambda gains: self._loop.call_soon_threadsafe(self._settle, answers, gains))

    def _settle(self, answers: list[asyncio.Future[Gain]], done: Future[Sequence[Gain | Exception]]) -> None:
        failure = done.exception()
        gains: Sequence[Gain | BaseException] = done.result() if failure is None else [failure] * len(answers)
        for answer, gain in zip(answers, gains, strict=True):
            if answer.done():  # cancelled by the caller; the item is written anyway
                continue
            if isinstance(gain, BaseException):
                answer.set_exception(gain)
            else:
                answer.set_result(gain)
        self._running.set_result(None)
        if self._pending:
            self._begin()
        else:
            self._busy = False
