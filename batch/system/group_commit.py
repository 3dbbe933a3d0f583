"""Work done in groups by one thread: what arrives while a group is being worked on makes up the next one.

A disk can do few durable writes a second, however small; a group costs as much as one. Owns the thread and the
order, knows nothing of what is done in it.
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
    """Do something in a database that is open, and again while SQLite has no descriptor for a temporary file.

    Args:
        work: one statement, or a transaction that is rolled back when it raises.
    """
    return patiently(work, time.sleep, lacks=_lacks)


def _lacks(error: BaseException) -> bool:
    """SQLite says no more than that it cannot open something."""
    cause: BaseException | None = error
    while cause is not None:
        code = getattr(cause, "sqlite_errorcode", 0) if isinstance(cause, sqlite3.Error) else 0
        if code & 0xFF == sqlite3.SQLITE_CANTOPEN:
            return True
        cause = cause.__cause__
    return lacks_descriptor(error)


class Grouped(Generic[Item, Gain]):
    """One writer thread behind an awaitable skin.

    Args:
        work: does a group, in order, in the thread; gives a value or an exception for each item. If it raises,
            every item of the group gets that exception.
        name: of the thread.
        limit: items in one group at most.
    """

    def __init__(self, work: Callable[[list[Item]], Sequence[Gain | Exception]], name: str, limit: int = 1000) -> None:
        self._work = work
        self._limit = limit
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._loop = asyncio.get_running_loop()
        self._pending: list[tuple[Item, asyncio.Future[Gain]]] = []
        self._busy = False

    def put(self, item: Item) -> asyncio.Future[Gain]:
        """Hand an item in; await the answer to know that it was done."""
        answer: asyncio.Future[Gain] = self._loop.create_future()
        self._pending.append((item, answer))
        if not self._busy:
            self._busy = True
            # One turn of the loop later, so that all that arrives in this turn goes in one group.
            self._loop.call_soon(self._begin)
        return answer

    async def call(self, function: Callable[[], Value]) -> Value:
        """Run something else in the same thread, between two groups."""
        return await self._loop.run_in_executor(self._thread, in_open_database, function)

    async def aclose(self) -> None:
        """Do what was handed in, then end the thread."""
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
            if answer.done():  # whoever waited has gone; the work is done all the same
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
