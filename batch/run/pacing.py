"""How fast submits are sent: token bucket and pauses. Pure.

No clock and no sleep: every method takes `now` (seconds, any monotonic origin) and says what to do. The
runner does the waiting.
"""

from __future__ import annotations

from random import Random

__all__ = ["Pauses", "TokenBucket", "bucket_for"]


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

    @property
    def period(self) -> float:
        """Seconds from one permit to the next where many ask."""
        return 1.0 / self._rate

    def another(self) -> TokenBucket:
        """A full bucket of the same rate and burst."""
        return TokenBucket(self._rate, self._burst)

    def reserve(self, now: float) -> float:
        """Take one permit; the seconds to wait until it is valid (0.0 where there is one now)."""
        wait = self.wait(now)
        # `_free_at` is the moment at which the bucket would hold exactly `burst` tokens again.
        self._free_at = max(self._free_at, now) + 1.0 / self._rate
        return wait

    def wait(self, now: float) -> float:
        """The seconds that a permit taken now would have to wait; none is taken."""
        return max(0.0, max(self._free_at, now) + 1.0 / self._rate - self._burst / self._rate - now)


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

    @property
    def begun(self) -> bool:
        """Whether there was any: without one nobody need look at the clock."""
        return self._until > float("-inf")

    def succeeded(self) -> None:
        """A submit was accepted: the next pause starts small again."""
        self._in_a_row = 0

    def left(self, now: float) -> float:
        """Seconds until submits may go on; 0.0 where they may now."""
        return max(0.0, self._until - now)


def bucket_for(rate: float | None) -> TokenBucket | None:
    """A tenth of a second's worth may go at once."""
    return None if rate is None else TokenBucket(rate, burst=max(1.0, rate / 10))
