"""`RecordingObserver`: records all events, for assertions."""

from __future__ import annotations

from batch.run.interfaces import Observer
from batch.types import Json

__all__ = ["RecordingObserver"]


class RecordingObserver(Observer):
    """Records `(action, facts)` in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Json]]] = []

    def happened(self, action: str, **facts: Json) -> None:
        """Record the event."""
        self.events.append((action, facts))

    def actions(self, action: str) -> list[dict[str, Json]]:
        """Return the facts of all events with this action."""
        return [facts for name, facts in self.events if name == action]
