"""SIGINT and SIGTERM of the command, outside of the part of a run that collects what is in flight. Edge: the process.

Both mean the same: stop, say so, exit code 4. While modules are loaded they are only noted: compiled ones that are
interrupted may take the process with them.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["BOTH", "at_once", "postpone", "restored", "take"]

BOTH = (signal.SIGINT, signal.SIGTERM)
_noted: list[int] | None = None
"""Those that came since `postpone`; None where it was not called."""


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
