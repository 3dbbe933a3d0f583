"""How fast and how much at once: token bucket, window, pauses, and polling that learns. Pure.

No clock and no sleep: every method takes `now` (seconds, any monotonic origin) and says what to do. The
runner does the waiting.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

__all__ = ["Pauses", "PollTimes", "TokenBucket", "Window", "WindowChange"]


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


@dataclass(slots=True)
class _Load:
    queued: int = 0
    running: int = 0


class Window:
    """How many jobs may be in flight.

    A fixed size, or one that finds itself: it grows by one for each job that ends while it is full and
    little of it is still queued (so it doubles in the time of one job), shrinks by one for each that ends
    while most of it waits in the service's queue, and is cut by `CUT` on a 429, at most once a second.
    """

    GROW_BELOW = 0.25
    """Share of the window still queued, under which it grows."""
    SHRINK_ABOVE = 0.60
    CUT = 0.8

    def __init__(self, size: int, *, floor: int = 1, ceiling: int | None = None) -> None:
        """`ceiling` None: the size is fixed."""
        self.size = size
        self.in_flight = 0
        self._floor, self._ceiling = floor, ceiling
        self._load = _Load()
        self._cut_at = float("-inf")

    @property
    def full(self) -> bool:
        """Whether another job has to wait."""
        return self.in_flight >= self.size

    def entered(self) -> None:
        """A job was let in; until the service says more it counts as neither queued nor running."""
        self.in_flight += 1

    def seen(self, before: str | None, after: str) -> None:
        """A status read told where a job is (`IN_QUEUE`, `IN_PROGRESS`, `COMPLETED`)."""
        self._count(before, -1)
        self._count(after, +1)

    def left(self, last_seen: str | None) -> WindowChange | None:
        """A job is out of the service's hands; the new size, where it changes."""
        was_full = self.full
        self._count(last_seen, -1)
        self.in_flight -= 1
        if self._ceiling is None:
            return None
        queued_share = self._load.queued / max(self.size, 1)
        if was_full and queued_share < self.GROW_BELOW and self.size < self._ceiling:
            self.size += 1
            return WindowChange(self.size, f"full, and {queued_share:.0%} of it queued")
        if queued_share > self.SHRINK_ABOVE and self.size > self._floor:
            self.size -= 1
            return WindowChange(self.size, f"{queued_share:.0%} of it waits in the service's queue")
        return None

    def throttled(self, now: float) -> WindowChange | None:
        """The service answered 429."""
        if self._ceiling is None or now - self._cut_at < 1.0:
            return None
        self._cut_at = now
        self.size = max(self._floor, int(self.size * self.CUT))
        return WindowChange(self.size, "the service answered 429")

    def _count(self, state: str | None, by: int) -> None:
        if state == "IN_QUEUE":
            self._load.queued += by
        elif state == "IN_PROGRESS":
            self._load.running += by


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
