"""Observers of a run: progress bar, plain lines and log. Edge: writes to streams and files.

The runner calls an observer for each event and never waits for it; an observer decides nothing. Log lines have a stable
`action` word, so that they can be searched.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Never, Self, TextIO

import orjson
from tqdm import tqdm

from batch.errors import StorageError
from batch.run.interfaces import Observer
from batch.run.waits import Overview
from batch.types import Json

__all__ = ["CountBar", "JsonLog", "ObserverGroup", "PlainLines", "ProgressBar", "ProgressCounter", "pause_in"]


class ObserverGroup(Observer):
    """Passes everything on to each of its observers, in order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def happened(self, action: str, **facts: Json) -> None:
        """Pass on."""
        for observer in self._observers:
            observer.happened(action, **facts)

    def expected(self, jobs: int, already_done: int) -> None:
        """Pass on."""
        for observer in self._observers:
            observer.expected(jobs, already_done)


@dataclass(slots=True)
class ProgressCounter(Observer):
    """Counts what a progress display shows."""

    jobs: int = 0
    already_done: int = 0
    done: int = 0
    failed: int = 0
    held: int = 0
    in_flight: int = 0
    spent_usd: float = 0.0
    """Spent by this run; `spent_total_usd` is spent by all runs of its directory."""
    spent_total_usd: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    note: str = ""
    """The last thing that slowed the run down: a pause, a refused key, an unreachable service."""
    waits: Overview = field(default_factory=lambda: Overview({}))
    """The waits of open jobs, a few seconds old."""
    paused_until: str = ""
    """End of the current pause of all submits, as ISO 8601 in UTC; empty without a pause."""

    def expected(self, jobs: int, already_done: int) -> None:
        """Remember the totals."""
        self.jobs, self.already_done = jobs, already_done

    def happened(self, action: str, **facts: Json) -> None:
        """Count the event."""
        match action:
            case "started":
                self.in_flight += 1
            case "done":
                self.done, self.note = self.done + 1, ""
            case "failed":
                self.failed += 1
                self.errors[str(facts.get("error_type"))] += 1
            case "held":
                self.held += 1
            case "ended":
                self.in_flight -= 1
            case "spent":
                cost, total = facts.get("usd"), facts.get("total_usd")
                if isinstance(cost, int | float) and isinstance(total, int | float):
                    self.spent_usd, self.spent_total_usd = float(cost), float(total)
            case "resumed":
                self.paused_until, self.note = "", "" if self.note.startswith("paused") else self.note
            case "paused" | "unreachable" | "stopping":
                self.note = f"{action}: {facts.get('reason', '')}"
                if action == "paused":
                    self.paused_until = str(facts.get("until", ""))
            case "waiting":
                self.waits = Overview.of_json(facts)
            case _:
                pass

    def line(self) -> str:
        """Return the progress as one line."""
        parts = [f"{self.done}/{self.jobs} done", f"{self.failed} failed", f"{self.in_flight} in flight"]
        if self.held:
            parts.append(f"{self.held} unknown")
        if self.spent_total_usd:
            earlier = self.spent_total_usd - self.spent_usd > 0.005
            in_all = f" (${self.spent_total_usd:,.2f} with earlier runs)" if earlier else ""
            parts.append(f"${self.spent_usd:,.2f} spent{in_all}")
        waits = self.waits.sentence()
        notes = [*([f"waiting: {waits}"] if waits else []), *([self.note] if self.note else [])]
        if self.paused_until and not self.note.startswith("paused"):
            notes.append(f"submits pause until {_clock_time(self.paused_until)}")
        return ", ".join(parts) + (f" ({'; '.join(notes)})" if notes else "")


class ProgressBar(Observer):
    """One tqdm bar on a terminal."""

    _SHOWN = frozenset({"done", "failed", "held", "paused", "stopping", "unreachable", "waiting", "warning"})
    _SILENT = frozenset({"pausing", "resumed"})
    """Actions that change only the numbers next to the bar."""

    def __init__(self, tally: ProgressCounter, stream: TextIO) -> None:
        self._tally, self._stream = tally, stream
        self._bar: tqdm[Never] | None = None
        self._waits = ""

    def expected(self, jobs: int, already_done: int) -> None:
        """Draw the bar; jobs done earlier are counted from the start."""
        self._bar = tqdm(
            total=already_done + jobs,
            initial=already_done,
            unit="job",
            file=self._stream,
            dynamic_ncols=True,
            smoothing=0.1,
        )

    def happened(self, action: str, **facts: Json) -> None:
        """Advance for each ended job; tqdm decides when to redraw."""
        is_bounded = action == "open_files" and facts.get("bounded")
        if self._bar is None or not (is_bounded or action in self._SHOWN | self._SILENT):
            return
        tally = self._tally
        shown: dict[str, int | str] = {"failed": tally.failed, "in_flight": tally.in_flight}
        if tally.spent_total_usd:
            shown["$"] = f"{tally.spent_usd:,.2f}"
            if tally.spent_total_usd - tally.spent_usd > 0.005:
                shown["$ in all"] = f"{tally.spent_total_usd:,.2f}"
        before, self._waits = self._waits, tally.waits.brief()
        if self._waits:
            shown["waiting"] = self._waits
        if tally.paused_until:
            shown["paused until"] = _clock_time(tally.paused_until)
        changed = action == "waiting" and self._waits != before
        self._bar.set_postfix(shown, refresh=changed or action in self._SILENT)
        if action in self._SILENT:
            return
        if action in {"done", "failed", "held"}:
            self._bar.update(1)
        elif action == "waiting":
            return
        else:
            self._bar.write(_message(action, facts), file=self._stream)

    def close(self) -> None:
        """Close the bar; its last state stays visible."""
        if self._bar is not None:
            self._bar.close()


class CountBar:
    """A tqdm bar for a single count."""

    def __init__(self, total: int, unit: str, stream: TextIO) -> None:
        self._bar: tqdm[Never] = tqdm(total=total, unit=unit, file=stream, dynamic_ncols=True, smoothing=0.1)

    def at(self, count: int) -> None:
        """Advance to that count; tqdm decides when to redraw."""
        self._bar.update(count - self._bar.n)

    def close(self) -> None:
        """Close the bar; its last state stays visible."""
        self._bar.close()


class PlainLines(Observer):
    """One plain line every `every` seconds, for logs and cron; silent while nothing happens."""

    def __init__(
        self,
        tally: ProgressCounter,
        stream: TextIO,
        *,
        every: float = 30.0,
        as_json: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tally, self._stream, self._every, self._as_json, self._clock = tally, stream, every, as_json, clock
        self._next = clock() + every

    def happened(self, action: str, **facts: Json) -> None:
        """Print when it is time; print warnings, pauses and stops at once."""
        is_bounded = action == "open_files" and facts.get("bounded")
        if is_bounded or action in {"paused", "stopping", "unreachable", "warning"}:
            self._print(action, _message(action, facts))
        elif self._clock() >= self._next:
            self._next = self._clock() + self._every
            self._print("progress", self._tally.line())

    def _print(self, action: str, text: str) -> None:
        if self._as_json:
            tally = self._tally
            line = {
                "at": _timestamp(),
                "action": action,
                "message": text,
                "jobs": tally.jobs,
                "done": tally.done,
                "failed": tally.failed,
                "in_flight": tally.in_flight,
                "spent_usd": round(tally.spent_usd, 4),
                "spent_total_usd": round(tally.spent_total_usd, 4),
                "waits": tally.waits.to_json() if tally.waits.stages else None,
                "paused_until": tally.paused_until or None,
            }
            text = orjson.dumps(line).decode()
        print(text, file=self._stream, flush=True)


class JsonLog(Observer):
    """`log.jsonl`: one line for each event, appended over all sessions.

    Buffered; flushed at least every second while events occur, and at the end. The journal is the source of truth, the
    log is for reading.
    """

    FLUSH_SECONDS = 1.0
    LIVE = frozenset({"started", "ended", "pausing", "spent", "waiting"})
    _AT_ONCE = frozenset({"paused", "resumed"})
    """Possibly the last line for an hour, and `restyle status` looks for it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._flushed_at = 0.0

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("ab")
            if _is_torn(self._path):  # a full disk cut the last line off; keep it separate from the next one
                self._file.write(b"\n")
        except OSError as error:
            raise StorageError(f"{self._path} cannot be written: {error.strerror}; free or unlock the disk") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                return  # the log is best effort: the journal already reported a full disk

    def happened(self, action: str, **facts: Json) -> None:
        """Append one line; events that only a live display needs are left out."""
        if self._file is None or action in self.LIVE:
            return
        line = orjson.dumps({"at": _timestamp(), "action": action, **facts}, option=orjson.OPT_APPEND_NEWLINE)
        try:
            self._file.write(line)
            if (now := time.monotonic()) - self._flushed_at > self.FLUSH_SECONDS or action in self._AT_ONCE:
                self._file.flush()
                self._flushed_at = now
        except OSError:  # the journal reports a full disk and stops the run
            with suppress(OSError):
                self._file.close()
            self._file = None

    def expected(self, jobs: int, already_done: int) -> None:
        """Append the totals."""
        self.happened("expected", jobs=jobs, already_done=already_done)


_LOG_TAIL_BYTES = 4 * 2**20
"""How far back a pause is looked for: about 20,000 ended jobs."""


def pause_in(path: Path, now: float) -> float | None:
    """Return the end, in Unix seconds, of the pause in effect at `now` according to a log; None without one.

    Valid for a run in progress; a killed run leaves its last pause in the log.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if not (b'"paused"' in line or b'"resumed"' in line or b'"session"' in line):
            continue
        until = _until_of(line)
        if until is not None:
            return until if until > now else None
    return None


def _until_of(line: bytes) -> float | None:
    """Return the end of the pause that a line begins, 0 if it ends one; None if it is about something else."""
    try:
        event = orjson.loads(line)
        if event["action"] in {"resumed", "session"}:
            return 0.0
        return datetime.fromisoformat(event["until"]).timestamp() if event["action"] == "paused" else None
    except (ValueError, KeyError, TypeError):  # torn, or written by an older version
        return None


def _clock_time(iso: str) -> str:
    return f"{iso[11:19]} UTC"


def _message(action: str, facts: Mapping[str, Json]) -> str:
    """Return a line for the terminal; the reason of an open-files limit is complete without its action."""
    return str(facts["reason"]) if action == "open_files" else f"{action}: {facts.get('reason', '')}"


def _is_torn(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _timestamp() -> datetime:
    """Return the time now; orjson writes it as `2026-11-22T16:20:18.090123+00:00`."""
    return datetime.now(UTC)
