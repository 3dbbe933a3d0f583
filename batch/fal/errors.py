"""One failed exchange with the API, as a value and as an exception. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from batch.fal.protocol import Reply
from batch.types import Answer

__all__ = ["CallFailed", "Trouble"]


@dataclass(frozen=True, slots=True)
class Trouble:
    """A failed exchange: either a transport error or an answer that is not a success."""

    phase: str
    """`submit`, `status`, `result`, `cancel`, `initiate` (an upload, with the key), `upload` or `download`."""
    transport: str | None = None
    """The transport error (`connect`, `timeout`, `reset`, `redirect`, `malformed`, ...), else None."""
    sent: bool = True
    """False only if it is certain that no byte of the request was sent."""
    reply: Reply | None = None
    """The answer, if a complete one was received."""
    detail: str = ""
    """A text for messages; no decision depends on it."""
    answer: Answer | None = None
    """An unusable result, if one was received."""


class CallFailed(Exception):
    """A failed call to the service; `trouble` describes it."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.detail or trouble.transport or "call failed")
        self.trouble = trouble
