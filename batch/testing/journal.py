"""A journal in memory, for tests in virtual time: no threads, no file, and every event is kept for assertions.

Runs the same transitions as `batch.journal.writer`; `tests/contract/test_journal.py` checks both against the same
contract. Nothing is persistent.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Sequence

import anyio.lowlevel

from batch.journal.answers import answer_of, without_data_uris
from batch.journal.events import Accepted, Event
from batch.journal.records import Counts, JobOutcome, KnownJob, OpenJob
from batch.journal.states import OPEN, State
from batch.journal.transitions import JobRow, JobTransitions, OutcomeRow, slim_body
from batch.types import JobKey, RequestId, Ticket

__all__ = ["MemoryJournal"]


class MemoryJournal:
    """Implements `batch.run.interfaces.Journal`. `events` has everything recorded, in order.

    `reopened` returns the journal of the next run of the same command.
    """

    def __init__(self, session: int = 1) -> None:
        self.events: list[Event] = []
        self._rows = JobTransitions([], session=session, last_job=0, last_outcome=0)
        self._bodies: dict[int, bytes] = {}
        self._outcomes: dict[int | None, OutcomeRow] = {}
        self._uploads: dict[str, tuple[float, str]] = {}

    def __repr__(self) -> str:
        return f"<MemoryJournal session={self.session} jobs={len(self._rows.jobs)} events={len(self.events)}>"

    @property
    def session(self) -> int:
        """Number of the current session, from 1."""
        return self._rows.session

    @session.setter
    def session(self, number: int) -> None:
        self._rows.session = number

    def reopened(self) -> MemoryJournal:
        """Return a copy in the next session, as after a crash; later changes do not affect each other."""
        journal = copy.deepcopy(self)
        journal.session += 1
        return journal

    async def record(self, *events: Event) -> None:
        """Record events in this order, all of them or none.

        Raises:
            IllegalTransition: an event that the states of its job do not allow.
            RequestIdTaken: the acceptance has the request id of another job.
        """
        if (refusal := self._rows.take(events)) is not None:
            raise refusal
        self._store()
        self.events += events
        await anyio.lowlevel.checkpoint()

    def _store(self) -> None:
        """Apply new rows like the database does."""
        rows = self._rows
        self._bodies.update(rows.bodies)
        self._outcomes.update({row.id: row for row in rows.outcomes})
        self._uploads.update({sha256: (at, url) for sha256, at, url in rows.uploads})
        for job_id in rows.slimmed:
            self._bodies[job_id] = slim_body(self._bodies.get(job_id, b""))
        for outcome_id in rows.stored_answers:
            row = self._outcomes[outcome_id]
            if row.output is not None:
                self._outcomes[outcome_id] = row._replace(output=without_data_uris(row.output))
        for batch in (rows.bodies, rows.outcomes, rows.uploads, rows.slimmed, rows.stored_answers):
            batch.clear()

    async def find(self, keys: Sequence[JobKey]) -> dict[JobKey, KnownJob]:
        """Return those of the keys that the journal knows."""
        await anyio.lowlevel.checkpoint()
        jobs = {key: self._rows.jobs[key] for key in keys if key in self._rows.jobs}
        return {
            key: KnownJob(job.state, job.session, job.attempt, self._collectable_since(job))
            for key, job in jobs.items()
        }

    async def entries(self, states: Collection[State]) -> AsyncGenerator[OpenJob, None]:
        """Yield the jobs in these states, ordered by the time of their intent."""
        wanted = [job for job in self._rows.jobs.values() if job.state in states]
        wanted.sort(key=lambda job: -math.inf if job.intended_at is None else job.intended_at)
        for job in wanted:
            await anyio.lowlevel.checkpoint()
            if job.state in states:
                yield self._open_job(job)

    async def uploaded(self, sha256: str, since: float) -> str | None:
        """Return the URL of an image uploaded at or after `since`, or None."""
        await anyio.lowlevel.checkpoint()
        at, url = self._uploads.get(sha256, (-math.inf, None))
        return None if at < since else url

    async def requests(self, ids: Sequence[str]) -> set[str]:
        """Return those of the request ids that belong to a job or to one of its ended attempts."""
        given = {event.ticket.request_id for event in self.events if isinstance(event, Accepted)}
        return {request_id for request_id in ids if request_id in given}

    async def settled(self) -> None:
        """Return at once: everything recorded is kept."""
        await anyio.lowlevel.checkpoint()

    async def counts(self) -> Counts:
        """Return totals over all sessions."""
        await anyio.lowlevel.checkpoint()
        jobs = self._rows.jobs.values()
        is_open = [job for job in jobs if job.state in OPEN]
        return Counts(
            by_state=dict(Counter(job.state for job in jobs)),
            spent_usd=self._rows.spent_usd,
            reserved_usd=sum(job.reserved_usd for job in is_open),
            oldest_open_at=min((job.intended_at or 0.0 for job in is_open), default=None),
        )

    def state(self, key: JobKey) -> State:
        """Return the state of one job; PENDING if the journal does not know it."""
        return self._rows.jobs[key].state if key in self._rows.jobs else State.PENDING

    def outcomes(self, keys: Sequence[JobKey]) -> dict[JobKey, JobOutcome]:
        """Return what the results table shows of those of the keys that the journal knows."""
        return {key: self._outcome(key, self._rows.jobs[key]) for key in keys if key in self._rows.jobs}

    def _collectable_since(self, job: JobRow) -> float | None:
        end = self._outcomes.get(job.end_id)
        return end.at if end is not None and job.state is State.COLLECTABLE else None

    def _ended_at(self, job: JobRow) -> float | None:
        row = self._outcomes.get(job.answer_id) or self._outcomes.get(job.end_id)
        return None if row is None else row.at

    def _open_job(self, job: JobRow) -> OpenJob:
        answer = self._outcomes.get(job.answer_id)
        ticket = None if job.request_id is None else _ticket(RequestId(job.request_id), *job.urls)
        timeouts = {(job_id, at): seconds for job_id, at, seconds in self._rows.start_timeouts}
        return OpenJob(
            job_key=JobKey(job.key),
            state=job.state,
            attempt=job.attempt,
            intended_at=job.intended_at or 0.0,
            body=self._bodies.get(job.id, b""),
            accepted_at=job.accepted_at,
            ticket=ticket,
            answer=None
            if answer is None or answer.output is None
            else answer_of(answer.output, answer.billable_units, answer.engine),
            reserved_usd=job.reserved_usd,
            ended_at=self._ended_at(job),
            start_timeout=timeouts.get((job.id, job.intended_at or 0.0)),
        )

    def _outcome(self, key: JobKey, job: JobRow) -> JobOutcome:
        answer, end = self._outcomes.get(job.answer_id), self._outcomes.get(job.end_id)
        is_unknown = job.state is State.UNKNOWN
        return JobOutcome(
            job_key=key,
            state=job.state,
            attempts=job.attempt,
            request_id=None if job.request_id is None else RequestId(job.request_id),
            submitted_at=job.intended_at,
            completed_at=self._ended_at(job),
            output=None if answer is None else answer.output,
            images=None if end is None else end.images,
            queue_seconds=None if answer is None else answer.queue_seconds,
            total_seconds=None if answer is None else answer.total_seconds,
            download_seconds=None if end is None else end.download_seconds,
            billable_units=answer.billable_units if answer is not None else None if end is None else end.billable_units,
            cost_usd=job.cost_usd,
            engine=None if answer is None else answer.engine,
            error_type="unknown" if is_unknown else None if end is None else end.error_type,
            error_message=job.reason if is_unknown else None if end is None else end.error_message,
        )


def _ticket(request_id: RequestId, status: str | None, response: str | None, cancel: str | None) -> Ticket:
    return Ticket(request_id, status or "", response or "", cancel or "")
