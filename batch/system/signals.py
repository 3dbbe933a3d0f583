"""SIGINT and SIGTERM of a command, except while a run collects jobs in flight. Edge: the process.

Both mean: stop, report it, exit code 4. During imports they are only recorded, because interrupting a compiled module
may crash the process. `deferred` is for the library, where the handlers belong to the program.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["BOTH", "at_once", "deferred", "postpone", "restored", "take"]

BOTH = (signal.SIGINT, signal.SIGTERM)
_noted: list[int] | None = None
"""Signals since `postpone`; None if it was not called."""

_listeners: list[Callable[[BaseException | None], None]] = []
_before: Any = None
"""The SIGINT handler before the first listener."""


def postpone() -> None:
    """Record signals until `take`."""
    global _noted  # noqa: PLW0603 - like the handlers, it belongs to the process
    _noted = []
    for number in BOTH:
        signal.signal(number, _note)


def take() -> None:
    """Let signals interrupt again, and apply a recorded one now. Does nothing without `postpone`.

    Raises:
        KeyboardInterrupt: a signal was recorded.
    """
    global _noted
    if _noted is None:
        return
    noted, _noted = _noted, None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)
    if noted:
        raise KeyboardInterrupt


@contextmanager
def at_once() -> Iterator[None]:
    """Let signals interrupt any wait while the block lasts, also in an event loop: a prompt, for example."""
    with restored():
        for number in BOTH:
            signal.signal(number, signal.default_int_handler)
        yield


@contextmanager
def restored() -> Iterator[None]:
    """Restore the signal handlers after the block."""
    before = {number: signal.getsignal(number) for number in BOTH}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not installed by Python
                signal.signal(number, handler)


def _note(number: int, _: FrameType | None) -> None:
    if _noted is not None:
        _noted.append(number)


def _interrupt(*_: object) -> None:
    signal.raise_signal(signal.SIGINT)  # an event loop may have taken over its handler


@contextmanager
def deferred(heard: Callable[[BaseException | None], None]) -> Iterator[None]:
    """While the block lasts, SIGINT raises nothing in the main thread's event loop, where it could hit any instruction.

    The program's own handler is called as before. Its exception, or None, is passed to `heard`, which is called between
    two instructions, like a signal handler. Blocks may overlap and end in any order. In another thread, or without a
    Python handler of SIGINT, this does nothing.
    """
    global _before  # noqa: PLW0603 - like the handlers, it belongs to the process
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    if not _listeners or signal.getsignal(signal.SIGINT) is not _deferring:
        _before = signal.signal(signal.SIGINT, _deferring)
    _listeners.append(heard)
    try:
        yield
    finally:
        _listeners.remove(heard)
        if not _listeners and signal.getsignal(signal.SIGINT) is _deferring:
            signal.signal(signal.SIGINT, signal.default_int_handler if _is_stale(_before) else _before)


def _deferring(number: int, frame: FrameType | None) -> None:
    raised: BaseException | None = None
    try:
        _before(number, frame)
    except BaseException as error:
        raised = error
    for heard in tuple(_listeners):
        heard(raised)


def _is_stale(handler: Any) -> bool:
    """Return whether the handler belongs to an `asyncio.run` that has ended and could not restore Python's own."""
    task = getattr(handler, "keywords", {}).get("main_task")
    return task is not None and bool(task.done())
