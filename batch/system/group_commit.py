"""Group commit: one thread writes in groups; what arrives while it writes one group makes up the next one.

A disk can do few durable writes a second, however small; a group costs as much as one. Owns the thread and the
order, knows nothing of what is written. Callbacks of the event loop drive it, no task does: where `asyncio.run` ends on
a second Ctrl-C it cancels every task of its loop, past every shield, and what was handed in is written all the same.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Generic, TypeVar

__all__ = ["GroupCommit"]

Item = TypeVar("Item")
Gain = TypeVar("Gain")
Value = TypeVar("Value")


def _once(work: Callable[[], Any]) -> Any:
    return work()


class GroupCommit(Generic[Item, Gain]):
    """One writer thread behind an awaitable skin. Needs a running event loop of asyncio; close it with `aclose`.

    Args:
        work: writes a group, in order, in the thread; gives a value or an exception for each item. If it raises,
            every item of the group gets that exception.
        name: of the thread.
        limit: items in one group at most. Of many thousand that come at once the first does not wait for the last.
        gather_seconds: how long a group that is not full waits for more; 0: for one turn of the event loop.
        slow_seconds: after a group that took longer the next one takes everything, whatever its limit: what costs the
            time is the disk, not the size of the group.
        attempt: does all work of the thread; it may repeat what fails.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Sequence[Gain | Exception]],
        name: str,
        *,
        limit: int = 1000,
        gather_seconds: float = 0.0,
        slow_seconds: float = math.inf,
        attempt: Callable[[Callable[[], Any]], Any] = _once,
    ) -> None:
        self._work, self._attempt = work, attempt
        self._limit, self._gather_seconds, self._slow_seconds = limit, gather_seconds, slow_seconds
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        # No executor: those take nothing more once the main thread has ended, while a run in another thread goes on.
        # A daemon, so that a disk that never answers does not hold the end of the process.
        self._thread = threading.Thread(target=self._do_tasks, name=name, daemon=True)
        self._thread.start()
        self._loop = asyncio.get_running_loop()
        self._pending: list[tuple[Item, asyncio.Future[Gain]]] = []
        self._under_way: list[asyncio.Future[Gain]] = []
        self._turn: asyncio.Future[None] | None = None
        """Done when the next group is; None while there is nothing to write."""
        self._handed_in = self._written = 0
        self._is_slow = False

    @property
    def waiting(self) -> int:
        """How many items are not written yet."""
        return self._handed_in - self._written

    def put(self, item: Item) -> asyncio.Future[Gain]:
        """Hand an item in; await the answer to know that it is written. Cancelling the answer has no effect on that."""
        answer: asyncio.Future[Gain] = self._loop.create_future()
        self._pending.append((item, answer))
        self._handed_in += 1
        if self._turn is None:
            self._turn = self._loop.create_future()
            # One turn of the loop later, so that everything that arrives in this turn goes in one group.
            self._loop.call_soon(self._gather)
        return answer

    def call(self, function: Callable[[], Value]) -> asyncio.Future[Value]:
        """Do something else in the same thread, between two groups; await the answer."""
        return asyncio.wrap_future(self._submit(partial(self._attempt, function)), loop=self._loop)

    async def settled(self) -> None:
        """Wait until everything that was handed in before this call is written or refused, awaited or not."""
        last = self._handed_in
        while self._written < last and self._turn is not None:
            await asyncio.wait([self._turn])

    async def aclose(self) -> None:
        """Write what was handed in, then end the thread."""
        await self.settled()
        self._tasks.put(None)
        self._thread.join()

    def give_up(self, error: Exception) -> None:
        """Close at once: answer everything that is not written with `error`. The thread ends with its present group."""
        for answer in (*self._under_way, *(answer for _, answer in self._pending)):
            if not answer.done():
                answer.set_exception(error)
        self._pending.clear()
        self._tasks.put(None)

    def _gather(self) -> None:
        if self._gather_seconds and len(self._pending) < self._limit:
            self._loop.call_later(self._gather_seconds, self._begin)
        else:
            self._begin()

    def _begin(self) -> None:
        size = len(self._pending) if self._is_slow else self._limit
        group, self._pending = self._pending[:size], self._pending[size:]
        if not group:  # given up meanwhile
            return
        self._under_way = [answer for _, answer in group]
        self._submit(partial(self._timed, [item for item, _ in group])).add_done_callback(self._hand_over)

    def _submit(self, work: Callable[[], Value]) -> Future[Value]:
        done: Future[Value] = Future()
        self._tasks.put((done, work))
        return done

    def _do_tasks(self) -> None:
        while (task := self._tasks.get()) is not None:
            done, work = task
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(work())
                except BaseException as error:  # it belongs to the one who waits
                    done.set_exception(error)
            del task, done, work  # else they live until the next one comes

    def _timed(self, items: list[Item]) -> tuple[Sequence[Gain | Exception], float]:
        """Write a group and measure the time, in the thread: a busy event loop must not look like a slow disk."""
        began = time.perf_counter()
        return self._attempt(partial(self._work, items)), time.perf_counter() - began

    def _hand_over(self, done: Future[tuple[Sequence[Gain | Exception], float]]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nothing waits for the answers
            self._loop.call_soon_threadsafe(self._settle, done)

    def _settle(self, done: Future[tuple[Sequence[Gain | Exception], float]]) -> None:
        answers, self._under_way = self._under_way, []
        failure = done.exception()
        gains: Sequence[Gain | BaseException] = [failure] * len(answers) if failure is not None else done.result()[0]
        if failure is None:
            self._is_slow = done.result()[1] > self._slow_seconds
        for answer, gain in zip(answers, gains, strict=True):
            if answer.done():  # its caller was cancelled; the item is written all the same
                continue
            if isinstance(gain, BaseException):
                answer.set_exception(gain)
            else:
                answer.set_result(gain)
        self._written += len(answers)
        assert self._turn is not None, "a group was under way"
        self._turn.set_result(None)
        self._turn = None
        if self._pending:
            self._turn = self._loop.create_future()
            self._gather()
