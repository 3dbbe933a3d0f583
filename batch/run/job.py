"""One job on its way, in memory, and the three ways in which its way can end early. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from batch.fal.answer import has_images
from batch.journal.records import OpenJob
from batch.journal.states import State
from batch.run.poll_schedule import JobTimings
from batch.types import Answer, Failed, Job, JobKey, StoredImage, Ticket

__all__ = ["JobFailed", "JobRun", "OutcomeUnknown", "RunStopping"]


class JobFailed(Exception):
    """This attempt ended without a result; `new_attempt` says whether another may go better.

    `collectable`: it is not the service's own verdict, so what is paid for may be collected later, free. `answer` is
    what came in place of a usable one, `images` what is known and stored of its images.
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
    """The submit's outcome is unknown, and that is written down."""


class RunStopping(Exception):
    """The run is stopping: this job was not submitted."""


@dataclass(slots=True)
class JobRun:
    """Where one job is on its way. The journal is the truth; this is what its task holds in hand."""

    key: JobKey
    job: Job | None
    """None where the job comes from the journal: its body is there."""
    attempt: int = 1
    body: bytes = field(default=b"", repr=False)
    state: State = State.PENDING
    ticket: Ticket | None = None
    answer: Answer | None = None
    images: tuple[StoredImage, ...] = ()
    """As they were noted at its end."""
    intended_at: float = 0.0
    accepted_at: float = 0.0
    reserved_usd: float = 0.0
    ended_at: float | None = None
    """When we learned that its request had ended, where that is in the journal."""
    start_timeout: float | None = None
    """Of its last submit, in seconds from acceptance."""
    repeats: bool = False
    """Whether its submit of an earlier session goes out again under the same key: the first intent's time counts."""
    resumed: bool = False
    """Whether an earlier session submitted it: its times teach nothing about the service's pace."""
    timings: JobTimings = field(default_factory=JobTimings)
    """What the reads of its request have told."""
    came_as: int = 0
    """How many were in flight when the window let it in, itself included; 0: it holds no place there."""

    @classmethod
    def of_entry(cls, entry: OpenJob) -> JobRun:
        """Go on with what the journal says."""
        return cls(
            key=entry.job_key,
            job=None,
            attempt=entry.attempt,
            body=entry.body,
            state=entry.state,
            ticket=entry.ticket,
            # What an earlier version could not read may be readable now; if not, it is asked for again.
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
        """A new attempt at the same job."""
        self.attempt += 1
        self.start_over()

    def start_over(self) -> None:
        """Nothing of this attempt is at the target: it is sent as if for the first time."""
        self.state, self.ticket, self.answer, self.resumed = State.PENDING, None, None, False
        self.ended_at = None
        self.timings = JobTimings()
        self.reserved_usd, self.repeats = 0.0, False
