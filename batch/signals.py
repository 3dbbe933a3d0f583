"""SIGINT and SIGTERM of one session, from when it may spend until its summary is written. Assembly."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import anyio

from batch import interrupts
from batch.run.gate import Stop
from batch.run.ports import Observer
from batch.run.runner import Runner

__all__ = ["Signals", "listening"]


class Signals:
    """What they do: stop the run, in order or at once. What a run leaves is written to its end."""

    def __init__(self, observer: Observer, *, wanted: bool) -> None:
        """`wanted` False: the process's own handlers stay."""
        self._observer, self._are_wanted = observer, wanted
        self._runner: Runner | None = None
        self._early: list[str] = []
        self._is_over = False
        self._begun, self._ready = anyio.Event(), anyio.Event()

    async def begin(self) -> None:
        """From now on they are heard; before, they end the process as they would any other."""
        if self._are_wanted:
            self._begun.set()
            await self._ready.wait()

    @contextmanager
    def stopping(self, runner: Runner) -> Iterator[None]:
        """While it lasts they stop this run: the first in order, the second at once. So do those that came before."""
        self._runner = runner
        for name in self._early:
            self._stop(runner, name)
        try:
            yield
        finally:
            self.over()

    def over(self) -> None:
        """There is nothing to stop any more."""
        self._runner, self._is_over = None, True

    def _stop(self, runner: Runner, name: str) -> None:
        runner.stop(Stop.SIGNAL, name, "collecting what is in flight; once more stops at once")

    def _heard(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._runner is not None:
            self._stop(self._runner, name)
        elif self._is_over:  # the second Ctrl-C of two often comes so late
            self._observer.happened("warning", reason=f"{name}: the results are being written; this ends by itself")
        else:
            self._early.append(name)

    async def listen(self) -> None:
        """Hear them from `begin` on, until cancelled; then the handlers are what they were before."""
        await self._begun.wait()
        with interrupts.restored(), anyio.open_signal_receiver(*interrupts.BOTH) as received:
            self._ready.set()
            async for number in received:
                self._heard(number)


@asynccontextmanager
async def listening(observer: Observer, *, wanted: bool) -> AsyncIterator[Signals]:
    """Be ready to hear them, in a process's main thread; where it is not wanted, the process's own handlers stay."""
    signals = Signals(observer, wanted=wanted)
    failure: BaseException | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(signals.listen)
        try:
            yield signals
        except (Exception, KeyboardInterrupt) as error:  # carried around the task group, which would wrap it
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
