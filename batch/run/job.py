"""The state of one job in memory, and the three exceptions that end its attempt early. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from batch.fal.answer import has_images
from batch.journal.records import OpenJob
from batch.journal.states import State
from batch.run.poll_schedule import JobTimings
from batch.types import Answer, Failed, Job, JobKey, StoredImage, Ticket

__all__ = ["JobFailed", "JobRun", "OutcomeUnknown", "RunStopping"]


class JobFailed(Exception):
    """The attempt ended without a result; `new_attempt` says whether another may succeed.

    `collectable`: the failure is not the service's own verdict, so the paid result may be collected later, free.
    `answer` is an unusable answer, `images` are the images as far as they are known and stored.
    """

    def __init__(
        self,
        failure: Failed,
        *,
        new_attempt: bool = False,
        collectable: bool = False,
        answer: Answer | None = None,
        images: tuple[StoredImage, ...] = (),
    ) -> None:
        super().__init__(failure.message)
        self.failure, self.new_attempt = failure, new_attempt
        self.collectable, self.answer, self.images = collectable, answer, images


class OutcomeUnknown(Exception):
    """The outcome of the submit is unknown, and recorded as such."""


class RunStopping(Exception):
    """The run is stopping; the job was not submitted."""


@dataclass(slots=True)
class JobRun:
    """Progress of one job, as its task holds it. The journal is the source of truth."""

    key: JobKey
    job: Job | None
    """None for a job from the journal, which has its body."""
    attempt: int = 1
    body: bytes = field(default=b"", repr=False)
    state: State = State.PENDING
    ticket: Ticket | None = None
    answer: Answer | None = None
    images: tuple[StoredImage, ...] = ()
    """As recorded at its end."""
    intended_at: float = 0.0
    accepted_at: float = 0.0
    reserved_usd: float = 0.0
    ended_at: float | None = None
    """When we saw that its request had ended, if the journal has it."""
    start_timeout: float | None = None
    """Start timeout of its last submit, in seconds from acceptance."""
    repeats: bool = False
    """Whether a submit of an earlier session is sent again under its key: the time of the first intent counts."""
    resumed: bool = False
    """Whether an earlier session submitted it: its times say nothing about the service's speed."""
    timings: JobTimings = field(default_factory=JobTimings)
    """Observations of the reads of its request."""
    came_as: int = 0
    """How many jobs were in flight, itself included, when the window admitted it; 0: it holds no place."""

    @classmethod
    def of_entry(cls, entry: OpenJob) -> JobRun:
        """Continue from a journal entry."""
        return cls(
            key=entry.job_key,
            job=None,
            attempt=entry.attempt,
            body=entry.body,
            state=entry.state,
            ticket=entry.ticket,
            # An answer that an earlier version could not read may be readable now; if not, it is fetched again.
            answer=entry.answer if entry.answer is not None and has_images(entry.answer.output) else None,
            intended_at=entry.intended_at,
            accepted_at=entry.accepted_at or entry.intended_at,
            reserved_usd=entry.reserved_usd,
            ended_at=entry.ended_at,
            start_timeout=entry.start_timeout,
            resumed=True,
            timings=JobTimings(resumed=True),
        )

    def renew(self) -> None:
        """Begin a new attempt."""
        self.attempt += 1
        self.start_over()

    def start_over(self) -> None:
        """Reset the attempt: the target has nothing of it, so it is sent as if for the first time."""
        self.state, self.ticket, self.answer, self.resumed = State.PENDING, None, None, False
        self.ended_at = None
        self.timings = JobTimings()
        self.reserved_usd, self.repeats = 0.0, False
