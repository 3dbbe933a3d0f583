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

SPEED = 8


class _QuickSelector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    def select(self, timeout=None):
        return super().select(timeout / SPEED if timeout else timeout)


class QuickLoop(asyncio.SelectorEventLoop):
    """`time()` counts `SPEED` seconds in each second."""

    def __init__(self) -> None:
        super().__init__(_QuickSelector())

    def time(self) -> float:
        return super().time() * SPEED


def quicken() -> None:
    """Have each loop that this process starts from now on be a quick one."""
    import uvloop

    uvloop.new_event_loop = QuickLoop


if __name__ == "__main__":
    from batch.__main__ import entry

    quicken()
    entry()
