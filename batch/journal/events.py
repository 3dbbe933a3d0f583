"""The events of a job's life, as the run records them. Pure.

All instants are Unix seconds, all durations seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from batch.journal.states import EventKind
from batch.types import Answer, Failed, JobKey, StoredImage, Ticket

__all__ = [
    "Accepted",
    "Answered",
    "Event",
    "FailedForGood",
    "Finished",
    "Intended",
    "Lost",
    "Refused",
    "Retried",
    "Uncollected",
    "Uploaded",
]


@dataclass(frozen=True, slots=True)
class Intended:
    """A submit is about to be sent. Durable before the first byte leaves."""

    job_key: JobKey
    at: float
    attempt: int
    body: bytes = field(repr=False)
    reserved_usd: float = 0.0
    start_timeout: float | None = None
    """Seconds from its acceptance after which the target starts it no more. None: it may start at any time."""
    kind = EventKind.INTEND


@dataclass(frozen=True, slots=True)
class Accepted:
    """The server gave a request id."""

    job_key: JobKey
    at: float
    ticket: Ticket
    kind = EventKind.ACCEPT


@dataclass(frozen=True, slots=True)
class Refused:
    """The submit was certainly not accepted; the same attempt may be tried again. Frees the reservation."""

    job_key: JobKey
    at: float
    reason: str
    kind = EventKind.REFUSE


@dataclass(frozen=True, slots=True)
class Lost:
    """Whether the submit was accepted is not known."""

    job_key: JobKey
    at: float
    reason: str
    kind = EventKind.LOSE


@dataclass(frozen=True, slots=True)
class Answered:
    """The endpoint's output is here; its images are still to be fetched."""

    job_key: JobKey
    at: float
    answer: Answer
    cost_usd: float | None = None
    queue_seconds: float | None = None
    total_seconds: float | None = None
    kind = EventKind.ANSWER


@dataclass(frozen=True, slots=True)
class Finished:
    """Every image is stored and verified (or downloads are off)."""

    job_key: JobKey
    at: float
    images: tuple[StoredImage, ...]
    download_seconds: float | None = None
    kind = EventKind.FINISH


@dataclass(frozen=True, slots=True)
class FailedForGood:
    """The job ended without a result."""

    job_key: JobKey
    at: float
    failure: Failed
    cost_usd: float | None = None
    kind = EventKind.FAIL


@dataclass(frozen=True, slots=True)
class Uncollected:
    """The request ended, and its answer or an image of it could not be read: it can be collected later, free."""

    job_key: JobKey
    at: float
    failure: Failed
    ended_at: float
    """When we learned that the request had ended: a later try to collect it does not change it."""
    cost_usd: float | None = None
    """What the request cost; None where an earlier event said so."""
    answer: Answer | None = None
    """What came in place of a usable answer, where something came."""
    images: tuple[StoredImage, ...] = ()
    """Those of a usable answer; `path` is None where the file could not be stored."""
    kind = EventKind.UNCOLLECTED


@dataclass(frozen=True, slots=True)
class Retried:
    """A failed job is taken up again, as a new attempt: its number grows by one here."""

    job_key: JobKey
    at: float
    kind = EventKind.RETRY


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A local image now has a URL at the target. Not a job's event."""

    sha256: str
    """Of its content, with the target's name in front."""
    at: float
    url: str


Event: TypeAlias = (
    Intended | Accepted | Refused | Lost | Answered | Finished | FailedForGood | Uncollected | Retried | Uploaded
)
