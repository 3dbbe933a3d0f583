"""Decisions of the journal, without its database: how a group of events changes the rows of jobs. Pure.

Owns the columns that each event changes and when money counts as spent. Contains no SQL, files or threads: `database`
loads the rows of a group, applies its events to a `JobTransitions` and writes the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import orjson

from batch.journal.answers import pack
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
from batch.journal.records import RequestIdTaken
from batch.journal.states import IllegalTransition, State, advance
from batch.types import Answer, JobKey, Json, StoredImage

__all__ = ["JobRow", "JobTransitions", "OutcomeRow", "decode_images", "encode_images", "slim_body", "taken"]

Value: TypeAlias = str | bytes | int | float | None
"""A value of one SQLite field."""

_LONG_STRING = 4096
"""Characters. A longer string in a body can only be a data URI; the journal keeps its hash instead."""
_STATES = {str(state): state for state in State}


class JobRow:
    """A row of `jobs` in memory. The attributes have the names of the columns."""

    __slots__ = (
        "accepted_at",
        "answer_id",
        "attempt",
        "cost_usd",
        "end_id",
        "id",
        "intended_at",
        "key",
        "reason",
        "request_id",
        "reserved_usd",
        "session",
        "state",
        "urls",
    )

    def __init__(self, id: int, key: str) -> None:  # noqa: A002 - the column's name
        """Create the row of a new job."""
        self.id, self.key, self.state = id, key, State.PENDING
        self.session = self.attempt = 0
        self.intended_at: float | None = None
        self.reserved_usd = 0.0
        self.cost_usd: float | None = None
        self.forget()

    def forget(self) -> None:
        """Clear the fields of the last attempt; its cost stays."""
        self.accepted_at: float | None = None
        self.request_id: str | None = None
        self.urls: tuple[str | None, str | None, str | None] = (None, None, None)
        self.reason: str | None = None
        self.answer_id: int | None = None
        self.end_id: int | None = None

    @classmethod
    def of(cls, row: tuple[Value, ...]) -> JobRow:
        """Create a row from the columns of the statement `load_jobs`."""
        job = cls.__new__(cls)
        (
            job.id, job.key, state, job.session, job.attempt, job.intended_at, job.accepted_at, job.request_id,
            status_url, response_url, cancel_url, job.reserved_usd, job.cost_usd, job.reason, job.answer_id,
            job.end_id,
        ) = row  # type: ignore[assignment]  # STRICT tables: the columns have these types  # fmt: skip
        job.state, job.urls = _STATES[state], (status_url, response_url, cancel_url)  # type: ignore[index,assignment]
        return job

    def columns(self) -> tuple[Value, ...]:
        """Return the columns in the order of the statement `put_jobs`."""
        return (
            self.id, self.key, self.state.value, self.session, self.attempt, self.intended_at, self.accepted_at,
            self.request_id, *self.urls, self.reserved_usd, self.cost_usd, self.reason, self.answer_id, self.end_id,
        )  # fmt: skip


class OutcomeRow(NamedTuple):
    """A new row of `outcomes`, with the columns in the order of the statement `put_outcomes`."""

    id: int
    job_id: int
    kind: str
    session: int
    attempt: int
    at: float
    request_id: str | None
    output: bytes | None = None
    engine: str | None = None
    billable_units: float | None = None
    cost_usd: float | None = None
    queue_seconds: float | None = None
    total_seconds: float | None = None
    images: bytes | None = None
    download_seconds: float | None = None
    error_type: str | None = None
    error_message: str | None = None


class JobTransitions:
    """The rows that one group of events changes, and the new rows that it adds.

    Each call is applied completely or not at all, and sees the changes of the calls before it.
    """

    def __init__(
        self,
        jobs: Iterable[JobRow],
        *,
        session: int,
        last_job: int,
        last_outcome: int,
        owners: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Start from loaded rows; `owners` maps the request ids of the group that the journal knows to their jobs."""
        self.jobs: dict[str, JobRow] = {job.key: job for job in jobs}
        self._owners = dict(owners)
        self.session, self.last_job, self.last_outcome = session, last_job, last_outcome
        self.touched: dict[str, JobRow] = {}
        self.bodies: list[tuple[int, bytes]] = []
        self.start_timeouts: list[tuple[int, float, float]] = []
        self.slimmed: list[int] = []
        """Jobs that ended: their full bodies are needed only for another submit."""
        self.stored_answers: list[int] = []
        """Outcomes whose answers contained images that are now files."""
        self.outcomes: list[OutcomeRow] = []
        self.uploads: list[tuple[str, float, str]] = []
        self.spent_usd = 0.0
        self.finished = 0
        self.last_finished_at: float | None = None

    def take(self, events: Sequence[Event]) -> IllegalTransition | RequestIdTaken | None:
        """Apply the events of one call. If one of them is illegal, apply nothing and return the error."""
        states: dict[JobKey, State] = {}
        steps: list[tuple[Event, State, State]] = []
        for event in events:
            if isinstance(event, Uploaded):
                continue
            key = event.job_key
            before = states.get(key) or (self.jobs[key].state if key in self.jobs else State.PENDING)
            try:
                states[key] = advance(before, event.kind)
            except IllegalTransition as error:
                return error
            steps.append((event, before, states[key]))
        for event in events:
            if isinstance(event, Accepted) and (owner := self._other_owner(event)):
                return taken(event.ticket.request_id, owner)
        for step in steps:
            self._apply(*step)
        self.uploads += [(one.sha256, one.at, _storable(one.url)) for one in events if isinstance(one, Uploaded)]
        return None

    def _other_owner(self, event: Accepted) -> str | None:
        """Return another job with the same request id, or None."""
        owner = self._owners.setdefault(event.ticket.request_id, event.job_key)
        return None if owner == event.job_key else owner

    def _apply(self, event: Event, before: State, after: State) -> None:
        if isinstance(event, Uploaded):
            return
        job = self._job(event.job_key)
        job.state, job.session = after, self.session
        match event:
            case Intended():
                if before is State.UNKNOWN and event.attempt > job.attempt:
                    self._spend(job, job.reserved_usd)  # the replaced submit may have been accepted
                job.forget()
                job.attempt, job.intended_at, job.reserved_usd = event.attempt, event.at, event.reserved_usd
                self.bodies.append((job.id, event.body))
                if event.start_timeout is not None:
                    self.start_timeouts.append((job.id, event.at, event.start_timeout))
            case Accepted(ticket=ticket):
                job.accepted_at, job.request_id, job.reason = event.at, ticket.request_id, None
                job.urls = (ticket.status_url, ticket.response_url, ticket.cancel_url)
            case Refused():
                job.reserved_usd, job.reason = 0.0, _storable(event.reason)
            case Lost():
                job.reason = _storable(event.reason)
            case Answered():
                job.reserved_usd = 0.0
                self._spend(job, event.cost_usd)
                job.answer_id = self._answer(job, event)
            case Finished():
                job.end_id = self._finish(job, event)
                self.slimmed.append(job.id)
                carried = any(image.url.startswith("data:") and image.path for image in event.images)
                if carried and job.answer_id is not None:
                    self.stored_answers.append(job.answer_id)
                self.finished, self.last_finished_at = self.finished + 1, event.at
            case FailedForGood():
                job.reserved_usd = 0.0
                if before is not State.ANSWERED:  # an earlier answer has settled the cost
                    self._spend(job, event.cost_usd)
                job.end_id = self._fail(job, event)
                self.slimmed.append(job.id)
            case Uncollected():
                job.reserved_usd = 0.0
                self._spend(job, event.cost_usd)
                job.end_id = self._uncollected(job, event)
                if event.answer is not None:
                    job.answer_id = job.end_id
            case Retried():
                job.forget()
                job.attempt += 1

    def _job(self, key: str) -> JobRow:
        job = self.jobs.get(key)
        if job is None:
            self.last_job += 1
            job = self.jobs[key] = JobRow(self.last_job, key)
        self.touched[key] = job
        return job

    def _spend(self, job: JobRow, usd: float | None) -> None:
        if usd is not None:
            job.cost_usd = (job.cost_usd or 0.0) + usd
            self.spent_usd += usd

    def _answer(self, job: JobRow, event: Answered) -> int:
        answer = event.answer
        return self._outcome(
            job,
            event,
            output=pack(answer),
            engine=answer.engine,
            billable_units=answer.billable_units,
            cost_usd=event.cost_usd,
            queue_seconds=event.queue_seconds,
            total_seconds=event.total_seconds,
        )

    def _finish(self, job: JobRow, event: Finished) -> int:
        return self._outcome(job, event, images=encode_images(event.images), download_seconds=event.download_seconds)

    def _fail(self, job: JobRow, event: FailedForGood) -> int:
        return self._outcome(
            job,
            event,
            billable_units=event.failure.billable_units,
            cost_usd=event.cost_usd,
            error_type=_storable(event.failure.error_type),
            error_message=_storable(event.failure.message),
        )

    def _uncollected(self, job: JobRow, event: Uncollected) -> int:
        answer, failure = event.answer or Answer({}), event.failure
        return self._outcome(
            job,
            event,
            output=None if event.answer is None else pack(answer),
            engine=answer.engine,
            billable_units=answer.billable_units,
            cost_usd=event.cost_usd,
            images=encode_images(event.images) if event.images else None,
            error_type=_storable(failure.error_type),
            error_message=_storable(failure.message),
        )

    def _outcome(self, job: JobRow, event: Answered | Finished | FailedForGood | Uncollected, **columns: Any) -> int:
        at = event.ended_at if isinstance(event, Uncollected) else event.at
        self.last_outcome += 1
        self.outcomes.append(
            OutcomeRow(
                self.last_outcome, job.id, event.kind.value, self.session, job.attempt, at, job.request_id, **columns
            )
        )
        return self.last_outcome


def taken(request_id: str, owner: str) -> RequestIdTaken:
    """Return the error for a request id that belongs to another job."""
    return RequestIdTaken(f"the service returned request id {request_id[:80]}, which belongs to job {owner}")


def encode_images(images: Sequence[StoredImage]) -> bytes:
    """Return stored images as JSON: a list of lists, each with the fields of `StoredImage` in order."""
    return orjson.dumps([tuple(image) for image in images])


def decode_images(data: bytes) -> tuple[StoredImage, ...]:
    """Return the images that `encode_images` encoded."""
    return tuple([StoredImage(*image) for image in orjson.loads(data)])


def slim_body(body: bytes) -> bytes:
    """Return the body with each string longer than 4096 characters replaced by `sha256:<hex of its UTF-8>`.

    A body that is not JSON is returned unchanged.
    """
    if len(body) <= _LONG_STRING:
        return body
    try:
        return orjson.dumps(_slim(orjson.loads(body)))
    except orjson.JSONDecodeError:
        return body


def _slim(value: Json) -> Json:
    match value:
        case str() if len(value) > _LONG_STRING:
            return "sha256:" + hashlib.sha256(value.encode()).hexdigest()
        case dict():
            return {key: _slim(item) for key, item in value.items()}
        case list():
            return [_slim(item) for item in value]
        case _:
            return value


def _storable(text: str) -> str:
    """Replace characters that UTF-8 cannot encode: messages may quote file names with undecodable bytes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
