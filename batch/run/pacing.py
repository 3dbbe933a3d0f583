"""How fast submits are sent: token bucket and pauses. Pure.

No clock and no sleep: every method takes `now` (seconds, any monotonic origin) and returns how long to wait. The caller
sleeps.
"""

from __future__ import annotations

from random import Random

__all__ = ["Pauses", "TokenBucket", "bucket_for"]


class TokenBucket:
    """At most `rate` permits a second on average, at most `burst` at once.

    Each call reserves the next free instant and returns the wait until then, so callers are served in order.
    """

    def __init__(self, rate: float, burst: float = 1.0) -> None:
        if rate <= 0 or burst < 1:
            raise ValueError(f"rate must be above 0 and burst at least 1, not {rate} and {burst}")
        self._rate, self._burst = rate, burst
        self._free_at = float("-inf")

    @property
    def period(self) -> float:
        """Seconds between two permits under load."""
        return 1.0 / self._rate

    def another(self) -> TokenBucket:
        """A full bucket of the same rate and burst."""
        return TokenBucket(self._rate, self._burst)

    def reserve(self, now: float) -> float:
        """Take one permit; return the seconds until it is valid (0.0 if it is valid now)."""
        wait = self.wait(now)
        # `_free_at` is the moment at which the bucket would hold exactly `burst` tokens again.
        self._free_at = max(self._free_at, now) + 1.0 / self._rate
        return wait

    def wait(self, now: float) -> float:
        """Return the seconds that a permit taken now would have to wait; take none."""
        return max(0.0, max(self._free_at, now) + 1.0 / self._rate - self._burst / self._rate - now)


class Pauses:
    """Pauses of all submits: after a 429, while the service is unreachable, while the key is refused."""

    def __init__(self, rng: Random, *, base: float = 0.5, cap: float = 60.0) -> None:
        self._rng, self._base, self._cap = rng, base, cap
        self._until = float("-inf")
        self._in_a_row = 0

    def begin(self, now: float, retry_after: float | None = None) -> float:
        """Pause after a refused submit: the requested time plus exponential backoff. Return the seconds."""
        if now < self._until:  # one pause at a time, however many submits were refused together
            self._until = max(self._until, now + (retry_after or 0.0))
            return self._until - now
        self._in_a_row += 1
        longest = min(self._cap, self._base * 2.0 ** min(self._in_a_row - 1, 30))
        pause = (retry_after or 0.0) + self._rng.uniform(longest / 2, longest)
        self._until = now + pause
        return pause

    @property
    def begun(self) -> bool:
        """Whether any pause ever began; without one the clock need not be read."""
        return self._until > float("-inf")

    def succeeded(self) -> None:
        """Reset the backoff after an accepted submit."""
        self._in_a_row = 0

    def left(self, now: float) -> float:
        """Return the seconds until submits may continue; 0.0 if they may now."""
        return max(0.0, self._until - now)


def bucket_for(rate: float | None) -> TokenBucket | None:
    """A tenth of a second's worth may go at once."""
    return None if rate is None else TokenBucket(rate, burst=max(1.0, rate / 10))
