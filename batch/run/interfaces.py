"""Interfaces of the runner: Protocols and the records that pass through them. Pure.

The runner imports this module and never aiohttp, sqlite3 or a file system; `batch.api` supplies the real edges,
the tests supply the fakes of `batch.testing`. All instants are Unix seconds, all durations seconds.
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

# --- the journal -------------------------------------------------------------------------------------------


class Journal(Protocol):
    """The single source of truth about what was asked, accepted, paid and answered."""

    session: int

    async def record(self, *events: Event) -> None:
        """Write events in this order; they are durable when this returns.

        Raises:
            StorageError: the disk refused; nothing of this call is written.
            IllegalTransition: an event that the states of its job do not allow.
            RequestIdTaken: the acceptance has the request id of another job.
        """

    async def settled(self) -> None:
        """Wait until all recorded events are durable, including those whose callers were cancelled.

        Raises:
            StorageError: the disk refused some of them, or takes too long.
        """

    async def find(self, keys: Sequence[JobKey]) -> dict[JobKey, KnownJob]:
        """Return those of the keys that the journal knows."""

    def entries(self, states: Collection[State]) -> AsyncGenerator[OpenJob, None]:
        """Yield the jobs in these states, ordered by the time of their intent."""

    async def uploaded(self, sha256: str, since: float) -> str | None:
        """Return the URL of an image uploaded at or after `since`, or None."""

    async def requests(self, ids: Sequence[str]) -> set[str]:
        """Return those of the request ids that belong to a job or to one of its ended attempts."""

    async def counts(self) -> Counts:
        """Return totals over all sessions."""


# --- the service -------------------------------------------------------------------------------------------


class HeldBack(Exception):
    """A submit was not sent: submits pause, or the run is stopping."""


class Service(Protocol):
    """The target's queue API. Each method is one exchange without retries. All raise `CallFailed`."""

    before_send: Callable[[Attempt], Awaitable[None]] | None
    """Awaited before the first byte of each submit, as the last wait; may raise `HeldBack`."""

    async def submit(self, attempt: Attempt) -> Ticket:
        """Send the POST that costs money.

        Raises:
            HeldBack: raised by `before_send`; nothing was sent.
        """

    async def status(self, ticket: Ticket) -> TicketStatus:
        """Read the status once."""

    async def result(self, ticket: Ticket) -> Answer:
        """Fetch the output of a completed request, checked against the endpoint's schema."""

    async def cancel(self, ticket: Ticket) -> CancelOutcome | None:
        """Ask for cancellation; None if the answer is inconclusive."""

    async def upload(self, data: bytes, content_type: str, name: str) -> str:
        """Store bytes at the target and return their URL."""

    async def download(self, url: str) -> bytes:
        """Fetch the bytes of a result image, up to the size limit; the key is never sent."""


class CompletionHints(Protocol):
    """Early notice that a request has ended, by stream or callback. A hint only triggers a read; it never decides."""

    async def wait(self, ticket: Ticket, usual: float, longest: float) -> bool:
        """Sleep until a hint about the request arrives, at most `longest` seconds; True if one arrived.

        Where no hint can be expected (any more) it sleeps for `usual` seconds from the call on. Each request gets one
        hint: after it, this only sleeps.
        """

    def forget(self, ticket: Ticket) -> None:
        """Drop a request that is settled or given up."""


class ImageError(Exception):
    """Bytes that are not a usable image. `type` is the endpoint's error type (`image_load_error`, ...)."""

    def __init__(self, type: str, message: str) -> None:  # noqa: A002 - the wire's own word
        super().__init__(message)
        self.type = type


class LoadedImage(NamedTuple):
    """A local image, read and verified, ready for upload."""

    data: bytes
    content_type: str
    megapixels: float


class Images(Protocol):
    """The image files of a run."""

    async def load(self, image: LocalImage) -> LoadedImage:
        """Read a manifest image, check its hash and decode it.

        Raises:
            ImageError: it is unusable; the message is for the row.
        """

    async def store(self, data: bytes) -> StoredImage:
        """Decode, hash, write, fsync, rename. Equal bytes are stored once. The result has an empty `url`.

        Raises:
            ImageError: the bytes are not a complete image.
            StorageError: the disk refused.
        """


# --- observers ---------------------------------------------------------------------------------------------


class Observer:
    """An observer that ignores everything; override what you need. `docs/results.md` lists the `action` words."""

    def happened(self, action: str, **facts: Json) -> None:
        """Take an event of one job or of the run; facts are JSON values."""

    def expected(self, jobs: int, already_done: int) -> None:
        """Take the number of jobs of this run, and of jobs done before it."""
