"""How fast and how much at once: token bucket, window, pauses, and polling that learns. Pure.

No clock and no sleep: every method takes `now` (seconds, any monotonic origin) and says what to do. The
runner does the waiting.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from random import Random
from typing import NamedTuple

__all__ = ["Pauses", "PollTimes", "TokenBucket", "Window", "WindowChange", "queued_share"]


class TokenBucket:
    """At most `rate` permits a second on average, at most `burst` at once.

    It hands out places in time: the n-th caller is told how long to wait, so callers are served in order and
    none is passed over.
    """

    def __init__(self, rate: float, burst: float = 1.0) -> None:
        if rate <= 0 or burst < 1:
            raise ValueError(f"rate must be above 0 and burst at least 1, not {rate} and {burst}")
        self._rate, self._burst = rate, burst
        self._free_at = float("-inf")

    def reserve(self, now: float) -> float:
        """Take one permit; the seconds to wait until it is valid (0.0 where there is one now)."""
        # `_free_at` is the moment at which the bucket would hold exactly `burst` tokens again.
        self._free_at = max(self._free_at, now) + 1.0 / self._rate
        return max(0.0, self._free_at - self._burst / self._rate - now)


class Pauses:
    """Times in which no submit is sent: after a 429, while nothing answers, while the key is refused."""

    def __init__(self, rng: Random, *, base: float = 0.5, cap: float = 60.0) -> None:
        self._rng, self._base, self._cap = rng, base, cap
        self._until = float("-inf")
        self._in_a_row = 0

    def begin(self, now: float, retry_after: float | None = None) -> float:
        """A submit was turned away: pause for what the service asked, or a growing random time. The seconds."""
        if now < self._until:  # one pause at a time, however many submits were turned away together
            self._until = max(self._until, now + (retry_after or 0.0))
            return self._until - now
        self._in_a_row += 1
        longest = min(self._cap, self._base * 2.0 ** min(self._in_a_row - 1, 30))
        pause = (retry_after or 0.0) + self._rng.uniform(longest / 2, longest)
        self._until = now + pause
        return pause

    def succeeded(self) -> None:
        """A submit was accepted: the next pause starts small again."""
        self._in_a_row = 0

    def left(self, now: float) -> float:
        """Seconds until submits may go on; 0.0 where they may now."""
        return max(0.0, self._until - now)


class WindowChange(NamedTuple):
    """A new size of the window, and why."""

    size: int
    reason: str


NOTICING = 0.25
"""Seconds, and a tenth of a job's stay: what reads and transfers may add to it without it having been queued."""


def queued_share(stay: float, inference: float | None, last_queued: float | None) -> float:
    """The share of a finished job's stay at the service in which it waited in the queue, from 0 to 1.

    Args:
        stay: seconds from acceptance to when it was noticed to be finished.
        inference: seconds that it was executed, as the service says; None where it does not.
        last_queued: seconds from acceptance to the last read that said IN_QUEUE; None where none did.
    """
    if stay <= 0:
        return 0.0
    if inference is None:
        return min(1.0, (last_queued or 0.0) / stay)
    return max(0.0, 1.0 - (inference + NOTICING) / stay - 0.1)


class Window:
    """How many jobs may be in flight.

    A fixed size, or one that finds itself. What it is told is how long jobs were queued, when they end; so it
    sees the service as it was one stay ago, and moves accordingly. It grows by one for each job that ends while
    it is full and hardly any was queued (so it doubles in the time of one job), slowly while few were, shrinks
    slowly while many were, and is cut by `CUT` on a 429, at most once a second.
    """

    GROW_FAST_BELOW = 0.10
    """Share of their stay that the last jobs were queued."""
    GROW_BELOW = 0.25
    SHRINK_ABOVE = 0.40
    SLOWLY = 0.25
    """Of a place, for each job that ends."""
    CUT = 0.8

    def __init__(self, size: int, *, floor: int = 1, ceiling: int | None = None) -> None:
        """`ceiling` None: the size is fixed."""
        self.in_flight = 0
        self._size = float(size)
        self._floor, self._ceiling = floor, ceiling
        self._queued = 0.0
        self._cut_at = float("-inf")

    @property
    def size(self) -> int:
        """Places."""
        return int(self._size)

    @property
    def full(self) -> bool:
        """Whether another job has to wait."""
        return self.in_flight >= self.size

    def entered(self) -> None:
        """A job was let in."""
        self.in_flight += 1

    def left(self, queued: float | None) -> WindowChange | None:
        """A job is out of the service's hands; the new size, where it changes.

        `queued` is the share of its stay that it was queued, None where it teaches nothing.
        """
        was_full = self.full
        self.in_flight -= 1
        if self._ceiling is None or queued is None:
            return None
        # The last tenth of a window counts: fewer would follow chance, more the past.
        self._queued += (queued - self._queued) * min(0.5, 10.0 / self._size)
        if was_full and self._queued < self.GROW_BELOW:
            by = 1.0 if self._queued < self.GROW_FAST_BELOW else self.SLOWLY
            return self._move(by, f"full, and jobs were queued for {self._queued:.0%} of their time")
        if self._queued > self.SHRINK_ABOVE:
            return self._move(-self.SLOWLY, f"jobs were queued for {self._queued:.0%} of their time")
        return None

    def throttled(self, now: float) -> WindowChange | None:
        """The service answered 429."""
        if self._ceiling is None or now - self._cut_at < 1.0:
            return None
        self._cut_at = now
        return self._move(self._size * self.CUT - self._size, "the service answered 429")

    def _move(self, by: float, reason: str) -> WindowChange | None:
        before = self.size
        self._size = min(float(self._ceiling or before), max(float(self._floor), self._size + by))
        return WindowChange(self.size, reason) if self.size != before else None


class PollTimes:
    """When to read a status next, learned from how long finished jobs took.

    Seconds count from the acceptance of the job. Knowing nothing it waits a share of the time already
    waited; knowing finished jobs it aims at the next step of the quantiles of those that took longer than
    this one already did.
    """

    FIRST = 0.05
    """Of the very first job, seconds: our own echo engine answers within milliseconds."""
    SHARE = 0.25
    FINEST = 0.02
    """No two reads of one job come closer, seconds, nor closer than `CLOSEST` of the time it already took."""
    CLOSEST = 0.03
    LONGEST = 10.0
    MEMORY = 128
    """Finished jobs that are remembered. The service's speed changes: one that becomes six times as fast is
    followed within some 300 jobs."""
    STEP = 0.34
    """Share of the remaining probability that one wait covers."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    GUESS = 0.8
    """Where the end of a job is taken to lie, as a share of when it was noticed, if the first read already
    found it finished. Below 1, so that reads move forward when the service becomes faster."""

    def took(self, unfinished: float | None, noticed: float) -> None:
        """A job was seen finished after `noticed` seconds; `unfinished`: when it was last seen not to be."""
        seconds = noticed * self.GUESS if unfinished is None else (unfinished + noticed) / 2
        if len(self._recent) == self.MEMORY:
            del self._sorted[bisect_right(self._sorted, self._recent.popleft()) - 1]
        self._recent.append(seconds)
        insort(self._sorted, seconds)

    def delay(self, waited: float) -> float:
        """Seconds to sleep before the next read of a job that was accepted `waited` seconds ago."""
        least = max(self.FINEST, waited * self.CLOSEST)
        if not self._sorted:
            return min(self.LONGEST, max(self.FIRST, waited * self.SHARE))
        shorter = bisect_right(self._sorted, waited)
        longer = len(self._sorted) - shorter
        if longer == 0:  # slower than all that we know
            return min(self.LONGEST, max(least, waited * self.SHARE))
        aim = self._sorted[shorter + min(longer - 1, int(longer * self.STEP))]
        return min(self.LONGEST, max(least, aim - waited))
