"""Run a coroutine while a thread waits for it, with the usual behaviour of Ctrl-C. Edge: the process.

The coroutine runs in its own thread and event loop, so it also works inside a running loop (a notebook). The caller's
thread waits. An interrupt there does not abandon the coroutine: it is passed on, and raised after the coroutine has
ended.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, Generic, TypeVar

import anyio

from batch.system import signals as interrupts

__all__ = ["BlockingCall", "current_call"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_PATIENCE = 1.0
"""Seconds that an interrupt waits for a call that has nothing to finish, such as a plan."""
_LOOK_EVERY = 0.25
"""Seconds between two checks for an end without a signal."""
_SIGINT = signal.SIGINT.name


class BlockingCall(Generic[T]):
    """One call of a coroutine function, and the thread that waits for it."""

    def __init__(self, function: Callable[[], Awaitable[T]], sentence: Callable[[T], str], *, signals: bool) -> None:
        """Create the call; it does not start yet.

        Args:
            function: creates the coroutine.
            sentence: returns the KeyboardInterrupt's message for a result.
            signals: SIGINT and SIGTERM stop the call and raise nothing; its result says that it was stopped.
        """
        self._function, self._sentence, self._are_wanted = function, sentence, signals
        self._outcome: Future[T] = Future()
        self._words: SimpleQueue[str | None] = SimpleQueue()
        """Signal names received in the caller's thread; None: the call has ended."""
        self._interrupts: deque[str] = deque()
        """Signal names that the call's own thread has not handled yet."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scope: anyio.CancelScope | None = None
        self._stop: Callable[[str], None] | None = None
        self._interrupted_at: float | None = None

    def stopped_by(self, stop: Callable[[str], None]) -> None:
        """Pass interrupts, by name, to `stop` from now on; they are raised when the call has ended.

        Before this call, an interrupt cancels the coroutine, and the caller does not wait for its end.
        """
        self._stop = stop

    # --- the caller's thread -------------------------------------------------------------------------------

    def result(self, name: str, backend_options: dict[str, Any]) -> T:
        """Run the call in a thread of this name and wait for it.

        Raises:
            KeyboardInterrupt: it was interrupted; or the exception of the caller's own signal handler. If the call has
                something to finish, it has ended before.
            ValueError: signals are wanted, but this is not the main thread, which alone receives them.
        """
        if self._are_wanted and not _is_main():
            raise ValueError("signals=True works in the main thread only: no other thread receives signals")
        with self._noting_signals():
            threading.Thread(target=self._carry_out, args=(backend_options,), name=name).start()
            raised = self._wait_for_the_end()
        has_ended = self._outcome.done() and not self._outcome.cancelled()
        if raised is None and (self._interrupted_at is None and self._words.empty()):
            return self._outcome.result()
        if raised is None and has_ended and self._are_wanted:
            return self._outcome.result()
        failure = self._outcome.exception() if has_ended else None
        message = [self._sentence(self._outcome.result())] if has_ended and failure is None else []
        raise raised or KeyboardInterrupt(*message) from failure

    def _wait_for_the_end(self) -> BaseException | None:
        """Wait for the end; return the first exception of the caller's own signal handler, or None."""
        raised: BaseException | None = None
        while True:
            try:
                self._wait()
            except BaseException as error:
                raised = raised or error
                self._interrupt(_SIGINT)
            else:
                return raised

    def _wait(self) -> None:
        """Wait until the call has ended, or need not be waited for."""
        while True:
            try:
                word = self._words.get(timeout=_LOOK_EVERY)
            except Empty:
                word = _SIGINT if self._is_left_alone() else ""
            if word is None:
                return
            if word:
                self._interrupt(word)
            interrupted_at = math.inf if self._interrupted_at is None else self._interrupted_at
            if self._stop is None and time.monotonic() - interrupted_at > _PATIENCE:
                return

    def _is_left_alone(self) -> bool:
        """Return whether Ctrl-C ended the main thread while this thread, which receives no signals, waits."""
        if _is_main() or self._interrupted_at is not None:
            return False
        # The second is true while executor threads are joined, the first only afterwards.
        is_over = not threading.main_thread().is_alive() or getattr(threading, "_SHUTTING_DOWN", False)
        return is_over and isinstance(getattr(sys, "last_value", None), KeyboardInterrupt)

    def _interrupt(self, name: str) -> None:
        if self._interrupted_at is None:
            self._interrupted_at = time.monotonic()
            if self._stop is not None:
                _log.warning("%s: collecting jobs in flight; interrupt again to stop at once", name)
        self._interrupts.append(name)
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: the call has just ended
                self._loop.call_soon_threadsafe(self._pass_on)

    @contextmanager
    def _noting_signals(self) -> Iterator[None]:
        """Record signals for the call while the block lasts.

        The caller's own handler stays unless signals are wanted. The handler of an event loop (of `asyncio.run`, of a
        notebook's kernel) is replaced: it can only wake the loop, which this call blocks.
        """
        numbers: tuple[signal.Signals, ...] = ()
        if self._are_wanted:
            numbers = interrupts.BOTH
        elif not _is_main():
            _let_interrupt()
        elif signal.getsignal(signal.SIGINT) is signal.default_int_handler or _is_in_loop():
            numbers = (signal.SIGINT,)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                if handler is not None and signal.getsignal(number) == self._note:  # None: not installed by Python
                    signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._words.put(signal.Signals(number).name)

    # --- the call's own thread -----------------------------------------------------------------------------

    def _carry_out(self, backend_options: dict[str, Any]) -> None:
        try:
            results = anyio.run(self._main, backend_options=backend_options)
        except BaseException as error:
            self._outcome.set_exception(error)
        else:
            for result in results:
                self._outcome.set_result(result)
            self._outcome.cancel()  # without a result
        finally:
            self._words.put(None)

    async def _main(self) -> list[T]:
        """Return the result; empty if the call was cancelled."""
        _current.set(self)
        self._loop = asyncio.get_running_loop()
        with anyio.CancelScope() as self._scope:
            self._pass_on()
            return [await self._function()]
        return []

    def _pass_on(self) -> None:
        while self._interrupts:
            name = self._interrupts.popleft()
            if self._stop is not None:
                self._stop(name)
            elif self._scope is not None:
                self._scope.cancel()


_current: ContextVar[BlockingCall[Any] | None] = ContextVar("_current", default=None)


def current_call() -> BlockingCall[Any] | None:
    """Return the blocking call that runs this coroutine, if any."""
    return _current.get()


def _let_interrupt() -> None:
    """Let SIGINT interrupt a main thread that waits for this one, as Python does by default.

    polars replaces the handler when it is imported, and with its flags `Thread.join` would not notice the signal.
    """
    if callable(signal.getsignal(signal.SIGINT)):
        signal.siginterrupt(signal.SIGINT, True)


def _is_in_loop() -> bool:
    """Return whether an event loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()
