"""The inside of one worker process: takes jobs from stdin, renders them one by one, answers on stdout.

Started by `batch.server.engines.process_pool` as `python -m batch.server.engines MODULE:FUNCTION JSON`. The function,
called with the JSON object as keyword arguments, gives the renderer. Frames are pickles between a process and its
own parent, each with its length in front; nobody else can write into these pipes.

When the parent is gone, however it went, stdin ends and the process leaves at once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import queue
import signal
import struct
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, NoReturn, Protocol, TypeAlias

from batch.server.engines.base import (
    Cancelled,
    EngineCancelled,
    EngineFailure,
    EngineJob,
    EngineResult,
    OnStep,
)
from batch.system.descriptors import patiently

__all__ = [
    "HEADER",
    "Done",
    "Dropped",
    "Message",
    "Raised",
    "Ready",
    "RenderJob",
    "Renderer",
    "Stepped",
    "StopJob",
    "frame",
    "main",
]

HEADER = struct.Struct("<Q")
"""Length of the pickle that follows, in bytes."""


class Renderer(Protocol):
    """An engine's blocking work. One job at a time, always from the same thread."""

    def render(self, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        """Execute one job; raise `EngineCancelled` where `cancelled()` is true between two steps.

        Raises:
            EngineFailure: the job cannot work.
            EngineCancelled: it was told to stop.
        """


@dataclass(frozen=True, slots=True)
class RenderJob:
    """Parent to worker: do this job."""

    number: int
    job: EngineJob


@dataclass(frozen=True, slots=True)
class StopJob:
    """Parent to worker: give up that job between two steps."""

    number: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Worker to parent: the renderer is loaded."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """Worker to parent: one more step of a job is done."""

    number: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Done:
    """Worker to parent: the job's result."""

    number: int
    result: EngineResult


@dataclass(frozen=True, slots=True)
class Raised:
    """Worker to parent: the job cannot work."""

    number: int
    failure: EngineFailure


@dataclass(frozen=True, slots=True)
class Dropped:
    """Worker to parent: the job was given up."""

    number: int


Message: TypeAlias = RenderJob | StopJob | Ready | Stepped | Done | Raised | Dropped


def frame(message: Message) -> bytes:
    """A message as it goes through a pipe."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


class _Inbox:
    """What the parent sends.

    A thread reads it, so that a stop is heard, and the parent's end noticed, while a job runs.
    """

    def __init__(self, pipe: BinaryIO) -> None:
        self.orders: queue.SimpleQueue[RenderJob] = queue.SimpleQueue()
        self._pipe = pipe
        self._stopped: set[int] = set()
        threading.Thread(target=self._listen, daemon=True, name="inbox").start()

    def is_stopped(self, number: int) -> bool:
        return number in self._stopped

    def forget(self, number: int) -> None:
        self._stopped.discard(number)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while len(head := self._pipe.read(HEADER.size)) == HEADER.size:
                message = pickle.loads(self._pipe.read(HEADER.unpack(head)[0]))  # noqa: S301 - our own parent wrote it
                if isinstance(message, RenderJob):
                    self.orders.put(message)
                elif isinstance(message, StopJob):
                    self._stopped.add(message.number)
        # No clean-up: a renderer may sit in native code for minutes, and nobody waits for it any more.
        os._exit(0)


def _execute(renderer: Renderer, order: RenderJob, inbox: _Inbox, answers: BinaryIO) -> Message:
    """One job to its one last message."""

    def on_step(done: int, total: int) -> None:
        answers.write(frame(Stepped(order.number, done, total)))
        answers.flush()

    def cancelled() -> bool:
        return inbox.is_stopped(order.number)

    try:
        if cancelled():
            return Dropped(order.number)
        render = partial(renderer.render, order.job, on_step, cancelled)
        return Done(order.number, patiently(render, time.sleep))
    except EngineCancelled:
        return Dropped(order.number)
    except EngineFailure as failure:
        return Raised(order.number, failure)
    except Exception as error:  # a defect in one job must not take the loaded model with it
        traceback.print_exc()
        message = f"the engine failed: {type(error).__name__}: {error}"[:500]
        return Raised(order.number, EngineFailure(500, "internal_server_error", message, loc=("body",)))


def main(reference: str, arguments: dict[str, Any]) -> NoReturn:
    """Serve jobs until stdin ends. `reference` is `module:function`."""
    # The process leaves without the interpreter's clean-up, which would wait for the inbox to stop reading.
    try:
        _serve(reference, arguments)
    except BrokenPipeError:  # the parent is gone: nobody is left to answer
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _serve(reference: str, arguments: dict[str, Any]) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        # A terminal's Ctrl-C and a service manager's stop reach the whole group: the parent decides when we end.
        signal.signal(number, signal.SIG_IGN)
    # Whatever a library prints goes to stderr: stdout belongs to the frames.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    inbox = _Inbox(sys.stdin.buffer)
    module, _, function = reference.partition(":")
    renderer: Renderer = getattr(importlib.import_module(module), function)(**arguments)
    message: Message = Ready()
    while True:
        answers.write(frame(message))
        answers.flush()
        order = inbox.orders.get()
        message = _execute(renderer, order, inbox, answers)
        inbox.forget(order.number)
