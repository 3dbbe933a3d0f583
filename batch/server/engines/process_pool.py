"""Supervised worker processes for engines with blocking work.

Owns processes: starts them when jobs need them, hands each one job at a time, brings back its steps, passes a
stop on, replaces those that die. What runs inside is `batch.server.engines.process`; which image comes out is
the renderer's affair. There is no supervising task: whoever needs a worker takes an idle one or starts one.
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

_GONE = (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError, anyio.ClosedResourceError)
"""What a pipe raises whose other end has died."""
_GRACE = 2.0
"""Seconds between asking a worker to leave and killing it."""
_FIRST_REST, _LONGEST_REST = 1.0, 60.0
"""Seconds for which a place starts no worker after one that could not get ready there; each time twice as long."""


def usable_cores() -> int:
    """Cores that this process may run on, 1 at least."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


class WorkerStatistics(NamedTuple):
    """A pool at one moment."""

    idle: int
    """Processes that wait for a job; they may still be loading."""
    busy: int
    """Processes that have a job."""
    started: int
    """Processes started since the pool was made."""
    crashed: int
    """Of those, how many died by themselves."""


@dataclass(slots=True, eq=False)
class _WorkerSlot:
    """Where one worker after the other lives, each made with the same arguments."""

    arguments: JsonObject
    rest: float = 0.0
    """Seconds that it rested last."""
    rests_until: float = -math.inf


class _WorkerProcess:
    """One process and its two pipes."""

    def __init__(self, process: Process, place: _WorkerSlot) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self.place = place
        self._to = process.stdin
        self._from = BufferedByteReceiveStream(process.stdout)
        self._awaited: int | None = None  # length of the frame whose header has been read
        self.finishing = False
        """Whether it was told to stop a job and may not have noticed yet."""

    @classmethod
    async def start(cls, reference: str, place: _WorkerSlot) -> _WorkerProcess:
        # The worker finds modules where we find them, in the same order, whatever its directory is.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # noqa: PTH109 - the import system's own ""
        command = [sys.executable, "-P", "-m", "batch.server.engines", reference, json.dumps(place.arguments)]
        return cls(await anyio.open_process(command, stderr=None, env={**os.environ, "PYTHONPATH": path}), place)

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    async def send(self, message: Message) -> None:
        # Shielded: half a frame would spoil all that follow. Short, because the worker always reads.
        with anyio.CancelScope(shield=True):
            await self._to.send(frame(message))

    async def receive(self) -> Message:
        """The next message; when it is cancelled nothing of the stream is lost."""
        if self._awaited is None:
            (self._awaited,) = HEADER.unpack(await self._from.receive_exactly(HEADER.size))
        body = await self._from.receive_exactly(self._awaited)
        self._awaited = None
        message: Message = pickle.loads(body)  # noqa: S301 - our own child wrote it
        return message

    async def end(self, grace: float) -> str:
        """Make sure that the process is gone, and say how it went."""
        with anyio.CancelScope(shield=True):
            await self._to.aclose()  # which ends a worker that is well
            with anyio.move_on_after(grace):
                await self.process.wait()
            if self.alive:
                self.process.kill()
            await self.process.aclose()
        code = self.process.returncode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit status {code}"


class WorkerPool:
    """Up to `size` worker processes that run one renderer each. Use it on one event loop.

    Args:
        reference: `module:function` that makes the renderer inside each process.
        arguments: keyword arguments of that function; JSON. A list has those of each process, which the one that
            replaces it gets as well; `size` is then its length.
        size: processes at most; None: one a core.
        grace: seconds between asking a worker to leave and killing it.
        first_rest: seconds for which a place starts no worker after one that could not get ready there.
        longest_rest: limit of that time, which doubles with each further one.
    """

    def __init__(
        self,
        reference: str,
        arguments: JsonObject | Sequence[JsonObject] | None = None,
        size: int | None = None,
        *,
        grace: float = _GRACE,
        first_rest: float = _FIRST_REST,
        longest_rest: float = _LONGEST_REST,
    ) -> None:
        if arguments is None or isinstance(arguments, dict):
            arguments = [arguments or {}] * (usable_cores() if size is None else size)
        self.size = len(arguments)
        self._reference = reference
        self._grace, self._first_rest, self._longest_rest = grace, first_rest, longest_rest
        self._idle: list[_WorkerProcess] = []
        self._workers: set[_WorkerProcess] = set()
        self._vacant = [_WorkerSlot(one) for one in arguments]
        self._turns = anyio.Semaphore(self.size)
        self._orders = self._started = self._crashed = 0
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
        """Counts of processes."""
        busy = len(self._workers) - len(self._idle)
        return WorkerStatistics(len(self._idle), busy, self._started, self._crashed)

    def pids(self) -> list[int]:
        """Process ids of the living workers."""
        return sorted(worker.process.pid for worker in self._workers if worker.alive)

    async def start(self, count: int = 1, *, loaded: bool = False) -> None:
        """Start `count` processes side by side; the others start with the first job that finds none idle.

        Args:
            count: processes to start now; no more than `size` ever run.
            loaded: wait until their renderers are loaded, instead of returning while they load.

        Raises:
            WorkerCrashed: with `loaded`, a process that left before its renderer was.
        """

        async def start_one() -> None:
            worker = await self._start_worker()
            if loaded:
                try:
                    await worker.receive()
                except _GONE:
                    raise WorkerCrashed(await self._lose(worker)) from None
            self._idle.append(worker)

        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(min(count, self.size) - len(self._workers)):
                    tasks.start_soon(start_one)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def aclose(self) -> None:
        """End all processes. A job that still runs raises `WorkerCrashed`."""
        self._closed = True
        async with anyio.create_task_group() as tasks:
            for worker in self._workers:
                tasks.start_soon(worker.end, self._grace)
        self._workers.clear()
        self._idle.clear()

    async def prepare(self, job: EngineJob) -> None:
        """Have every process of the pool execute `job`, side by side, before any other job: to see that each can work.

        Raises:
            EngineFailure, WorkerCrashed: the first that failed.
        """
        # As many turns as there are places: none can be over before each has a process of its own.
        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(self.size):
                    tasks.start_soon(self.run, job, lambda *_: None, lambda: False)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def run(self, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        """Execute one job; waits for a free worker where all are busy.

        When the calling task itself is cancelled the worker is told to stop and is free for the next job at
        once; it takes that up when it reaches the end of its present step. A worker that is `NotReady` is ended,
        and its place rests for a while: it would otherwise fail one job after the other, sooner than any could work.

        Raises:
            EngineFailure, EngineCancelled, WorkerCrashed: as `Engine.generate` says.
        """
        async with self._turns:
            worker = await self._take()
            try:
                result = await self._execute(worker, job, on_step, cancelled)
            except NotReady:
                await self._rest(worker)
                raise
            finally:
                self._give_back(worker)
            worker.place.rest = 0.0
            return result

    async def _execute(
        self, worker: _WorkerProcess, job: EngineJob, on_step: OnStep, cancelled: Cancelled
    ) -> EngineResult:
        if cancelled():
            raise EngineCancelled
        self._orders += 1
        number = self._orders
        worker.finishing = False
        try:
            await worker.send(RenderJob(number, job))
            return await self._follow(worker, number, on_step, cancelled)
        except EngineError:
            raise
        except _GONE:
            raise WorkerCrashed(await self._lose(worker)) from None
        except BaseException:  # cancelled, or the caller's own `on_step` raised: nobody waits for the result
            worker.finishing = True
            with suppress(*_GONE):
                await worker.send(StopJob(number))
            raise

    async def _follow(self, worker: _WorkerProcess, number: int, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        told = False
        while True:
            message = await worker.receive()
            match message:
                case Stepped(number=of, done=done, total=total) if of == number:
                    on_step(done, total)
                    if cancelled() and not told:
                        told = True
                        await worker.send(StopJob(number))
                case Done(number=of, result=result) if of == number:
                    return result
                case Raised(number=of, failure=failure) if of == number:
                    raise failure
                case Dropped(number=of) if of == number:
                    raise EngineCancelled
                case _:  # Ready, or the rest of a job that was given up before
                    continue

    def _give_back(self, worker: _WorkerProcess) -> None:
        """Make a worker idle again; one that has yet to notice its stop is taken last."""
        if worker in self._workers:
            self._idle.insert(0 if worker.finishing else len(self._idle), worker)

    async def _take(self) -> _WorkerProcess:
        """An idle worker that lives, else a new one."""
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                return worker
            await self._lose(worker)
        return await self._start_worker()

    async def _start_worker(self) -> _WorkerProcess:
        if self._closed:
            raise WorkerCrashed("the engine is closed")
        place = min(self._vacant, key=lambda place: place.rests_until)
        self._vacant.remove(place)
        try:
            await anyio.sleep_until(place.rests_until)
            worker = await _WorkerProcess.start(self._reference, place)
        except BaseException:
            self._vacant.append(place)
            raise
        if self._closed:  # meanwhile
            await worker.end(self._grace)
            raise WorkerCrashed("the engine is closed")
        self._started += 1
        self._workers.add(worker)
        return worker

    async def _lose(self, worker: _WorkerProcess) -> str:
        """Bury a worker and count it; a sentence about its end."""
        if self._closed:
            return "the engine was closed while the job ran"
        self._crashed += 1
        return f"worker process {worker.process.pid} {await self._vacate(worker)}; the job may be tried again"

    async def _rest(self, worker: _WorkerProcess) -> None:
        """End a worker that cannot get ready, and start none in its place for a while."""
        place = worker.place
        place.rest = min(max(self._first_rest, 2 * place.rest), self._longest_rest)
        place.rests_until = anyio.current_time() + place.rest
        await self._vacate(worker)

    async def _vacate(self, worker: _WorkerProcess) -> str:
        """Make sure that the worker is gone and its place is free; how it went."""
        self._workers.discard(worker)
        try:
            return await worker.end(self._grace)
        finally:
            self._vacant.append(worker.place)
