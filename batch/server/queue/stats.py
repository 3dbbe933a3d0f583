"""Counters of a running server. Pure; callers pass the time.

Counting is on the path of every request, so that it only adds numbers; `metrics` and the page add names and labels.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from enum import StrEnum

from batch.server.queue.records import CompletedRequest

__all__ = ["SECONDS_BOUNDS", "SHOWN_SECONDS", "EndKind", "ServerStats", "outcome_of", "route_of"]

SECONDS_BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Upper bounds of the histogram of engine times, in seconds: from the echo engine to a model on a CPU."""
SHOWN_SECONDS = 60
"""Length of `ServerStats.per_second`."""

_ROUTES = {
    "": "page",
    ".well-known": "keys",
    "files": "files",
    "health": "health",
    "metrics": "metrics",
    "openapi.json": "schema",
    "page": "page",
    "run": "run",
    "static": "page",
    "storage": "upload",
    "v1": "platform",
}
"""Route groups by the first segment of a path; every other path belongs to the queue."""
_READS = {"": "result", "response": "result", "status": "status", "status/stream": "stream", "cancel": "cancel"}


class EndKind(StrEnum):
    """The outcome of a request, for counting."""

    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    __hash__ = str.__hash__  # Enum.__hash__ is slow Python code, and this is hashed for each request


def outcome_of(completed: CompletedRequest) -> EndKind:
    """Return how a request ended. A cancelled request does not count as failed."""
    if completed.status < 400:
        return EndKind.FINISHED
    return EndKind.CANCELLED if completed.status == 499 else EndKind.FAILED


def route_of(method: str, path: str) -> str:
    """Return the route group of an HTTP request: one of a fixed set, whatever the path."""
    _, found, rest = path.partition("/requests/")
    if found and not path.startswith("/v1/"):
        return _READS.get(rest.partition("/")[2].rstrip("/"), "other")
    group = _ROUTES.get(path.split("/", 2)[1] if path[:1] == "/" else "?")
    return group or ("submit" if method == "POST" else "other")


class ServerStats:
    """Counts since the start of this process.

    Args:
        accepted_before: requests that the store contained when the server started.
    """

    def __init__(self, accepted_before: int = 0) -> None:
        self.accepted_before = accepted_before
        self.outcomes: Counter[EndKind] = Counter()
        self.answers: Counter[tuple[str, int]] = Counter()
        """HTTP responses by route group and status."""
        self.engine_seconds_total = 0.0
        self.engine_buckets = [0] * (len(SECONDS_BOUNDS) + 1)
        """Results by engine time: one count per bound, then one for larger values. Not cumulative."""
        self._seconds: deque[tuple[int, int]] = deque(maxlen=SHOWN_SECONDS + 1)
        """(Unix second, requests that succeeded in it); empty seconds are omitted."""

    def answered(self, method: str, path: str, status: int) -> None:
        """Count an HTTP response."""
        self.answers[route_of(method, path), status] += 1

    def ended(self, completed: CompletedRequest) -> None:
        """Count a request whose outcome is durable."""
        outcome = outcome_of(completed)
        self.outcomes[outcome] += 1
        if completed.inference_time is not None:
            self.engine_seconds_total += completed.inference_time
            self.engine_buckets[bisect_left(SECONDS_BOUNDS, completed.inference_time)] += 1
        if outcome is EndKind.FINISHED:
            second, seconds = int(completed.ended_at), self._seconds
            if seconds and seconds[-1][0] >= second:  # the clock was set back: count in the latest second
                seconds[-1] = (seconds[-1][0], seconds[-1][1] + 1)
            else:
                seconds.append((second, 1))

    def per_second(self, now: float) -> list[int]:
        """Return the requests that succeeded in each of the last `SHOWN_SECONDS` whole seconds, oldest first."""
        first = int(now) - SHOWN_SECONDS
        counts = [0] * SHOWN_SECONDS
        for second, count in self._seconds:
            if 0 <= second - first < SHOWN_SECONDS:
                counts[second - first] = count
        return counts
