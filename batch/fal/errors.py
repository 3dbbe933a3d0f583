"""One failed exchange with the API, as a value and as an exception. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from batch.fal.protocol import Reply
from batch.types import Answer

__all__ = ["CallFailed", "Trouble"]


@dataclass(frozen=True, slots=True)
class Trouble:
    """One failed exchange as a value: either a transport event or an answer that is not a success."""

    phase: str
    """`submit`, `status`, `result`, `cancel`, `initiate` (an upload, with the key), `upload` or `download`."""
    transport: str | None = None
    """What the transport did (`connect`, `timeout`, `reset`, `redirect`, `malformed`, ...), else None."""
    sent: bool = True
    """False only where it is certain that no byte of the request left."""
    reply: Reply | None = None
    """The answer, where a complete one came."""
    detail: str = ""
    """A sentence for a person; nothing is decided by it."""
    answer: Answer | None = None
    """What came in place of a usable result, where something came."""


class CallFailed(Exception):
    """A call to the service did not succeed; `trouble` says how."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.detail or trouble.transport or "call failed")
        self.trouble = trouble
