"""What the runner sees of the world: Protocols and the records that pass through them. Pure.

The runner imports this module and never aiohttp, sqlite3 or a file system; `batch.api` plugs the real edges
in, the tests plug in the fakes of `batch.testing`. All instants are Unix seconds, all durations seconds.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

from batch.fal.protocol import CancelOutcome, Reply
from batch.model import (
    Answer,
    Attempt,
    Failed,
    JobKey,
    Json,
    LocalImage,
    RequestId,
    StoredImage,
    Ticket,
    TicketStatus,
)
from batch.run.lifecycle import Happening, State

__all__ = [
    "Accepted",
    "Answered",
    "CallFailed",
    "Counts",
    "Entry",
    "Event",
    "FailedForGood",
    "Finished",
    "HeldBack",
    "Hints",
    "Images",
    "Intended",
    "Journal",
    "Known",
    "Lost",
    "Observer",
    "Outcome",
    "Picture",
    "PictureError",
    "Refused",
    "RequestIdTaken",
    "Retried",
    "Service",
    "Trouble",
    "Uncollected",
    "Uploaded",
]

# --- what the journal is told ------------------------------------------------------------------------------


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
    happening = Happening.INTEND


@dataclass(frozen=True, slots=True)
class Accepted:
    """The server gave a request id."""

    job_key: JobKey
    at: float
    ticket: Ticket
    happening = Happening.ACCEPT


@dataclass(frozen=True, slots=True)
class Refused:
    """The submit was certainly not accepted; the same attempt may be tried again. Frees the reservation."""

    job_key: JobKey
    at: float
    reason: str
    happening = Happening.REFUSE


@dataclass(frozen=True, slots=True)
class Lost:
    """Whether the submit was accepted is not known."""

    job_key: JobKey
    at: float
    reason: str
    happening = Happening.LOSE


@dataclass(frozen=True, slots=True)
class Answered:
    """The endpoint's output is here; its pictures are still to be fetched."""

    job_key: JobKey
    at: float
    answer: Answer
    cost_usd: float | None = None
    queue_seconds: float | None = None
    total_seconds: float | None = None
    happening = Happening.ANSWER


@dataclass(frozen=True, slots=True)
class Finished:
    """Every picture is stored and verified (or downloads are off)."""

    job_key: JobKey
    at: float
    images: tuple[StoredImage, ...]
    download_seconds: float | None = None
    happening = Happening.FINISH


@dataclass(frozen=True, slots=True)
class FailedForGood:
    """The job ended without a result."""

    job_key: JobKey
    at: float
    failure: Failed
    cost_usd: float | None = None
    happening = Happening.FAIL


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
    happening = Happening.UNCOLLECTED


@dataclass(frozen=True, slots=True)
class Retried:
    """A failed job is taken up again, as a new attempt: its number grows by one here."""

    job_key: JobKey
    at: float
    happening = Happening.RETRY


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A local picture now has a URL at the target. Not a job's event."""

    sha256: str
    """Of its content, with the target's name in front."""
    at: float
    url: str


Event: TypeAlias = (
    Intended | Accepted | Refused | Lost | Answered | Finished | FailedForGood | Uncollected | Retried | Uploaded
)


class RequestIdTaken(Exception):
    """The service gave a request id that it had given to another job: whose result it will show is not known."""


# --- what the journal tells --------------------------------------------------------------------------------


class Known(NamedTuple):
    """The little that deciding about a manifest row needs."""

    state: State
    session: int
    """Number of the `restyle run` that last changed it; the present one is `Journal.session`."""
    attempt: int = 1
    """The last attempt's number; of a PENDING job, the number that its next attempt gets."""
    ended_at: float | None = None
    """When we learned that its request had ended; of a COLLECTABLE job only."""


@dataclass(frozen=True, slots=True)
class Entry:
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


class Outcome(NamedTuple):
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
    """The endpoint's answer as it is stored (`batch.run.answers.unpack`); None where there was none."""
    images: bytes | None = None
    """The stored images, as `batch.run.ledger.encode_images` has them; None where the job is not done."""
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


class Journal(Protocol):
    """The only truth about what was asked, accepted, paid and answered."""

    session: int

    async def record(self, *events: Event) -> None:
        """Write events in this order; durable when it returns.

        Raises:
            StorageError: the disk refused; nothing of this call is written.
            IllegalTransition: an event that the lifecycle does not allow.
            RequestIdTaken: an acceptance under a request id that is another job's.
        """

    async def settled(self) -> None:
        """Wait until all that was recorded is durable, also what its callers, cancelled, do not wait for any more.

        Raises:
            StorageError: the disk refused some of it, or takes too long.
        """

    async def find(self, keys: Sequence[JobKey]) -> dict[JobKey, Known]:
        """Those of the keys that the journal knows."""

    def entries(self, states: Collection[State]) -> AsyncGenerator[Entry, None]:
        """Jobs in these states, the one intended first coming first."""

    async def uploaded(self, sha256: str, since: float) -> str | None:
        """URL of a picture uploaded at or after `since`, or None."""

    async def requests(self, ids: Sequence[str]) -> set[str]:
        """Those of the request ids that belong to a job, or to one of its ended attempts."""

    async def counts(self) -> Counts:
        """Totals over all sessions."""


# --- what the service does ---------------------------------------------------------------------------------


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


class HeldBack(Exception):
    """A submit was not sent: submits pause, or the run is stopping."""


class Service(Protocol):
    """The target's queue API. Each method is one exchange: no retries inside. All raise `CallFailed`."""

    leave: Callable[[Attempt], Awaitable[None]] | None
    """Awaited before the first byte of each submit, when nothing else is left to wait for; may raise `HeldBack`."""

    async def submit(self, attempt: Attempt) -> Ticket:
        """The POST that costs money.

        Raises:
            HeldBack: `leave` did; nothing was sent.
        """

    async def status(self, ticket: Ticket) -> TicketStatus:
        """One status read."""

    async def result(self, ticket: Ticket) -> Answer:
        """The output of a completed request, checked against the endpoint's schema."""

    async def cancel(self, ticket: Ticket) -> CancelOutcome | None:
        """Ask for cancellation; None where the answer says nothing."""

    async def upload(self, data: bytes, content_type: str, name: str) -> str:
        """Store bytes at the target; its URL."""

    async def download(self, url: str) -> bytes:
        """The bytes of a result picture, bounded; the key is never sent."""


class Hints(Protocol):
    """Who may know earlier than the next read that a request has ended: a stream, a callback. Never who decides."""

    async def wait(self, ticket: Ticket, usual: float, longest: float) -> bool:
        """Sleep until a word about the request comes, at most `longest` seconds; True where one came.

        Where no word can be expected (any more) it sleeps for `usual` seconds from the call on, no longer. One word
        a request is enough: after it, it only sleeps.
        """

    def forget(self, ticket: Ticket) -> None:
        """The request is settled, or given up: nobody waits for it any more."""


class PictureError(Exception):
    """Bytes that are not a usable picture. `type` is the endpoint's word for it (`image_load_error`, ...)."""

    def __init__(self, type: str, message: str) -> None:  # noqa: A002 - the wire's own word
        super().__init__(message)
        self.type = type


class Picture(NamedTuple):
    """A local picture, read and verified: ready to be uploaded."""

    data: bytes
    content_type: str
    megapixels: float


class Images(Protocol):
    """The picture files of a run."""

    async def load(self, image: LocalImage) -> Picture:
        """Read a manifest picture, check its hash and decode it.

        Raises:
            PictureError: it cannot be used; a message for the row.
        """

    async def store(self, data: bytes) -> StoredImage:
        """Decode, hash, write, fsync, rename. Equal bytes are stored once. `url` of the answer is empty.

        Raises:
            PictureError: the bytes are no complete picture.
            StorageError: the disk refused.
        """


# --- who watches -------------------------------------------------------------------------------------------


class Observer:
    """Does nothing; override what you want to see. `action` is one of the words in `docs/results.md`."""

    def happened(self, action: str, **facts: Json) -> None:
        """Something happened to one job or to the run; facts are JSON values."""

    def expected(self, jobs: int, already_done: int) -> None:
        """How many jobs this run has to do, and how many were done before it."""
