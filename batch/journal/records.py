"""What the journal answers when it is asked about jobs. Pure.

All instants are Unix seconds, all durations seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from batch.journal.states import State
from batch.types import Answer, JobKey, RequestId, Ticket

__all__ = ["Counts", "JobOutcome", "KnownJob", "OpenJob", "RequestIdTaken"]


class RequestIdTaken(Exception):
    """The service gave a request id that it had given to another job: whose result it will show is not known."""


class KnownJob(NamedTuple):
    """The little that deciding about a manifest row needs."""

    state: State
    session: int
    """Number of the `restyle run` that last changed it; the present one is `Journal.session`."""
    attempt: int = 1
    """The last attempt's number; of a PENDING job, the number that its next attempt gets."""
    ended_at: float | None = None
    """When we learned that its request had ended; of a COLLECTABLE job only."""


@dataclass(frozen=True, slots=True)
class OpenJob:
    """Everything about a job that is not finished, so that it can be taken up again."""

    job_key: JobKey
    state: State
    attempt: int
    intended_at: float
    body: bytes = field(repr=False)
    """As it was intended; empty where the job was never intended."""
    accepted_at: float | None = None
    ticket: Ticket | None = None
    answer: Answer | None = None
    reserved_usd: float = 0.0
    ended_at: float | None = None
    """When we learned that its request had ended; None where that is not known yet."""
    start_timeout: float | None = None
    """As it was intended."""


class JobOutcome(NamedTuple):
    """What the results table shows of one job: flat, and its JSON as it is stored, for an export has a million."""

    job_key: JobKey
    state: State
    attempts: int
    request_id: RequestId | None = None
    submitted_at: float | None = None
    """When the submit was sent, of the last attempt."""
    completed_at: float | None = None
    """When we learned that it had ended."""
    output: bytes | None = None
    """The endpoint's answer as it is stored (`batch.journal.answers.unpack`); None where there was none."""
    images: bytes | None = None
    """The stored images, as `batch.journal.transitions.encode_images` has them; None where the job is not done."""
    queue_seconds: float | None = None
    total_seconds: float | None = None
    download_seconds: float | None = None
    billable_units: float | None = None
    cost_usd: float | None = None
    engine: str | None = None
    error_type: str | None = None
    """Why it failed; `unknown` where the outcome of its submit is."""
    error_message: str | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """How many jobs are in each state, and the money: spent is settled, reserved is still open."""

    by_state: dict[State, int]
    spent_usd: float = 0.0
    reserved_usd: float = 0.0
    oldest_open_at: float | None = None
