"""SIGINT and SIGTERM of the command, outside of the part of a run that collects what is in flight. Edge: the process.

Both mean the same: stop, say so, exit code 4. While modules are loaded they are only noted: compiled ones that are
interrupted may take the process with them. `deferred` is for the library: there the handlers are the program's own.
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
"""Those that came since `postpone`; None where it was not called."""

_listeners: list[Callable[[BaseException | None], None]] = []
_before: Any = None
"""The handler of SIGINT before the first of the listeners."""


def postpone() -> None:
    """Note them until `take`."""
    global _noted  # noqa: PLW0603 - handlers belong to the process, and so does this
    _noted = []
    for number in BOTH:
        signal.signal(number, _note)


def take() -> None:
    """From now on they interrupt; one that came before does so now. Nothing where none were postponed.

    Raises:
        KeyboardInterrupt: one came.
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
    """While it lasts they interrupt whatever waits, also inside of an event loop: a question on the terminal, say."""
    with restored():
        for number in BOTH:
            signal.signal(number, signal.default_int_handler)
        yield


@contextmanager
def restored() -> Iterator[None]:
    """Whoever takes them over in the block: after it their handlers are what they were before."""
    before = {number: signal.getsignal(number) for number in BOTH}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: it is not Python's
                signal.signal(number, handler)


def _note(number: int, _: FrameType | None) -> None:
    if _noted is not None:
        _noted.append(number)


def _interrupt(*_: object) -> None:
    signal.raise_signal(signal.SIGINT)  # whose handler an event loop may have taken over


@contextmanager
def deferred(heard: Callable[[BaseException | None], None]) -> Iterator[None]:
    """While it lasts SIGINT raises nothing in the main thread's event loop, where it could strike any instruction.

    The program's own handler is called as before. What it raises is given to `heard`, else None; `heard` is called
    between two instructions, as a signal handler is. Several blocks may overlap and end in any order. In another
    thread, or where nothing of Python's hears SIGINT, this does nothing.
    """
    global _before  # noqa: PLW0603 - handlers belong to the process, and so does this
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
    """Whether it is that of an `asyncio.run` which has ended, and could not put Python's own back itself."""
    task = getattr(handler, "keywords", {}).get("main_task")
    return task is not None and bool(task.done())
