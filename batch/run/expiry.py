"""How long the target keeps what was paid for, and when somebody has to be told that it may not be long enough. Pure.

Owns the periods, each with its source, and the sentences. Refuses to know the runner: it is told what was read and
when, and answers with a warning or None. A target that keeps results for good (our own server) has no clock.

Sources: fal's pages "queue/result", "inference/webhooks", "data-retention" and the FAQ, read in autumn 2026. With
payload storage on, which is the default and never switched off by us, results are promised for 30 days; that the
result URL itself answers for so long was measured by nobody we know, so the floor is what counts.
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
"""From its completion a result below `LARGE_RESULT_BYTES` can be fetched for so long in any case."""
LARGE_RESULT_BYTES = 10_000
LARGE_RESULT_SECONDS = 360.0
"""The same for any larger one: "about six minutes"."""
FILE_SECONDS = 7 * 86400.0
"""Result files are promised for so long; an expired one cannot be recovered. Their clock is one of their own."""
COLLECT_SECONDS = FILE_SECONDS
"""An answer or a file that could not be read is asked for again within this time; after it, it counts as lost. fal
keeps payloads longer (30 days by default) and promises less for the result's URL; an attempt to read costs nothing."""
_TELL_AT = 0.5
"""Share of a period that may pass before it is worth a warning: then there is still time to do something."""


def result_seconds(size_bytes: int) -> float:
    """For how long a result of this size is certain to be kept after its completion."""
    return LARGE_RESULT_SECONDS if size_bytes >= LARGE_RESULT_BYTES else RESULT_SECONDS


class Expiry:
    """What is waiting at the target, against its clocks. Each kind of warning is given once.

    All instants are Unix seconds. A method that can warn answers with a sentence for a person, or None.
    """

    def __init__(self, *, for_good: bool = False, file_seconds: float | None = None) -> None:
        """Make it for one run.

        Args:
            for_good: the target keeps everything until it is fetched, hence never a warning.
            file_seconds: lifetime of result files that each submit asked for; it holds at any target.
        """
        self._for_good = for_good
        self._files_for_good = for_good and file_seconds is None
        self._file_seconds = FILE_SECONDS if file_seconds is None else file_seconds
        self._floor = RESULT_SECONDS
        self._unread_since: float | None = None
        self._told: set[str] = set()

    def resumed(self, intended_at: float, now: float, *, answered: bool) -> str | None:
        """A job of an earlier run is taken up again, the oldest first; `answered`: only its files are to be fetched."""
        age, kept = now - intended_at, self._file_seconds if answered else self._floor
        if age <= kept:
            return None
        what = "images of a stored answer" if answered else "result of an open request"
        return self._once(
            f"resumed {answered}",
            f"the {what} is {_span(age)} old, and the target promises to keep it for {_span(kept)} only; what is there"
            " is collected now, the oldest first",
            files=answered,
        )

    def read(self) -> None:
        """A status or a result was answered: from here on an outage counts anew, and is told anew."""
        self._unread_since = None
        self._told.discard("unread")

    def unread(self, now: float) -> str | None:
        """A status or result read failed once more."""
        if self._unread_since is None:
            self._unread_since = now
        silent = now - self._unread_since
        if silent < _TELL_AT * self._floor:
            return None
        return self._once(
            "unread",
            f"no request could be read for {_span(silent)}; finished results are certain to be kept for"
            f" {_span(self._floor)} only: look at the network and the key",
        )

    def collected(self, waited: float, size_bytes: int) -> str | None:
        """A result of so many bytes was fetched; it had been finished for at most `waited` seconds."""
        self._floor = min(self._floor, result_seconds(size_bytes))
        if waited < _TELL_AT * result_seconds(size_bytes):
            return None
        return self._once(
            "late",
            f"a finished result of {size_bytes:,} bytes may have waited {_span(waited)} for us, and is certain to be"
            f" kept for {_span(result_seconds(size_bytes))} only: lower --max-in-flight",
        )

    def undownloaded(self, failing_since: float, now: float) -> str | None:
        """An image's download failed once more; `failing_since`: its first failure."""
        failing = now - failing_since
        if failing < _TELL_AT * self._file_seconds:
            return None
        return self._once(
            "undownloaded",
            f"the download of an image has failed for {_span(failing)}; files are promised for"
            f" {_span(self._file_seconds)} only: is its host reachable from here?",
            files=True,
        )

    def _once(self, kind: str, sentence: str, *, files: bool = False) -> str | None:
        if (self._files_for_good if files else self._for_good) or kind in self._told:
            return None
        self._told.add(kind)
        return sentence


def _span(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.0f} days"
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"
