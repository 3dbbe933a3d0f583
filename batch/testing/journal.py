"""A journal in memory, for tests in virtual time: no threads, no file, every event kept for assertions.

Held to the same contract as `batch.journal.writer` by `tests/contract/test_journal.py`. Nothing survives it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import anyio.lowlevel

from batch.journal.answers import answer_of, pack
from batch.journal.events import (
    Accepted,
    Answered,
    Event,
    FailedForGood,
    Finished,
    Intended,
    Lost,
    Refused,
    Retried,
    Uncollected,
    Uploaded,
)
from batch.journal.records import Counts, JobOutcome, KnownJob, OpenJob
from batch.journal.states import OPEN, State, advance
from batch.journal.transitions import encode_images, slim_body, taken
from batch.types import Answer, JobKey, Ticket

__all__ = ["MemoryJournal"]


@dataclass(slots=True)
class _MemoryJob:
    """What is known of one job."""

    state: State = State.PENDING
    session: int = 0
    attempt: int = 0
    intended_at: float | None = None
    body: bytes = b""
    accepted_at: float | None = None
    ticket: Ticket | None = None
    reserved_usd: float = 0.0
    start_timeout: float | None = None
    cost_usd: float | None = None
    reason: str | None = None
    answered: Answered | None = None
    ended: Finished | FailedForGood | Uncollected | None = None

    def forget(self) -> None:
        """Leave the last attempt behind; what it cost stays."""
        self.accepted_at = self.ticket = self.reason = self.answered = self.ended = None


class MemoryJournal:
    """Implements `batch.run.interfaces.Journal`. `events` holds everything that was recorded, in order.

    `reopened` plays the next run of the same command.
    """

    def __init__(self, session: int = 1) -> None:
        self.session = session
        self.events: list[Event] = []
        self._jobs: dict[JobKey, _MemoryJob] = {}
        self._uploads: dict[str, Uploaded] = {}
        self._owners: dict[str, JobKey] = {}
        self._spent_usd = 0.0

    def __repr__(self) -> str:
        return f"<MemoryJournal session={self.session} jobs={len(self._jobs)} events={len(self.events)}>"

    def reopened(self) -> MemoryJournal:
        """The same content in the next session, as after a crash: what still holds the old one changes nothing here."""
        journal = MemoryJournal(self.session + 1)
        journal.events = list(self.events)
        journal._jobs = {key: replace(job) for key, job in self._jobs.items()}
        journal._uploads = dict(self._uploads)
        journal._owners = dict(self._owners)
        journal._spent_usd = self._spent_usd
        return journal

    async def record(self, *events: Event) -> None:
        """Keep events in this order, all of them or none.

        Raises:
            IllegalTransition: an event that the lifecycle does not allow.
            RequestIdTaken: an acceptance under a request id that is another job's.
        """
        states: dict[JobKey, State] = {}
        for event in events:
            if not isinstance(event, Uploaded):
                state = states.get(event.job_key, self.state(event.job_key))
                states[event.job_key] = advance(state, event.kind)
        for event in events:
            if isinstance(event, Accepted):
                owner = self._owners.setdefault(event.ticket.request_id, event.job_key)
                if owner != event.job_key:
                    raise taken(event.ticket.request_id, owner)
        for event in events:
            self._apply(event)
            self.events.append(event)
        await anyio.lowlevel.checkpoint()

    async def find(self, keys: Sequence[JobKey]) -> dict[JobKey, KnownJob]:
        """Those of the keys that the journal knows."""
        await anyio.lowlevel.checkpoint()
        jobs = {key: self._jobs[key] for key in keys if key in self._jobs}
        return {
            key: KnownJob(job.state, job.session, job.attempt, _collectable_since(job)) for key, job in jobs.items()
        }

    async def entries(self, states: Collection[State]) -> AsyncGenerator[OpenJob, None]:
        """Jobs in these states, the one intended first coming first."""
        wanted = [key for key, job in self._jobs.items() if job.state in states]
        wanted.sort(key=lambda key: _age_order(self._jobs[key]))
        for key in wanted:
            await anyio.lowlevel.checkpoint()
            if self._jobs[key].state in states:
                yield _entry(key, self._jobs[key])

    async def uploaded(self, sha256: str, since: float) -> str | None:
        """URL of an image uploaded at or after `since`, or None."""
        await anyio.lowlevel.checkpoint()
        upload = self._uploads.get(sha256)
        return None if upload is None or upload.at < since else upload.url

    async def requests(self, ids: Sequence[str]) -> set[str]:
        """Those of the request ids that belong to a job, or to one of its ended attempts."""
        given = {event.ticket.request_id for event in self.events if isinstance(event, Accepted)}
        return {request_id for request_id in ids if request_id in given}

    async def settled(self) -> None:
        """At once: what is recorded here is kept."""
        await anyio.lowlevel.checkpoint()

    async def counts(self) -> Counts:
        """Totals over all sessions."""
        await anyio.lowlevel.checkpoint()
        is_open = [job for job in self._jobs.values() if job.state in OPEN]
        return Counts(
            by_state=dict(Counter(job.state for job in self._jobs.values())),
            spent_usd=self._spent_usd,
            reserved_usd=sum(job.reserved_usd for job in is_open),
            oldest_open_at=min((job.intended_at or 0.0 for job in is_open), default=None),
        )

    def state(self, key: JobKey) -> State:
        """Of one job; PENDING where it was never heard of."""
        return self._jobs[key].state if key in self._jobs else State.PENDING

    def outcomes(self, keys: Sequence[JobKey]) -> dict[JobKey, JobOutcome]:
        """What the results table shows of those of the keys that the journal knows."""
        return {key: _outcome(key, self._jobs[key]) for key in keys if key in self._jobs}

    def _apply(self, event: Event) -> None:
        if isinstance(event, Uploaded):
            self._uploads[event.sha256] = event
            return
        job = self._jobs.setdefault(event.job_key, _MemoryJob())
        was, job.state, job.session = job.state, advance(job.state, event.kind), self.session
        match event:
            case Intended():
                if was is State.UNKNOWN and event.attempt > job.attempt:
                    self._spend(job, job.reserved_usd)
                job.forget()
                job.attempt, job.intended_at, job.reserved_usd = event.attempt, event.at, event.reserved_usd
                job.body, job.start_timeout = event.body, event.start_timeout
            case Accepted():
                job.accepted_at, job.ticket, job.reason = event.at, event.ticket, None
            case Refused():
                job.reserved_usd, job.reason = 0.0, event.reason
            case Lost():
                job.reason = event.reason
            case Answered():
                job.reserved_usd, job.answered = 0.0, event
                self._spend(job, event.cost_usd)
            case Finished():
                job.ended, job.body = event, slim_body(job.body)
            case FailedForGood():
                job.reserved_usd, job.ended, job.body = 0.0, event, slim_body(job.body)
                self._spend(job, None if was is State.ANSWERED else event.cost_usd)
            case Uncollected(answer=answer):
                job.reserved_usd, job.ended = 0.0, event
                self._spend(job, event.cost_usd)
                if answer is not None:
                    job.answered = Answered(event.job_key, event.ended_at, answer)
            case Retried():
                job.forget()
                job.attempt += 1

    def _spend(self, job: _MemoryJob, usd: float | None) -> None:
        if usd is not None:
            job.cost_usd = (job.cost_usd or 0.0) + usd
            self._spent_usd += usd


def _collectable_since(job: _MemoryJob) -> float | None:
    return job.ended.ended_at if job.state is State.COLLECTABLE and isinstance(job.ended, Uncollected) else None


def _ended_at(job: _MemoryJob) -> float | None:
    if job.answered is not None:
        return job.answered.at
    return job.ended.ended_at if isinstance(job.ended, Uncollected) else None if job.ended is None else job.ended.at


def _has_images(ended: Finished | FailedForGood | Uncollected) -> TypeGuard[Finished | Uncollected]:
    return isinstance(ended, Finished) or (isinstance(ended, Uncollected) and bool(ended.images))


def _as_stored(answer: Answer) -> Answer:
    return answer_of(pack(answer), answer.billable_units, answer.engine)


def _units(answered: Answered | None, ended: Finished | FailedForGood | Uncollected | None) -> float | None:
    if answered is not None:
        return answered.answer.billable_units
    return ended.failure.billable_units if isinstance(ended, FailedForGood) else None


def _age_order(job: _MemoryJob) -> float:
    return -math.inf if job.intended_at is None else job.intended_at


def _entry(key: JobKey, job: _MemoryJob) -> OpenJob:
    return OpenJob(
        job_key=key,
        state=job.state,
        attempt=job.attempt,
        intended_at=job.intended_at or 0.0,
        body=job.body,
        accepted_at=job.accepted_at,
        ticket=job.ticket,
        answer=None if job.answered is None else _as_stored(job.answered.answer),
        reserved_usd=job.reserved_usd,
        ended_at=_ended_at(job),
        start_timeout=job.start_timeout,
    )


def _outcome(key: JobKey, job: _MemoryJob) -> JobOutcome:
    answered, ended = job.answered, job.ended
    failure = ended.failure if isinstance(ended, FailedForGood | Uncollected) else None
    error: tuple[str | None, str | None] = (None, None)
    if failure is not None:
        error = (failure.error_type, failure.message)
    elif job.state is State.UNKNOWN:
        error = ("unknown", job.reason)
    return JobOutcome(
        job_key=key,
        state=job.state,
        attempts=job.attempt,
        request_id=None if job.ticket is None else job.ticket.request_id,
        submitted_at=job.intended_at,
        completed_at=_ended_at(job),
        output=None if answered is None else pack(answered.answer),
        images=encode_images(ended.images) if ended is not None and _has_images(ended) else None,
        queue_seconds=None if answered is None else answered.queue_seconds,
        total_seconds=None if answered is None else answered.total_seconds,
        download_seconds=ended.download_seconds if isinstance(ended, Finished) else None,
        billable_units=_units(answered, ended),
        cost_usd=job.cost_usd,
        engine=None if answered is None else answered.answer.engine,
        error_type=error[0],
        error_message=error[1],
    )
