"""What the runner sees of the world: Protocols and the records that pass through them. Pure.

The runner imports this module and never aiohttp, sqlite3 or a file system; `batch.api` plugs the real edges
in, the tests plug in the fakes of `batch.testing`. All instants are Unix seconds, all durations seconds.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from typing import NamedTuple, Protocol

from batch.fal.protocol import CancelOutcome
from batch.journal.events import Event
from batch.journal.records import Counts, KnownJob, OpenJob
from batch.journal.states import State
from batch.types import Answer, Attempt, JobKey, Json, LocalImage, StoredImage, Ticket, TicketStatus

__all__ = [
    "CompletionHints",
    "HeldBack",
    "ImageError",
    "Images",
    "Journal",
    "LoadedImage",
    "Observer",
    "Service",
]

# --- what the journal is told ------------------------------------------------------------------------------


# --- what the journal tells --------------------------------------------------------------------------------


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

    async def find(self, keys: Sequence[JobKey]) -> dict[JobKey, KnownJob]:
        """Those of the keys that the journal knows."""

    def entries(self, states: Collection[State]) -> AsyncGenerator[OpenJob, None]:
        """Jobs in these states, the one intended first coming first."""

    async def uploaded(self, sha256: str, since: float) -> str | None:
        """URL of an image uploaded at or after `since`, or None."""

    async def requests(self, ids: Sequence[str]) -> set[str]:
        """Those of the request ids that belong to a job, or to one of its ended attempts."""

    async def counts(self) -> Counts:
        """Totals over all sessions."""


# --- what the service does ---------------------------------------------------------------------------------


class HeldBack(Exception):
    """A submit was not sent: submits pause, or the run is stopping."""


class Service(Protocol):
    """The target's queue API. Each method is one exchange: no retries inside. All raise `CallFailed`."""

    before_send: Callable[[Attempt], Awaitable[None]] | None
    """Awaited before the first byte of each submit, when nothing else is left to wait for; may raise `HeldBack`."""

    async def submit(self, attempt: Attempt) -> Ticket:
        """The POST that costs money.

        Raises:
            HeldBack: `before_send` did; nothing was sent.
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
        """The bytes of a result image, bounded; the key is never sent."""


class CompletionHints(Protocol):
    """Who may know earlier than the next read that a request has ended: a stream, a callback. Never who decides."""

    async def wait(self, ticket: Ticket, usual: float, longest: float) -> bool:
        """Sleep until a word about the request comes, at most `longest` seconds; True where one came.

        Where no word can be expected (any more) it sleeps for `usual` seconds from the call on, no longer. One word
        a request is enough: after it, it only sleeps.
        """

    def forget(self, ticket: Ticket) -> None:
        """The request is settled, or given up: nobody waits for it any more."""


class ImageError(Exception):
    """Bytes that are not a usable image. `type` is the endpoint's word for it (`image_load_error`, ...)."""

    def __init__(self, type: str, message: str) -> None:  # noqa: A002 - the wire's own word
        super().__init__(message)
        self.type = type


class LoadedImage(NamedTuple):
    """A local image, read and verified: ready to be uploaded."""

    data: bytes
    content_type: str
    megapixels: float


class Images(Protocol):
    """The image files of a run."""

    async def load(self, image: LocalImage) -> LoadedImage:
        """Read a manifest image, check its hash and decode it.

        Raises:
            ImageError: it cannot be used; a message for the row.
        """

    async def store(self, data: bytes) -> StoredImage:
        """Decode, hash, write, fsync, rename. Equal bytes are stored once. `url` of the answer is empty.

        Raises:
            ImageError: the bytes are no complete image.
            StorageError: the disk refused.
        """


# --- who watches -------------------------------------------------------------------------------------------


class Observer:
    """Does nothing; override what you want to see. `action` is one of the words in `docs/results.md`."""

    def happened(self, action: str, **facts: Json) -> None:
        """Something happened to one job or to the run; facts are JSON values."""

    def expected(self, jobs: int, already_done: int) -> None:
        """How many jobs this run has to do, and how many were done before it."""
