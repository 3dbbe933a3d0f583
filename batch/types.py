"""Shared value types: jobs, tickets, statuses, answers. Pure; imports no library.

All durations are float seconds, all instants are float Unix seconds (UTC). Types with millions of instances per run are
named tuples: constructing a frozen dataclass takes four times as long.
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
"""`owner/alias[/path]`, for example `fal-ai/flux/dev/image-to-image`."""
JobKey = NewType("JobKey", str)
"""32 hex digits: BLAKE2b-128 of the app id and the canonical JSON of the complete input."""
RequestId = NewType("RequestId", str)
"""The server's id of an accepted request."""


@dataclass(frozen=True, slots=True)
class Problem:
    """The reason why a manifest row cannot become a job. `type` is stable, `message` is for the user."""

    row: int
    """0-based position in the manifest."""
    line: int | None
    """1-based line of a text manifest; None if the format has no lines (Parquet)."""
    column: str
    value: str
    type: str
    message: str


@dataclass(frozen=True, slots=True)
class LocalImage:
    """An image that must be uploaded before its job can be submitted."""

    sha256: str
    size_bytes: int
    path: Path | None = None
    """The image file; None if the manifest contains the bytes."""
    data: bytes | None = field(default=None, repr=False)
    name: str = "image"


class Job(NamedTuple):
    """One image-to-image call with every input resolved."""

    key: JobKey
    input: JsonObject
    """The complete input, including defaults and seed. For a local image `image_url` is the token
    `sha256:<hex>`, which the runner replaces by the uploaded URL on submit."""
    image: LocalImage | None = None
    megapixels: float | None = None
    """Size of the source image; None if unknown without a download."""


class QueueState(StrEnum):
    """The three states of the queue protocol, which has no FAILED or CANCELLED."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"


@dataclass(frozen=True, slots=True)
class Ticket:
    """The response to an accepted submit: the request id and the server's URLs for the request."""

    request_id: RequestId
    status_url: str = ""
    response_url: str = ""
    cancel_url: str = ""
    position: int | None = field(default=None, compare=False)
    """0-based queue position on acceptance; not stored."""


@dataclass(frozen=True, slots=True)
class TicketStatus:
    """One status response. COMPLETED means that the request ended, not that it succeeded."""

    state: QueueState | None
    """None if the service's word is unknown or missing: the request counts as running, for a limited time."""
    position: int | None = None
    """0-based queue position while IN_QUEUE."""
    inference_time: float | None = None
    error: str | None = None
    error_type: str | None = None
    logs: tuple[JsonObject, ...] = ()
    word: str = ""
    """The service's own word, at most 100 characters; empty if the response has no text there."""
    failed: bool = False
    """With COMPLETED: the service's word means failure (FAILED, CANCELLED, ...). fal has no such word."""


class Answer(NamedTuple):
    """The result of a finished request: the endpoint's unchanged output and facts from the headers."""

    output: JsonObject
    """{} if the body is not a JSON object."""
    billable_units: float | None = None
    engine: str | None = None
    """The engine that executed the request, reported by our own server (`preview`, `flux`, `echo`); None from fal."""
    raw: bytes | None = None
    """The unchanged body; None if only the output is known."""


class StoredImage(NamedTuple):
    """One result image: the endpoint's metadata and the path of our copy."""

    url: str
    width: int | None = None
    height: int | None = None
    content_type: str | None = None
    file_name: str | None = None
    file_size: int | None = None
    path: str | None = None
    """Relative to the run directory; None if downloads are off."""
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a job, ready to be sent."""

    job_key: JobKey
    number: int
    """Counted from 1. A repeat of a submit with unknown outcome keeps its number, and so its idempotency key."""
    body: bytes = field(repr=False)
    repeat: bool = field(default=False, compare=False)
    """Whether an earlier POST of the attempt may have arrived."""

    @property
    def idempotency_key(self) -> str:
        """The key of this job, attempt and body: our server answers a repeated key with the same request id.

        The key includes the body because each upload of a local image has a new URL: another run directory sends the
        same job to the same server with another body.
        """
        return f"{self.job_key}-{self.number}-{blake2b(self.body, digest_size=4).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Failed:
    """The failure of a job. `error_type` is the service's machine-readable word if it gave one."""

    error_type: str
    message: str
    billable_units: float | None = None
