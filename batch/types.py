"""The values that travel through the house: jobs, tickets, statuses, answers. Pure, knows no library.

All durations are float seconds, all instants are float Unix seconds (UTC). What a run makes a million of is a named
tuple: a frozen dataclass takes four times as long to make.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, NewType, TypeAlias

__all__ = [
    "Answer",
    "AppId",
    "Attempt",
    "Failed",
    "Job",
    "JobKey",
    "Json",
    "JsonObject",
    "LocalImage",
    "Problem",
    "QueueState",
    "RequestId",
    "StoredImage",
    "Ticket",
    "TicketStatus",
]

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
JsonObject: TypeAlias = dict[str, Json]

AppId = NewType("AppId", str)
"""`owner/alias[/path]`, for instance `fal-ai/flux/dev/image-to-image`."""
JobKey = NewType("JobKey", str)
"""32 hex digits: BLAKE2b-128 of the app id and the canonical JSON of the complete input."""
RequestId = NewType("RequestId", str)
"""The id that a server gave to one accepted submission."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why one manifest row cannot become a job. `type` is a stable word, `message` a sentence for a person."""

    row: int
    """0-based position in the manifest."""
    line: int | None
    """1-based line of a text manifest; None where the format has no lines (Parquet)."""
    column: str
    value: str
    type: str
    message: str


@dataclass(frozen=True, slots=True)
class LocalImage:
    """An image that has to be uploaded before its job can be submitted."""

    sha256: str
    size_bytes: int
    path: Path | None = None
    """Where its bytes are; None where the manifest itself carried them."""
    data: bytes | None = field(default=None, repr=False)
    name: str = "image"


class Job(NamedTuple):
    """One image-to-image call that has to happen, with every input resolved."""

    key: JobKey
    input: JsonObject
    """The complete input, defaults filled in and seed included. For a local image `image_url` holds the
    token `sha256:<hex>`; the runner puts the uploaded URL in its place when it submits."""
    image: LocalImage | None = None
    megapixels: float | None = None
    """Of the source image, where it is known without a download."""


class QueueState(StrEnum):
    """The three states that the queue protocol knows. There is no FAILED and no CANCELLED."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"


@dataclass(frozen=True, slots=True)
class Ticket:
    """What an accepted submit gives: the request id, and the URLs that the server wants to be asked at."""

    request_id: RequestId
    status_url: str = ""
    response_url: str = ""
    cancel_url: str = ""
    position: int | None = field(default=None, compare=False)
    """0-based place in the queue when it was accepted; nothing is kept of it."""


@dataclass(frozen=True, slots=True)
class TicketStatus:
    """One status answer. COMPLETED says that the work ended, not that it went well."""

    state: QueueState | None
    """None where the service's word is unknown, or missing: the request counts as running, but not without limit."""
    position: int | None = None
    """0-based place in the queue while IN_QUEUE."""
    inference_time: float | None = None
    error: str | None = None
    error_type: str | None = None
    logs: tuple[JsonObject, ...] = ()
    word: str = ""
    """The service's own word, at most 100 characters; empty where its answer has no text there."""
    failed: bool = False
    """With COMPLETED: the word itself says that the work failed (FAILED, CANCELLED, ...). fal has no such word."""


class Answer(NamedTuple):
    """A finished request: the endpoint's output as it came, and what the headers said."""

    output: JsonObject
    """{} where the answer is not a JSON object."""
    billable_units: float | None = None
    engine: str | None = None
    """What our own server says executed it (`preview`, `flux`, `echo`); None from fal."""
    raw: bytes | None = None
    """The body as it came; None where only the output is known."""


class StoredImage(NamedTuple):
    """One result image: what the endpoint said of it, and where our copy lies."""

    url: str
    width: int | None = None
    height: int | None = None
    content_type: str | None = None
    file_name: str | None = None
    file_size: int | None = None
    path: str | None = None
    """Relative to the run directory; None when downloads are off."""
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a job, as it is about to be sent."""

    job_key: JobKey
    number: int
    """From 1. A repeat of a submit whose outcome is unknown keeps its number, hence its idempotency key."""
    body: bytes = field(repr=False)
    repeat: bool = field(default=False, compare=False)
    """Whether an earlier POST of it may have arrived."""

    @property
    def idempotency_key(self) -> str:
        """Same job, attempt and bytes, same key: our server then answers with the same request id.

        The bytes count because a local image is at another URL after each upload: another run directory, at the
        same server, sends the same job with another body.
        """
        return f"{self.job_key}-{self.number}-{blake2b(self.body, digest_size=4).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Failed:
    """Why a job has no result. `error_type` is the service's machine word where it gave one."""

    error_type: str
    message: str
    billable_units: float | None = None
