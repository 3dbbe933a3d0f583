"""The waits of the open jobs of a run: stored per job, summarized as a few numbers. Pure.

The poller and the runner update the jobs; a display or `restyle status`, which is another process, reads the overview
as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from batch.types import JobKey, Json, JsonObject, QueueState, TicketStatus

__all__ = ["NOTICEABLE_SECONDS", "Overview", "Positions", "Stage", "Waiting", "Waits", "duration", "stage_of"]

NOTICEABLE_SECONDS = 30.0
"""A shorter wait is not mentioned in the progress line."""


class Stage(StrEnum):
    """The stage of an accepted job, named after its wait."""

    IN_QUEUE = "in_queue"
    IN_PROGRESS = "in_progress"
    RESULT = "result"
    """Its status says that it has ended; its result has not been read yet."""
    DOWNLOADING = "downloading"
    UNKNOWN = "unknown"
    """No status has been read yet, the last read failed, or the service used an unknown word."""


_WORDS = {Stage.RESULT: "ended and unread", Stage.UNKNOWN: "of unknown status"}


def _named(stage: Stage) -> str:
    return _WORDS.get(stage, str(stage).replace("_", " "))


def stage_of(status: TicketStatus) -> Stage:
    """Return what a job waits for after this status."""
    if status.state is None:
        return Stage.UNKNOWN
    return {QueueState.IN_QUEUE: Stage.IN_QUEUE, QueueState.IN_PROGRESS: Stage.IN_PROGRESS}.get(
        status.state, Stage.RESULT
    )


class Waiting(NamedTuple):
    """The jobs in one stage."""

    jobs: int
    oldest_seconds: float


class Positions(NamedTuple):
    """Positions in the service's queue, 0-based, as last reported."""

    lowest: int
    median: int
    highest: int


class Overview(NamedTuple):
    """The waits of the open jobs at one moment. Stages without jobs are omitted."""

    stages: Mapping[Stage, Waiting]
    positions: Positions | None = None
    """None if the service reports none."""

    @property
    def oldest_seconds(self) -> float:
        """The longest wait; 0.0 if nothing waits."""
        return max((waiting.oldest_seconds for waiting in self.stages.values()), default=0.0)

    def to_json(self) -> JsonObject:
        """Return JSON values: each stage with its number of jobs and its longest wait."""
        found: JsonObject = {
            str(stage): {
                "jobs": self.stages[stage].jobs if stage in self.stages else 0,
                "oldest_seconds": round(self.stages[stage].oldest_seconds, 1) if stage in self.stages else None,
            }
            for stage in Stage
        }
        positions: JsonObject | None = None if self.positions is None else dict(self.positions._asdict())
        return {**found, "queue_positions": positions}

    @classmethod
    def of_json(cls, value: Mapping[str, Json]) -> Overview:
        """Read what `to_json` wrote; unreadable parts are omitted."""
        stages: dict[Stage, Waiting] = {}
        for stage in Stage:
            entry = value.get(stage)
            count, oldest = (entry.get("jobs"), entry.get("oldest_seconds")) if isinstance(entry, dict) else (0, 0.0)
            if isinstance(count, int) and count > 0 and isinstance(oldest, int | float):
                stages[stage] = Waiting(count, float(oldest))
        places = value.get("queue_positions")
        numbers = [places.get(name) for name in Positions._fields] if isinstance(places, dict) else []
        whole = [number for number in numbers if isinstance(number, int)]
        return cls(stages, Positions(*whole) if len(whole) == len(Positions._fields) else None)

    def lines(self, *, least: float = 0.0) -> list[tuple[str, int, str]]:
        """Return name, number of jobs and details of each stage with a wait of at least `least` seconds."""
        found = []
        for stage, waiting in self.stages.items():
            if waiting.oldest_seconds < least:
                continue
            rest = f"for up to {duration(waiting.oldest_seconds)}"
            if stage is Stage.IN_QUEUE and self.positions is not None:
                low, median, high = self.positions
                places = f"queue positions {low:,} to {high:,}, median {median:,}"
                rest += f", {places if low < high else f'queue position {low:,}'}"
            found.append((_named(stage), waiting.jobs, rest))
        return found

    def brief(self, *, least: float = NOTICEABLE_SECONDS) -> str:
        """Return the stage with the longest wait in a few words; empty if no wait reaches `least` seconds."""
        if self.oldest_seconds < least or not self.stages:
            return ""
        stage, waiting = max(self.stages.items(), key=lambda item: item[1].oldest_seconds)
        return f"{waiting.jobs:,} {_named(stage)} {duration(waiting.oldest_seconds)}"

    def sentence(self, *, least: float = NOTICEABLE_SECONDS) -> str:
        """Return the lines as one clause; empty if no wait reaches `least` seconds."""
        return "; ".join(f"{count:,} {name} {rest}" for name, count, rest in self.lines(least=least))


class _JobWait(NamedTuple):
    """The stage of one job."""

    stage: Stage
    since: float
    position: int | None


class Waits:
    """The stage of each accepted job of a run. Instants are Unix seconds."""

    def __init__(self) -> None:
        self._places: dict[JobKey, _JobWait] = {}

    def __repr__(self) -> str:
        return f"<Waits {len(self._places)} jobs>"

    def put(self, key: JobKey, stage: Stage, since: float, position: int | None = None) -> None:
        """Set what a job waits for, and since when."""
        self._places[key] = _JobWait(stage, since, position if stage is Stage.IN_QUEUE else None)

    def drop(self, key: JobKey) -> None:
        """Remove a job that no longer waits."""
        self._places.pop(key, None)

    def overview(self, now: float) -> Overview:
        """Summarize all jobs. Takes time proportional to the jobs in flight."""
        counts: dict[Stage, int] = {}
        oldest: dict[Stage, float] = {}
        positions: list[int] = []
        for stage, since, position in self._places.values():
            counts[stage] = counts.get(stage, 0) + 1
            oldest[stage] = min(oldest.get(stage, math.inf), since)
            if position is not None:
                positions.append(position)
        stages = {stage: Waiting(counts[stage], max(0.0, now - oldest[stage])) for stage in Stage if stage in counts}
        positions.sort()
        places = Positions(positions[0], positions[len(positions) // 2], positions[-1]) if positions else None
        return Overview(stages, places)


def duration(seconds: float) -> str:
    """Format seconds for a message: 45 s, 12 min, 3.2 h, 4 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} days"
