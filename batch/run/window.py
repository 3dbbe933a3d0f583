"""How many jobs are in flight at once: a window that learns from what the service does. Pure.

No clock: every method takes `now`, in seconds from any monotonic origin.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["NOTICING", "Window", "WindowChange", "queued_share"]


class WindowChange(NamedTuple):
    """A new size of the window, and why."""

    size: int
    reason: str


NOTICING = 0.25
"""Seconds that reads and transfers may add to a job's stay without it having been queued."""


def queued_share(stay: float, inference: float | None, last_queued: float | None) -> float:
    """The share of a finished job's stay at the service in which it waited in the queue, from 0 to 1.

    Args:
        stay: seconds from acceptance to its end, as far as that is known.
        inference: seconds that it was executed, as the service says; None where it does not.
        last_queued: seconds from acceptance to the last read that said IN_QUEUE; None where none did.
    """
    if stay <= 0:
        return 0.0
    if inference is None:
        return min(1.0, (last_queued or 0.0) / stay)
    return max(0.0, 1.0 - (inference + NOTICING) / stay)


class Window:
    """How many jobs may be in flight.

    A fixed size, or one that finds itself. A job that came in as the n-th and was queued for a share q of its stay
    tells that the service works at n (1 - q) of ours at once; the window aims at so many more that `AIM` of a stay is
    queueing, which bridges the time until an end is noticed. One that was hardly queued at all tells that n are not
    too many: twice as many are tried. Each end moves the size by one at most. A 429 cuts it by `CUT`, at most once a
    second; from there on it grows by one place for each window of ends.
    """

    HARDLY = 0.10
    """Share of its stay that a job may be queued and count as not queued."""
    AIM = 0.35
    CLOSE = 0.2
    """Share of the size by which the aim may be missed: a size that never rests makes every stay another length."""
    SPEED = 10.0
    """The last jobs count, so many to a window: more would follow chance, fewer the past."""
    CUT = 0.8

    def __init__(self, size: int, *, floor: int = 1, ceiling: int | None = None) -> None:
        """`ceiling` None: the size is fixed."""
        self.in_flight = 0
        self._size = self._target = float(size)
        self._floor, self._ceiling = floor, ceiling
        self._cut_at = float("-inf")
        self._brake = float("inf")
        """From this size on it grows slowly: what was too much is come near with care."""

    @property
    def size(self) -> int:
        """Places."""
        return int(self._size)

    @property
    def full(self) -> bool:
        """Whether another job has to wait."""
        return self.in_flight >= self.size

    def entered(self) -> int:
        """A job was let in; how many are in flight with it."""
        self.in_flight += 1
        return self.in_flight

    def left(self, came_as: int, queued: float | None) -> WindowChange | None:
        """A job is out of the service's hands; the new size, where it changes.

        Args:
            came_as: what `entered` said of it.
            queued: the share of its stay that it was queued, None where it teaches nothing.
        """
        self.in_flight -= 1
        if self._ceiling is None or queued is None:
            return None
        if queued < self.HARDLY:
            wanted, why = max(2.0 * came_as, self._size), f"the {_th(came_as)} job at once was hardly queued"
        else:
            wanted = came_as * (1.0 - queued) / (1.0 - self.AIM)
            why = f"the {_th(came_as)} job at once was queued for {queued:.0%} of its time"
        # The last tenth of a window counts: fewer would follow chance, more the past.
        self._target += (wanted - self._target) * min(0.5, self.SPEED / self._size)
        by = self._target - self._size
        if abs(by) < max(1.0, self._size * self.CLOSE):
            return None
        up = 1.0 if self._size < self._brake else 1.0 / self._size
        return self._move(up if by > 0 else -1.0, why)

    def throttled(self, now: float) -> WindowChange | None:
        """The service answered 429."""
        if self._ceiling is None or now - self._cut_at < 1.0:
            return None
        self._cut_at = now
        self._brake = self._target = self._size * self.CUT
        return self._move(self._target - self._size, "the service answered 429")

    def _move(self, by: float, reason: str) -> WindowChange | None:
        before = self.size
        self._size = min(float(self._ceiling or before), max(float(self._floor), self._size + by))
        return WindowChange(self.size, reason) if self.size != before else None


def _th(number: int) -> str:
    last = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if number % 100 in {11, 12, 13} else last}"
