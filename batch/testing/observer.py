"""`RecordingObserver`: everything that happened, for assertions."""

from __future__ import annotations

from batch.run.interfaces import Observer
from batch.types import Json

__all__ = ["RecordingObserver"]


class RecordingObserver(Observer):
    """Keeps `(action, facts)` in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Json]]] = []

    def happened(self, action: str, **facts: Json) -> None:
        """Keep it."""
        self.events.append((action, facts))

    def actions(self, action: str) -> list[dict[str, Json]]:
        """The facts of all events of one kind."""
        return [facts for name, facts in self.events if name == action]
