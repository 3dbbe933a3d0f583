"""Main loop of a worker process: reads jobs from stdin, renders them one at a time, writes replies to stdout.

`batch.server.engines.process_pool` starts it as `python -m batch.server.engines MODULE:FUNCTION JSON`. It calls the
function with the JSON object as keyword arguments to create the renderer. Each frame is a pickle with its length in
front; unpickling is safe because only the parent and its child can write to these pipes.

When the parent ends for any reason, stdin closes and the process exits immediately.
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
"""Length in bytes of the pickle that follows."""


class Renderer(Protocol):
    """The blocking part of an engine. It runs one job at a time, always in the same thread."""

    def render(self, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        """Execute one job. Check `cancelled()` between steps.

        Raises:
            EngineFailure: the job failed with a model error.
            EngineCancelled: `cancelled()` returned true.
        """


@dataclass(frozen=True, slots=True)
class RenderJob:
    """Parent to worker: run this job."""

    number: int
    job: EngineJob


@dataclass(frozen=True, slots=True)
class StopJob:
    """Parent to worker: stop this job before its next step."""

    number: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Worker to parent: the renderer is loaded."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """Worker to parent: the job completed a step."""

    number: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Done:
    """Worker to parent: the result of the job."""

    number: int
    result: EngineResult


@dataclass(frozen=True, slots=True)
class Raised:
    """Worker to parent: the job failed."""

    number: int
    failure: EngineFailure


@dataclass(frozen=True, slots=True)
class Dropped:
    """Worker to parent: the job was stopped."""

    number: int


Message: TypeAlias = RenderJob | StopJob | Ready | Stepped | Done | Raised | Dropped


def frame(message: Message) -> bytes:
    """Serialize a message for a pipe."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


class _Inbox:
    """Messages from the parent.

    A thread reads them, so that a stop request or the end of the parent takes effect while a job runs.
    """

    def __init__(self, pipe: BinaryIO) -> None:
        self.jobs: queue.SimpleQueue[RenderJob] = queue.SimpleQueue()
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
                    self.jobs.put(message)
                elif isinstance(message, StopJob):
                    self._stopped.add(message.number)
        # Exit without cleanup: the renderer may be in native code for minutes, and its result is no longer needed.
        os._exit(0)


def _execute(renderer: Renderer, request: RenderJob, inbox: _Inbox, replies: BinaryIO) -> Message:
    """Run one job and return its final message."""

    def on_step(done: int, total: int) -> None:
        replies.write(frame(Stepped(request.number, done, total)))
        replies.flush()

    def cancelled() -> bool:
        return inbox.is_stopped(request.number)

    try:
        if cancelled():
            return Dropped(request.number)
        render = partial(renderer.render, request.job, on_step, cancelled)
        return Done(request.number, patiently(render, time.sleep))
    except EngineCancelled:
        return Dropped(request.number)
    except EngineFailure as failure:
        return Raised(request.number, failure)
    except Exception as error:  # a bug in one job must not end the process, which would lose the loaded model
        traceback.print_exc()
        message = f"the engine failed: {type(error).__name__}: {error}"[:500]
        return Raised(request.number, EngineFailure(500, "internal_server_error", message, loc=("body",)))


def main(reference: str, arguments: dict[str, Any]) -> NoReturn:
    """Serve jobs until stdin closes. `reference` is `module:function`."""
    # os._exit skips the interpreter's cleanup, which would wait for the inbox thread to stop reading.
    try:
        _serve(reference, arguments)
    except BrokenPipeError:  # the parent has ended
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _serve(reference: str, arguments: dict[str, Any]) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        # Ctrl-C and a service manager's stop signal reach the whole process group; the parent ends its workers itself.
        signal.signal(number, signal.SIG_IGN)
    # Redirect the output of libraries to stderr, because stdout carries the frames.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    inbox = _Inbox(sys.stdin.buffer)
    module, _, function = reference.partition(":")
    renderer: Renderer = getattr(importlib.import_module(module), function)(**arguments)
    message: Message = Ready()
    while True:
        replies.write(frame(message))
        replies.flush()
        request = inbox.jobs.get()
        message = _execute(renderer, request, inbox, replies)
        inbox.forget(request.number)
