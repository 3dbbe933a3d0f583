"""How many jobs are in flight at once: a window that adapts to the service. Pure.

No clock: every method takes `now`, in seconds from any monotonic origin.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["NOTICING", "Window", "WindowChange", "queued_share"]


class WindowChange(NamedTuple):
    """A new size of the window, and the reason."""

    size: int
    reason: str


NOTICING = 0.25
"""Seconds that reads and transfers may add to a job's stay although it was not queued."""


def queued_share(stay: float, inference: float | None, last_queued: float | None) -> float:
    """Return the share of a finished job's stay at the service that it spent in the queue, from 0 to 1.

    Args:
        stay: seconds from acceptance to its end, as far as known.
        inference: seconds of execution according to the service; None if it does not report them.
        last_queued: seconds from acceptance to the last read that said IN_QUEUE; None without one.
    """
    if stay <= 0:
        return 0.0
    if inference is None:
        return min(1.0, (last_queued or 0.0) / stay)
    return max(0.0, 1.0 - (inference + NOTICING) / stay)


class Window:
    """Limit of the jobs in flight: a fixed size, or one that adapts.

    A job that entered as the n-th in flight and was queued for a share q of its stay shows that the service executes
    n (1 - q) of our jobs at once. The window aims at more than that, so that a share `AIM` of a stay is queueing: this
    bridges the time until an end is noticed. A job that was hardly queued shows that n is not too many, so twice as
    many are tried. Each end moves the size by at most one. A 429 cuts it by the factor `CUT`, at most once a second;
    above that size it grows by one place for each window of ends.
    """

    HARDLY = 0.10
    """Share of its stay up to which a job counts as not queued."""
    AIM = 0.35
    CLOSE = 0.2
    """Tolerated distance from the aim, as a share of the size: a size that changes constantly changes every stay."""
    SPEED = 10.0
    """Each end moves the aim by `SPEED` / size of the distance: a higher value follows noise, a lower one old data."""
    CUT = 0.8

    def __init__(self, size: int, *, floor: int = 1, ceiling: int | None = None) -> None:
        """`ceiling` None: the size is fixed."""
        self.in_flight = 0
        self._size = self._target = float(size)
        self._floor, self._ceiling = floor, ceiling
        self._cut_at = float("-inf")
        self._brake = float("inf")
        """From this size on the window grows slowly: it is where a 429 cut it."""

    @property
    def size(self) -> int:
        """Number of places."""
        return int(self._size)

    @property
    def full(self) -> bool:
        """Whether another job has to wait."""
        return self.in_flight >= self.size

    def entered(self) -> int:
        """Add a job; return how many are in flight, itself included."""
        self.in_flight += 1
        return self.in_flight

    def left(self, came_as: int, queued: float | None) -> WindowChange | None:
        """Remove a job whose request has ended; return the new size if it changes.

        Args:
            came_as: what `entered` returned for it.
            queued: the share of its stay that it was queued, None if it must not affect the size.
        """
        self.in_flight -= 1
        if self._ceiling is None or queued is None:
            return None
        if queued < self.HARDLY:
            wanted, why = max(2.0 * came_as, self._size), f"the {_th(came_as)} concurrent job was hardly queued"
        else:
            wanted = came_as * (1.0 - queued) / (1.0 - self.AIM)
            why = f"the {_th(came_as)} concurrent job was queued for {queued:.0%} of its time"
        # About the last tenth of a window counts: fewer jobs would be noise, more would be old data.
        self._target += (wanted - self._target) * min(0.5, self.SPEED / self._size)
        by = self._target - self._size
        if abs(by) < max(1.0, self._size * self.CLOSE):
            return None
        up = 1.0 if self._size < self._brake else 1.0 / self._size
        return self._move(up if by > 0 else -1.0, why)

    def throttled(self, now: float) -> WindowChange | None:
        """Shrink after a 429."""
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
