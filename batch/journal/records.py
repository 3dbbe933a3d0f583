"""Records that the journal returns about jobs. Pure.

All instants are Unix seconds, all durations seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from batch.journal.states import State
from batch.types import Answer, JobKey, RequestId, Ticket

__all__ = ["Counts", "JobOutcome", "KnownJob", "OpenJob", "RequestIdTaken"]


class RequestIdTaken(Exception):
    """The service returned a request id of another job, so it is unclear whose result it will return."""


class KnownJob(NamedTuple):
    """The few facts that decide about a manifest row."""

    state: State
    session: int
    """Number of the `restyle run` that last changed the job; the current one is `Journal.session`."""
    attempt: int = 1
    """Number of the last attempt; for a PENDING job, the number of its next attempt."""
    ended_at: float | None = None
    """When we learned that the request had ended; None unless the job is COLLECTABLE."""


@dataclass(frozen=True, slots=True)
class OpenJob:
    """Everything needed to resume an unfinished job."""

    job_key: JobKey
    state: State
    attempt: int
    intended_at: float
    body: bytes = field(repr=False)
    """The request body as intended; empty if the job was never intended."""
    accepted_at: float | None = None
    ticket: Ticket | None = None
    answer: Answer | None = None
    reserved_usd: float = 0.0
    ended_at: float | None = None
    """When we learned that the request had ended; None if it has not ended as far as we know."""
    start_timeout: float | None = None
    """Seconds, as intended; None without a start timeout."""


class JobOutcome(NamedTuple):
    """One job's columns in the results table. Flat, with JSON as stored, because an export reads a million of them."""

    job_key: JobKey
    state: State
    attempts: int
    request_id: RequestId | None = None
    submitted_at: float | None = None
    """When the submit of the last attempt was sent."""
    completed_at: float | None = None
    """When we learned that the job had ended."""
    output: bytes | None = None
    """The stored answer of the endpoint (see `batch.journal.answers.unpack`); None without an answer."""
    images: bytes | None = None
    """The stored images in the format of `batch.journal.transitions.encode_images`; None unless the job is done."""
    queue_seconds: float | None = None
    total_seconds: float | None = None
    download_seconds: float | None = None
    billable_units: float | None = None
    cost_usd: float | None = None
    engine: str | None = None
    error_type: str | None = None
    """The reason for the failure; `unknown` if the outcome of the submit is unknown."""
    error_message: str | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """The number of jobs in each state and the money: `spent_usd` is settled, `reserved_usd` is open."""

    by_state: dict[State, int]
    spent_usd: float = 0.0
    reserved_usd: float = 0.0
    oldest_open_at: float | None = None
