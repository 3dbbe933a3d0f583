"""How long the target keeps results and files, and when to warn that they may expire. Pure.

Contains the retention periods, each with its source, and the texts of the warnings. Each method takes an event and its
time and returns a warning or None. A target that keeps results for good (our own server) never causes a warning.

Sources: fal's pages "queue/result", "inference/webhooks", "data-retention" and the FAQ, read in autumn 2026. With
payload storage on, which is the default and which we never turn off, results are promised for 30 days. We know of no
measurement that the result URL itself works for 30 days, so the guaranteed minimum counts.
"""

from __future__ import annotations

__all__ = [
    "COLLECT_SECONDS",
    "FILE_SECONDS",
    "LARGE_RESULT_BYTES",
    "LARGE_RESULT_SECONDS",
    "RESULT_SECONDS",
    "Expiry",
    "result_seconds",
]

RESULT_SECONDS = 3600.0
"""Guaranteed lifetime, from its completion, of a result below `LARGE_RESULT_BYTES`."""
LARGE_RESULT_BYTES = 10_000
LARGE_RESULT_SECONDS = 360.0
"""Guaranteed lifetime of a larger result: "about six minutes"."""
FILE_SECONDS = 7 * 86400.0
"""Promised lifetime of result files; an expired file cannot be recovered. Independent of the result's lifetime."""
COLLECT_SECONDS = FILE_SECONDS
"""How long an unreadable answer or file is asked for again before it counts as lost. fal keeps payloads longer (30 days
by default) but promises less for the result's URL; a read costs nothing."""
_WARN_AT = 0.5
"""Share of a period that passes before a warning, so that there is still time to act."""


def result_seconds(size_bytes: int) -> float:
    """Return the guaranteed lifetime, in seconds after its completion, of a result of this size."""
    return LARGE_RESULT_SECONDS if size_bytes >= LARGE_RESULT_BYTES else RESULT_SECONDS


class Expiry:
    """Compares the age of unread results and files with their guaranteed lifetimes. Warns once for each kind.

    All instants are Unix seconds. A method that can warn returns a sentence for the user, or None.
    """

    def __init__(self, *, for_good: bool = False, file_seconds: float | None = None) -> None:
        """Create the tracker of one run.

        Args:
            for_good: the target keeps everything until it is fetched, so there is never a warning.
            file_seconds: lifetime of result files that each submit requests; it applies at any target.
        """
        self._for_good = for_good
        self._files_for_good = for_good and file_seconds is None
        self._file_seconds = FILE_SECONDS if file_seconds is None else file_seconds
        self._floor = RESULT_SECONDS
        self._unread_since: float | None = None
        self._warned: set[str] = set()

    def resumed(self, intended_at: float, now: float, *, answered: bool) -> str | None:
        """Note a job resumed from an earlier run, oldest first; `answered`: only its files are still to be fetched."""
        age, kept = now - intended_at, self._file_seconds if answered else self._floor
        if age <= kept:
            return None
        what = "images of a stored answer are" if answered else "result of an open request is"
        return self._once(
            f"resumed {answered}",
            f"the {what} {_span(age)} old, and the target guarantees only {_span(kept)}; collecting what still exists,"
            " oldest first",
            files=answered,
        )

    def read(self) -> None:
        """Note an answered status or result: the next outage counts from zero and warns again."""
        self._unread_since = None
        self._warned.discard("unread")

    def unread(self, now: float) -> str | None:
        """Note one more failed read of a status or result."""
        if self._unread_since is None:
            self._unread_since = now
        silent = now - self._unread_since
        if silent < _WARN_AT * self._floor:
            return None
        return self._once(
            "unread",
            f"no request could be read for {_span(silent)}; finished results are guaranteed for {_span(self._floor)}"
            " only: check the network and the key",
        )

    def collected(self, waited: float, size_bytes: int) -> str | None:
        """Note a fetched result; it had been finished for at most `waited` seconds."""
        self._floor = min(self._floor, result_seconds(size_bytes))
        if waited < _WARN_AT * result_seconds(size_bytes):
            return None
        return self._once(
            "late",
            f"a finished result of {size_bytes:,} bytes may have waited {_span(waited)}, and is guaranteed for"
            f" {_span(result_seconds(size_bytes))} only: lower --max-in-flight",
        )

    def undownloaded(self, failing_since: float, now: float) -> str | None:
        """Note one more failed download of an image; `failing_since`: the time of its first failure."""
        failing = now - failing_since
        if failing < _WARN_AT * self._file_seconds:
            return None
        return self._once(
            "undownloaded",
            f"the download of an image has failed for {_span(failing)}; files are guaranteed for"
            f" {_span(self._file_seconds)} only: check that its host is reachable",
            files=True,
        )

    def _once(self, kind: str, sentence: str, *, files: bool = False) -> str | None:
        if (self._files_for_good if files else self._for_good) or kind in self._warned:
            return None
        self._warned.add(kind)
        return sentence


def _span(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.0f} days"
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"
