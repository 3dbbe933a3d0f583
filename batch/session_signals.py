"""SIGINT, SIGTERM and cancellation of one session, from its first possible cost to its summary. Assembly."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import anyio
import anyio.lowlevel

from batch.run.admission import StopCause, StopRequest
from batch.run.interfaces import Observer
from batch.run.runner import Runner
from batch.system import signals as interrupts
from batch.system.sync_call import current_call

__all__ = ["SessionSignals", "in_order"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_MEANWHILE = "collecting jobs in flight; repeat to stop at once"


class SessionSignals:
    """Stops a run on signals and cancellation: gracefully first, then at once. Its results are always written."""

    def __init__(self, observer: Observer, *, wanted: bool) -> None:
        """`wanted` False: leave the process's signal handlers alone."""
        self._observer, self._are_wanted = observer, wanted
        self._runner: Runner | None = None
        self._early: list[StopRequest] = []
        self.first: StopRequest | None = None
        """The first stop of the session, or None."""
        self._has_begun = self._is_over = False
        self._begun, self._ready = anyio.Event(), anyio.Event()
        self._scope = anyio.CancelScope()
        self._listening = anyio.CancelScope()
        self._until_the_end = ExitStack()
        self.raised: BaseException | None = None
        """Exception of the program's own SIGINT handler, held back until the session has ended."""
        self.ended = anyio.Event()
        """Set when the session has ended."""

    async def begin(self) -> None:
        """Stop gracefully from now on. Before this call, a signal or cancellation ends the session as usual."""
        await anyio.lowlevel.checkpoint()
        self._has_begun = self._scope.shield = True
        call = current_call()
        if call is not None:  # the thread that waits for the call receives the signals
            call.stopped_by(self._on_signal)
        elif self._are_wanted:
            self._begun.set()
            await self._ready.wait()
        else:
            self._loop = asyncio.get_running_loop()
            self._until_the_end.enter_context(interrupts.deferred(self._defer_exception))

    @contextmanager
    def stopping(self, runner: Runner) -> Iterator[None]:
        """Stop this run on signals and cancellation while the block lasts; apply earlier ones at once."""
        self._runner = runner
        for stopping in self._early:
            runner.stop(stopping.why, stopping.reason, _MEANWHILE)
        try:
            yield
        finally:
            self.over()

    def over(self) -> None:
        """Note that there is nothing left to stop."""
        self._runner, self._is_over = None, True

    def cancelled(self) -> None:
        """Handle a cancellation of the caller's task."""
        if self._has_begun:
            _log.warning("cancelled: %s", _MEANWHILE)
            self._stop(StopRequest(StopCause.CANCELLED, "the caller cancelled it"))
        else:
            self._scope.cancel()

    def _defer_exception(self, raised: BaseException | None) -> None:
        """Handle SIGINT, between any two instructions; a handler that raises nothing may cancel the caller instead."""
        if raised is not None:
            self.raised = self.raised or raised
        if raised is not None or self.first is not None:
            self._loop.call_soon_threadsafe(self._on_signal, signal.SIGINT.name)

    def _on_signal(self, name: str) -> None:
        self._stop(StopRequest(StopCause.SIGNAL, name))

    def _stop(self, stopping: StopRequest) -> None:
        self.first = self.first or stopping
        if self._runner is not None:
            self._runner.stop(stopping.why, stopping.reason, _MEANWHILE)
        elif self._is_over:  # typically the second Ctrl-C of two
            reason = f"{stopping.reason}: writing the results; this takes a moment"
            self._observer.happened("warning", reason=reason)
        else:
            self._early.append(stopping)

    async def listen(self) -> None:
        """Receive signals from `begin` until the session has ended; then restore the earlier handlers."""
        with self._listening:
            await self._begun.wait()
            with interrupts.restored(), anyio.open_signal_receiver(*interrupts.BOTH) as received:
                self._ready.set()
                async for number in received:
                    self._on_signal(signal.Signals(number).name)

    async def carry_out(
        self, session: Callable[[SessionSignals], Awaitable[T]], outcome: list[T | BaseException]
    ) -> None:
        """Run the session in a task that the caller's cancellation does not reach after `begin`."""
        try:
            with self._scope:
                outcome.append(await session(self))
        except BaseException as error:  # raised by `in_order`: a task group would wrap it
            outcome.append(error)
        finally:
            self._until_the_end.close()
            self._listening.cancel()
            self.ended.set()


async def in_order(session: Callable[[SessionSignals], Awaitable[T]], observer: Observer, *, wanted: bool) -> T:
    """Run a session; let it shut down gracefully even if its caller is cancelled.

    The first cancellation stops it as a signal does, the second stops it at once; it is raised when the results are
    written.

    Args:
        session: coroutine function; it calls `SessionSignals.begin` before it can cost anything.
        observer: receives warnings.
        wanted: handle SIGINT and SIGTERM, in a process's main thread; else leave the process's handlers alone.
    """
    signals, outcome = SessionSignals(observer, wanted=wanted), list[T | BaseException]()
    cancelled: BaseException | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(signals.listen)
        tasks.start_soon(signals.carry_out, session, outcome)
        while not signals.ended.is_set():
            try:
                with anyio.CancelScope(shield=cancelled is not None):
                    await signals.ended.wait()
            except anyio.get_cancelled_exc_class() as error:
                cancelled = cancelled or error
                signals.cancelled()
    for result in outcome:
        if isinstance(result, BaseException):
            raise result
        if cancelled is None and signals.raised is None:
            return result
    raised = cancelled or signals.raised
    assert raised is not None, "a session without an outcome was cancelled"
    raise raised
