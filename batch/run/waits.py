"""What the open jobs of a run wait for, and for how long: kept job by job, shown as a few numbers. Pure.

The follower and the runner say where each job is; a display or `restyle status`, which is another process, reads the
overview, as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from batch.types import JobKey, Json, JsonObject, QueueState, TicketStatus

__all__ = ["NOTICEABLE_SECONDS", "Overview", "Positions", "Stage", "Waiting", "Waits", "duration", "stage_of"]

NOTICEABLE_SECONDS = 30.0
"""A job that has waited for less is not worth a word in the progress line."""


class Stage(StrEnum):
    """What an accepted job waits for."""

    IN_QUEUE = "in_queue"
    IN_PROGRESS = "in_progress"
    RESULT = "result"
    """Its status says that it has ended; its result is not read yet."""
    DOWNLOADING = "downloading"
    UNKNOWN = "unknown"
    """No status was read yet, the last read failed, or the service used an unknown word."""


_WORDS = {Stage.RESULT: "ended and unread", Stage.UNKNOWN: "of unknown status"}


def _named(stage: Stage) -> str:
    return _WORDS.get(stage, str(stage).replace("_", " "))


def stage_of(status: TicketStatus) -> Stage:
    """What a job waits for after this status."""
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
    """Places in the service's queue, 0-based, as it reported them last."""

    lowest: int
    median: int
    highest: int


class Overview(NamedTuple):
    """What the open jobs wait for at one moment. A stage without jobs is left out."""

    stages: Mapping[Stage, Waiting]
    positions: Positions | None = None
    """None where the service reports none."""

    @property
    def oldest_seconds(self) -> float:
        """The longest wait of all; 0.0 where nothing waits."""
        return max((waiting.oldest_seconds for waiting in self.stages.values()), default=0.0)

    def to_json(self) -> JsonObject:
        """Plain JSON values: each stage with its number of jobs and the longest wait."""
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
        """The overview that `to_json` wrote; what cannot be read is left out."""
        stages: dict[Stage, Waiting] = {}
        for stage in Stage:
            said = value.get(stage)
            count, oldest = (said.get("jobs"), said.get("oldest_seconds")) if isinstance(said, dict) else (0, 0.0)
            if isinstance(count, int) and count > 0 and isinstance(oldest, int | float):
                stages[stage] = Waiting(count, float(oldest))
        places = value.get("queue_positions")
        numbers = [places.get(name) for name in Positions._fields] if isinstance(places, dict) else []
        whole = [number for number in numbers if isinstance(number, int)]
        return cls(stages, Positions(*whole) if len(whole) == len(Positions._fields) else None)

    def lines(self, *, least: float = 0.0) -> list[tuple[str, int, str]]:
        """A line for each stage with a wait of at least so many seconds: its name, number of jobs, and the rest."""
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
        """The stage with the longest wait, in a few words; empty where nothing has waited for so long."""
        if self.oldest_seconds < least or not self.stages:
            return ""
        stage, waiting = max(self.stages.items(), key=lambda item: item[1].oldest_seconds)
        return f"{waiting.jobs:,} {_named(stage)} {duration(waiting.oldest_seconds)}"

    def sentence(self, *, least: float = NOTICEABLE_SECONDS) -> str:
        """The lines as one clause; empty where nothing has waited for so long."""
        return "; ".join(f"{count:,} {name} {rest}" for name, count, rest in self.lines(least=least))


class _JobWait(NamedTuple):
    """Where one job is."""

    stage: Stage
    since: float
    position: int | None


class Waits:
    """Where each accepted job of a run is. Instants are Unix seconds."""

    def __init__(self) -> None:
        self._places: dict[JobKey, _JobWait] = {}

    def __repr__(self) -> str:
        return f"<Waits {len(self._places)} jobs>"

    def put(self, key: JobKey, stage: Stage, since: float, position: int | None = None) -> None:
        """A job waits for this, and has waited since then."""
        self._places[key] = _JobWait(stage, since, position if stage is Stage.IN_QUEUE else None)

    def drop(self, key: JobKey) -> None:
        """A job does not wait any longer."""
        self._places.pop(key, None)

    def overview(self, now: float) -> Overview:
        """All of them together. Takes time in proportion to the jobs in flight."""
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
    """Seconds as a person says them: 45 s, 12 min, 3.2 h, 4 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} days"
