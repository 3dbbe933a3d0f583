"""An event loop whose clock goes eight times as fast, so that a pause between two tries takes an eighth of its time.

What waits in the loop (pauses, timeouts, the service time of the echo engine) keeps its order and its proportions.
Processes, threads, disks and the wall clock (`time.time`) are as they are. For tests of how often and in which order
something is tried again; tests of how long it takes run on the real clock.

    python -m tests.quick_time restyle-arguments...

gives `restyle ...` on such a loop.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

SPEED = 8


def loop_of(speed: float) -> Callable[[], asyncio.AbstractEventLoop]:
    """Makes loops whose `time()` counts `speed` seconds in each second."""

    class Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
        def select(self, timeout=None):
            return super().select(timeout / speed if timeout else timeout)

    class Loop(asyncio.SelectorEventLoop):
        def time(self) -> float:
            return super().time() * speed

    return lambda: Loop(Selector())


QuickLoop = loop_of(SPEED)


def run_at(speed: float, main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on such a loop: a bound of a minute is met in a moment, without another value in its place."""
    with asyncio.Runner(loop_factory=loop_of(speed)) as runner:
        return runner.run(main)


def quickly(speed: float):
    """A mark: the test, a coroutine function, runs on such a loop."""
    import pytest  # a command that runs on this clock does not need it

    return pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": loop_of(speed)})], ids=["quick"])


def quicken() -> None:
    """Have each loop that this process starts from now on be a quick one."""
    import uvloop

    uvloop.new_event_loop = QuickLoop


if __name__ == "__main__":
    from batch.__main__ import entry

    quicken()
    entry()
