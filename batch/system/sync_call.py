"""A coroutine for a thread that waits for it, with Ctrl-C as a user of Python expects it. Edge: the process.

The coroutine runs in a thread and an event loop of its own, so that it also works inside a running loop (a notebook).
The caller's thread waits. An interrupt there does not leave the coroutine behind: it is passed on, and raised once the
coroutine has ended.
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
"""Seconds that an interrupt waits for a call that leaves nothing to be finished, such as a plan."""
_LOOK_EVERY = 0.25
"""Seconds between two looks at what no signal tells."""
_SIGINT = signal.SIGINT.name


class BlockingCall(Generic[T]):
    """One call of a coroutine function, and the thread that waits for it."""

    def __init__(self, function: Callable[[], Awaitable[T]], sentence: Callable[[T], str], *, signals: bool) -> None:
        """Not started yet.

        Args:
            function: makes the coroutine.
            sentence: what a KeyboardInterrupt says about the result.
            signals: SIGINT and SIGTERM stop the call and raise nothing; its result says that it was stopped.
        """
        self._function, self._sentence, self._are_wanted = function, sentence, signals
        self._outcome: Future[T] = Future()
        self._words: SimpleQueue[str | None] = SimpleQueue()
        """Names of signals that came, in the caller's thread; None: the call has ended."""
        self._interrupts: deque[str] = deque()
        """Those of them that the call's own thread has not dealt with."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scope: anyio.CancelScope | None = None
        self._stop: Callable[[str], None] | None = None
        self._interrupted_at: float | None = None

    def stopped_by(self, stop: Callable[[str], None]) -> None:
        """From now on an interrupt calls this, with its name, and is raised when the call has ended.

        Before, it cancels the call, and the caller does not wait for its end.
        """
        self._stop = stop

    # --- the caller's thread -------------------------------------------------------------------------------

    def result(self, name: str, backend_options: dict[str, Any]) -> T:
        """Carry the call out in a thread of this name and wait for it.

        Raises:
            KeyboardInterrupt: there was one, or whatever a signal handler of the caller's own raised; the call has
                ended before where it has something to finish.
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
        told = [self._sentence(self._outcome.result())] if has_ended and failure is None else []
        raise raised or KeyboardInterrupt(*told) from failure

    def _wait_for_the_end(self) -> BaseException | None:
        """What a signal handler of the caller's own raised first meanwhile."""
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
        """Until the call has ended, or need not be waited for."""
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
        """Whether Ctrl-C ended the main thread while this one, which receives no signal, waits."""
        if _is_main() or self._interrupted_at is not None:
            return False
        # The second is true while the threads of executors are waited for, the first only after that.
        is_over = not threading.main_thread().is_alive() or getattr(threading, "_SHUTTING_DOWN", False)
        return is_over and isinstance(getattr(sys, "last_value", None), KeyboardInterrupt)

    def _interrupt(self, name: str) -> None:
        if self._interrupted_at is None:
            self._interrupted_at = time.monotonic()
            if self._stop is not None:
                _log.warning("%s: collecting what is in flight; interrupt once more to stop at once", name)
        self._interrupts.append(name)
        if self._loop is not None:
            with suppress(RuntimeError):  # it is closed: the call has just ended
                self._loop.call_soon_threadsafe(self._pass_on)

    @contextmanager
    def _noting_signals(self) -> Iterator[None]:
        """Note signals for the call while the block lasts.

        A handler of the caller's own stays where nothing else is wanted. One that comes with an event loop (of
        `asyncio.run`, of a notebook's kernel) does not: it can only wake the loop, which this call holds up.
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
                if handler is not None and signal.getsignal(number) == self._note:  # None: it was not Python's
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
            self._outcome.cancel()  # where there is none
        finally:
            self._words.put(None)

    async def _main(self) -> list[T]:
        """The result; empty where the call was cancelled."""
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
    """The call that this coroutine is carried out for, where a thread waits for it."""
    return _current.get()


def _let_interrupt() -> None:
    """Have SIGINT interrupt a main thread that waits for this one, as Python has it.

    polars takes the handler over when it is imported, and with its flags `Thread.join` would not notice the signal.
    """
    if callable(signal.getsignal(signal.SIGINT)):
        signal.siginterrupt(signal.SIGINT, True)


def _is_in_loop() -> bool:
    """Whether an event loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()
