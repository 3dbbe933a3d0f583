"""What a server counts while it works, as plain numbers. Pure; the time is in what it is told.

Counting stands on the path of every request, so that it is an addition and nothing more: names, labels and text are
made by whoever looks (`metrics`, the page).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from enum import StrEnum

from batch.server.queue.records import CompletedRequest

__all__ = ["SECONDS_BOUNDS", "SHOWN_SECONDS", "EndKind", "ServerStats", "outcome_of", "route_of"]

SECONDS_BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Upper bounds of the engine time's histogram, in seconds: from a rehearsal to a model on a CPU."""
SHOWN_SECONDS = 60
"""How far back `ServerStats.per_second` reaches."""

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
"""Route groups by the first segment of a path; everything else belongs to the queue."""
_READS = {"": "result", "response": "result", "status": "status", "status/stream": "stream", "cancel": "cancel"}


class EndKind(StrEnum):
    """How a request ended, as far as counting goes."""

    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    __hash__ = str.__hash__  # an Enum's own is written in Python, and this is hashed once a request


def outcome_of(ending: CompletedRequest) -> EndKind:
    """A cancelled request is no failure: nobody waits for it any more."""
    if ending.status < 400:
        return EndKind.FINISHED
    return EndKind.CANCELLED if ending.status == 499 else EndKind.FAILED


def route_of(method: str, path: str) -> str:
    """The route group of a call: a word of few, whatever callers send."""
    _, found, rest = path.partition("/requests/")
    if found and not path.startswith("/v1/"):
        return _READS.get(rest.partition("/")[2].rstrip("/"), "other")
    group = _ROUTES.get(path.split("/", 2)[1] if path[:1] == "/" else "?")
    return group or ("submit" if method == "POST" else "other")


class ServerStats:
    """Counts since the start of this process.

    Args:
        accepted_before: requests that the store knew already when the server started.
    """

    def __init__(self, accepted_before: int = 0) -> None:
        self.accepted_before = accepted_before
        self.outcomes: Counter[EndKind] = Counter()
        self.answers: Counter[tuple[str, int]] = Counter()
        """HTTP answers by route group and status."""
        self.engine_seconds_total = 0.0
        self.engine_buckets = [0] * (len(SECONDS_BOUNDS) + 1)
        """Results by engine time: one count a bound, then the rest. Not cumulative."""
        self._seconds: deque[tuple[int, int]] = deque(maxlen=SHOWN_SECONDS + 1)
        """(Unix second, images' requests finished in it), seconds in which nothing finished left out."""

    def answered(self, method: str, path: str, status: int) -> None:
        """Count an HTTP answer."""
        self.answers[route_of(method, path), status] += 1

    def ended(self, ending: CompletedRequest) -> None:
        """Count an ending that is durable."""
        outcome = outcome_of(ending)
        self.outcomes[outcome] += 1
        if ending.inference_time is not None:
            self.engine_seconds_total += ending.inference_time
            self.engine_buckets[bisect_left(SECONDS_BOUNDS, ending.inference_time)] += 1
        if outcome is EndKind.FINISHED:
            second, seconds = int(ending.ended_at), self._seconds
            if seconds and seconds[-1][0] >= second:  # a clock that was set back counts on where it was
                seconds[-1] = (seconds[-1][0], seconds[-1][1] + 1)
            else:
                seconds.append((second, 1))

    def per_second(self, now: float) -> list[int]:
        """Requests finished in each of the last `SHOWN_SECONDS` whole seconds, the oldest first."""
        first = int(now) - SHOWN_SECONDS
        counts = [0] * SHOWN_SECONDS
        for second, count in self._seconds:
            if 0 <= second - first < SHOWN_SECONDS:
                counts[second - first] = count
        return counts
