"""Events of a job, as the run records them. Pure.

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
    """A submit is about to be sent. Durable before the first byte is sent."""

    job_key: JobKey
    at: float
    attempt: int
    body: bytes = field(repr=False)
    reserved_usd: float = 0.0
    start_timeout: float | None = None
    """Seconds after acceptance; the target does not start the request later than that. None: no limit."""
    kind = EventKind.INTEND


@dataclass(frozen=True, slots=True)
class Accepted:
    """The server returned a request id."""

    job_key: JobKey
    at: float
    ticket: Ticket
    kind = EventKind.ACCEPT


@dataclass(frozen=True, slots=True)
class Refused:
    """The submit was certainly not accepted; the same attempt may be retried. Releases the reservation."""

    job_key: JobKey
    at: float
    reason: str
    kind = EventKind.REFUSE


@dataclass(frozen=True, slots=True)
class Lost:
    """It is unknown whether the submit was accepted."""

    job_key: JobKey
    at: float
    reason: str
    kind = EventKind.LOSE


@dataclass(frozen=True, slots=True)
class Answered:
    """The endpoint's output has arrived; its images are still to be downloaded."""

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
    """The request has ended, but its answer or an image could not be read: it can be collected later, free."""

    job_key: JobKey
    at: float
    failure: Failed
    ended_at: float
    """When we learned that the request had ended; a later attempt to collect it does not change this."""
    cost_usd: float | None = None
    """Cost of the request; None if an earlier event recorded it."""
    answer: Answer | None = None
    """The unusable answer, if there is one."""
    images: tuple[StoredImage, ...] = ()
    """The images of a usable answer; `path` is None if the file could not be stored."""
    kind = EventKind.UNCOLLECTED


@dataclass(frozen=True, slots=True)
class Retried:
    """A failed job is retried with a new attempt: its attempt number increases by one."""

    job_key: JobKey
    at: float
    kind = EventKind.RETRY


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A local image now has a URL at the target. Not an event of a job."""

    sha256: str
    """SHA-256 of the content, prefixed with the target's name."""
    at: float
    url: str


Event: TypeAlias = (
    Intended | Accepted | Refused | Lost | Answered | Finished | FailedForGood | Uncollected | Retried | Uploaded
)
