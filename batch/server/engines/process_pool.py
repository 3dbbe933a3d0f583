"""Pool of worker processes for engines with blocking work.

The pool starts processes on demand, sends each one job at a time, forwards its steps, forwards cancellation and
replaces processes that die. `batch.server.engines.process` is the code inside a process. There is no supervising task:
each call of `run` takes an idle worker or starts one.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from batch.server.engines.base import (
    Cancelled,
    EngineCancelled,
    EngineError,
    EngineJob,
    EngineResult,
    NotReady,
    OnStep,
    WorkerCrashed,
)
from batch.server.engines.process import HEADER, Done, Dropped, Message, Raised, RenderJob, Stepped, StopJob, frame
from batch.types import JsonObject

__all__ = ["WorkerPool", "WorkerStatistics", "usable_cores"]

_PIPE_ERRORS = (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError, anyio.ClosedResourceError)
"""Errors that a pipe raises after its other end has died."""
_EXIT_TIMEOUT = 2.0
"""Seconds that a worker has to exit after its stdin is closed; then it is killed."""
_FIRST_BACKOFF, _LONGEST_BACKOFF = 1.0, 60.0
"""Seconds before a slot starts another worker after `NotReady`; doubles with each consecutive failure."""


def usable_cores() -> int:
    """Return the number of cores that this process may run on; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


class WorkerStatistics(NamedTuple):
    """Process counts of a pool."""

    idle: int
    """Processes without a job; they may still be loading."""
    busy: int
    """Processes with a job."""
    started: int
    """Processes started since the pool was created."""
    crashed: int
    """Started processes that ended unexpectedly."""


@dataclass(slots=True, eq=False)
class _WorkerSlot:
    """A position in the pool. A worker and its replacements get the same arguments."""

    arguments: JsonObject
    backoff: float = 0.0
    """Seconds of the last backoff; 0 after a job has succeeded."""
    not_before: float = -math.inf
    """Event loop time before which no worker starts here."""


class _WorkerProcess:
    """One process and its two pipes."""

    def __init__(self, process: Process, slot: _WorkerSlot) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self.slot = slot
        self._stdin = process.stdin
        self._stdout = BufferedByteReceiveStream(process.stdout)
        self._body_size: int | None = None  # of the frame whose header has been read
        self.stopping = False
        """Whether it may still be working on a job that was stopped."""

    @classmethod
    async def start(cls, reference: str, slot: _WorkerSlot) -> _WorkerProcess:
        # The worker must import modules from the same places, in the same order, whatever its working directory is.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # noqa: PTH109 - the import system's own ""
        command = [sys.executable, "-P", "-m", "batch.server.engines", reference, json.dumps(slot.arguments)]
        return cls(await anyio.open_process(command, stderr=None, env={**os.environ, "PYTHONPATH": path}), slot)

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    async def send(self, message: Message) -> None:
        # Shielded, because a partial frame would corrupt the stream. Short, because the worker always reads.
        with anyio.CancelScope(shield=True):
            await self._stdin.send(frame(message))

    async def receive(self) -> Message:
        """Return the next message. Cancellation loses no data of the stream."""
        if self._body_size is None:
            (self._body_size,) = HEADER.unpack(await self._stdout.receive_exactly(HEADER.size))
        body = await self._stdout.receive_exactly(self._body_size)
        self._body_size = None
        message: Message = pickle.loads(body)  # noqa: S301 - only the child process writes to this pipe
        return message

    async def end(self, exit_timeout: float) -> str:
        """End the process and return a phrase that says how it ended."""
        with anyio.CancelScope(shield=True):
            await self._stdin.aclose()  # a working process exits when its stdin closes
            with anyio.move_on_after(exit_timeout):
                await self.process.wait()
            if self.alive:
                self.process.kill()
            await self.process.aclose()
        code = self.process.returncode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"


class WorkerPool:
    """Up to `size` worker processes with one renderer each. Use it on one event loop.

    Args:
        reference: `module:function` that creates the renderer inside each process.
        arguments: keyword arguments of that function, JSON-serializable. A list has one entry per process, which a
            replacement gets as well; its length is then the size of the pool.
        size: maximum number of processes; None: one per core.
        exit_timeout: seconds for a worker to exit before it is killed.
        first_backoff: seconds before the next start in a slot whose worker was not ready; doubles each time.
        longest_backoff: maximum of these seconds.
    """

    def __init__(
        self,
        reference: str,
        arguments: JsonObject | Sequence[JsonObject] | None = None,
        size: int | None = None,
        *,
        exit_timeout: float = _EXIT_TIMEOUT,
        first_backoff: float = _FIRST_BACKOFF,
        longest_backoff: float = _LONGEST_BACKOFF,
    ) -> None:
        if arguments is None or isinstance(arguments, dict):
            arguments = [arguments or {}] * (usable_cores() if size is None else size)
        self.size = len(arguments)
        self._reference = reference
        self._exit_timeout = exit_timeout
        self._first_backoff, self._longest_backoff = first_backoff, longest_backoff
        self._idle: list[_WorkerProcess] = []
        self._workers: set[_WorkerProcess] = set()
        self._free_slots = [_WorkerSlot(one) for one in arguments]
        self._limiter = anyio.Semaphore(self.size)
        self._last_number = self._started = self._crashed = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<WorkerPool {self._reference} size={self.size} {self.statistics()}>"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def statistics(self) -> WorkerStatistics:
        """Return the process counts."""
        busy = len(self._workers) - len(self._idle)
        return WorkerStatistics(len(self._idle), busy, self._started, self._crashed)

    def pids(self) -> list[int]:
        """Return the process ids of the live workers, sorted."""
        return sorted(worker.process.pid for worker in self._workers if worker.alive)

    async def start(self, count: int = 1, *, loaded: bool = False) -> None:
        """Start `count` processes concurrently. The others start when a job finds no idle worker.

        Args:
            count: processes to start now, limited to `size`.
            loaded: wait until their renderers are loaded.

        Raises:
            WorkerCrashed: with `loaded`, a process exited before its renderer was loaded.
        """

        async def start_one() -> None:
            worker = await self._start_worker()
            if loaded:
                try:
                    await worker.receive()
                except _PIPE_ERRORS:
                    raise WorkerCrashed(await self._discard_crashed(worker)) from None
            self._idle.append(worker)

        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(min(count, self.size) - len(self._workers)):
                    tasks.start_soon(start_one)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def aclose(self) -> None:
        """End all processes. Running jobs raise `WorkerCrashed`."""
        self._closed = True
        async with anyio.create_task_group() as tasks:
            for worker in self._workers:
                tasks.start_soon(worker.end, self._exit_timeout)
        self._workers.clear()
        self._idle.clear()

    async def prepare(self, job: EngineJob) -> None:
        """Run `job` once in every process, concurrently, to check that each process can work. Call it before any `run`.

        Raises:
            EngineFailure, WorkerCrashed: the first failure.
        """
        # `size` concurrent runs, and a worker becomes idle only after its run: each slot gets a process.
        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(self.size):
                    tasks.start_soon(self.run, job, lambda *_: None, lambda: False)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def run(self, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        """Execute one job; wait for a free worker if all are busy.

        If the calling task is cancelled, the worker is asked to stop and becomes available at once; it begins the next
        job when its current step ends. A worker that raises `NotReady` is ended and its slot backs off, because it
        would otherwise fail jobs faster than the other workers can complete them.

        Raises:
            EngineFailure, EngineCancelled, WorkerCrashed: see `Engine.generate`.
        """
        async with self._limiter:
            worker = await self._acquire_worker()
            try:
                result = await self._execute(worker, job, on_step, cancelled)
            except NotReady:
                await self._back_off(worker)
                raise
            finally:
                self._release_worker(worker)
            worker.slot.backoff = 0.0
            return result

    async def _execute(
        self, worker: _WorkerProcess, job: EngineJob, on_step: OnStep, cancelled: Cancelled
    ) -> EngineResult:
        if cancelled():
            raise EngineCancelled
        self._last_number += 1
        number = self._last_number
        worker.stopping = False
        try:
            await worker.send(RenderJob(number, job))
            return await self._read_until_done(worker, number, on_step, cancelled)
        except EngineError:
            raise
        except _PIPE_ERRORS:
            raise WorkerCrashed(await self._discard_crashed(worker)) from None
        except BaseException:  # the task was cancelled or `on_step` raised: the result is no longer needed
            worker.stopping = True
            with suppress(*_PIPE_ERRORS):
                await worker.send(StopJob(number))
            raise

    async def _read_until_done(
        self, worker: _WorkerProcess, number: int, on_step: OnStep, cancelled: Cancelled
    ) -> EngineResult:
        stop_sent = False
        while True:
            message = await worker.receive()
            match message:
                case Stepped(number=of_job, done=done, total=total) if of_job == number:
                    on_step(done, total)
                    if cancelled() and not stop_sent:
                        stop_sent = True
                        await worker.send(StopJob(number))
                case Done(number=of_job, result=result) if of_job == number:
                    return result
                case Raised(number=of_job, failure=failure) if of_job == number:
                    raise failure
                case Dropped(number=of_job) if of_job == number:
                    raise EngineCancelled
                case _:  # `Ready`, or a late message of an earlier job that was stopped
                    continue

    def _release_worker(self, worker: _WorkerProcess) -> None:
        """Make a worker idle again; one that is still stopping is taken last."""
        if worker in self._workers:
            self._idle.insert(0 if worker.stopping else len(self._idle), worker)

    async def _acquire_worker(self) -> _WorkerProcess:
        """Return a live idle worker, or start one."""
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                return worker
            await self._discard_crashed(worker)
        return await self._start_worker()

    async def _start_worker(self) -> _WorkerProcess:
        if self._closed:
            raise WorkerCrashed("the engine is closed")
        slot = min(self._free_slots, key=lambda slot: slot.not_before)
        self._free_slots.remove(slot)
        try:
            await anyio.sleep_until(slot.not_before)
            worker = await _WorkerProcess.start(self._reference, slot)
        except BaseException:
            self._free_slots.append(slot)
            raise
        if self._closed:  # while the process started
            await worker.end(self._exit_timeout)
            raise WorkerCrashed("the engine is closed")
        self._started += 1
        self._workers.add(worker)
        return worker

    async def _discard_crashed(self, worker: _WorkerProcess) -> str:
        """Remove a worker that crashed, count it and return the message for its job."""
        if self._closed:
            return "the engine was closed while the job ran"
        self._crashed += 1
        return f"worker process {worker.process.pid} {await self._end_worker(worker)}; the job can be retried"

    async def _back_off(self, worker: _WorkerProcess) -> None:
        """End a worker that is not ready, and delay the next start in its slot."""
        slot = worker.slot
        slot.backoff = min(max(self._first_backoff, 2 * slot.backoff), self._longest_backoff)
        slot.not_before = anyio.current_time() + slot.backoff
        await self._end_worker(worker)

    async def _end_worker(self, worker: _WorkerProcess) -> str:
        """End a worker, free its slot and return a phrase that says how it ended."""
        self._workers.discard(worker)
        try:
            return await worker.end(self._exit_timeout)
        finally:
            self._free_slots.append(worker.slot)
