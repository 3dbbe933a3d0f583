"""Records of a request, from its submission to its result. Pure values.

Points in time are Unix seconds, durations are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NamedTuple

from batch.types import AppId, RequestId

__all__ = [
    "DEFAULT_RETENTION",
    "AcceptedSubmission",
    "CompletedRequest",
    "Delivery",
    "DeliveryOutcome",
    "ListingRules",
    "ListingWindow",
    "LogLine",
    "Priority",
    "RecoveredRequest",
    "RequestSummary",
    "RetentionOptions",
    "StoredRequest",
    "Submission",
    "Webhook",
    "uuid7",
]


class Priority(IntEnum):
    """Queue priority: a low request waits behind all normal ones. The store saves these numbers."""

    NORMAL = 0
    LOW = 1


class LogLine(NamedTuple):
    """One log line of a request."""

    at: float
    level: str
    """`INFO`, `ERROR`, ..., as in the status response."""
    message: str


class Webhook(NamedTuple):
    """The callback that a request asked for."""

    url: str
    host: str
    """Host of the URL. Deliveries are limited per host, so that an unresponsive host does not block the others."""
    base: str
    """The server's scheme and host as the submitter used them; image URLs start with it."""


class Delivery(NamedTuple):
    """A webhook delivery that is due."""

    request_id: RequestId
    webhook: Webhook
    tries: int
    """Attempts made so far."""


class DeliveryOutcome(NamedTuple):
    """The outcome of a delivery attempt."""

    request_id: RequestId
    due_at: float | None
    """Time of the next attempt; None: no further attempt."""


class RetentionOptions(NamedTuple):
    """Retention that a caller set for its own request."""

    brief: bool = False
    """Remove the request's input and output early (`X-Fal-Store-IO: 0`)."""
    file_life: float | None = None
    """Lifetime of the result's images, in seconds from the end of the request; None: the server's retention."""


DEFAULT_RETENTION = RetentionOptions()


@dataclass(frozen=True, slots=True)
class Submission:
    """An accepted request."""

    request_id: RequestId
    app: AppId
    accepted_at: float
    body: bytes = field(repr=False)
    """The input as JSON. Embedded images are saved in the storage and replaced by their `/files/...` path."""
    digest: bytes = field(default=b"", repr=False)
    """Digest of the app and the input as received; a repeated idempotency key must have the same one."""
    idempotency_key: str | None = None
    priority: Priority = Priority.NORMAL
    start_by: float | None = None
    """A request that has not started by then ends with 504."""
    owner: str = ""
    """Owner of the API key; empty on a server without keys. Idempotency keys are separate per owner."""
    webhook: Webhook | None = None
    retention: RetentionOptions = DEFAULT_RETENTION
    source: str | None = None
    """`/files/...` path of the source image if this server stores it."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Labels for the billing event (`X-Fal-Tags`)."""


class AcceptedSubmission(NamedTuple):
    """The result of a submission."""

    request_id: RequestId
    """Id of the new request, or of the earlier one with the same idempotency key."""
    fresh: bool
    """False: a repeat; no request was added."""
    same_input: bool = True
    """False: the idempotency key was used before with a different input."""


class RecoveredRequest(NamedTuple):
    """A request that was unfinished when the server stopped."""

    request_id: RequestId
    app: AppId
    priority: Priority
    start_by: float | None
    owner: str = ""
    retention: RetentionOptions = DEFAULT_RETENTION


@dataclass(frozen=True, slots=True)
class CompletedRequest:
    """A finished request: what its result URL returns."""

    request_id: RequestId
    app: AppId
    ended_at: float
    status: int
    """HTTP status of the result: 200, 422, 499, 500, 504, ..."""
    payload: bytes = field(repr=False)
    """JSON body of the result. Image URLs are stored as `/files/...` paths, because the server's address may change."""
    started_at: float | None = None
    inference_time: float | None = None
    billable_units: float = 0.0
    error_type: str | None = None
    """Set for infrastructure errors only; the payload of a model error contains its type."""
    retryable: bool | None = None
    """Whether a retry may succeed; None if the status already answers that."""
    inline: bool = False
    """`sync_mode`: the response contains the images as data URIs."""
    logs: tuple[LogLine, ...] = ()
    owner: str = ""
    kept_for: float | None = None
    """Seconds from the end of the request for which the result is available; None: the server's retention."""
    engine: str | None = None
    """Engine that executed the request; None if it never started. A restarted server may use another engine."""


class StoredRequest(NamedTuple):
    """A request in the store."""

    app: AppId
    completed: CompletedRequest | None
    """None: accepted, no result stored yet."""
    owner: str = ""


class RequestSummary(NamedTuple):
    """A request in a list."""

    request_id: RequestId
    accepted_at: float
    body: bytes | None
    """The accepted input; None if it is too long for a list."""
    started_at: float | None
    """None until the request has ended: the store writes it with the result."""
    ended_at: float | None
    status: int | None
    payload: bytes | None
    """The result's body; None if it is too long for a list."""
    error_type: str | None
    inference_time: float | None
    inline: bool
    """`sync_mode`: the images belong to the response and are not listed."""


def uuid7(now: float, chance: int) -> RequestId:
    """Return a UUID version 7: 48 bits of `now` in milliseconds, then 74 bits of `chance`.

    fal's request ids use version 7 since 2026; they contain their time of creation.
    """
    high = (int(now * 1000) << 16) | 0x7000 | (chance >> 62 & 0xFFF)
    digits = f"{high & (1 << 64) - 1:016x}{1 << 63 | chance & (1 << 62) - 1:016x}"
    return RequestId(f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}")


class ListingWindow(StrEnum):
    """The time of a request that the listing compares with `start` and `end`; fal does not document it."""

    SENT_AT = "sent_at"
    ENDED_AT = "ended_at"


@dataclass(frozen=True, slots=True)
class ListingRules:
    """Options of the platform API's listing where fal's behaviour is unknown."""

    show_waiting: bool = False
    """Whether unfinished requests are listed."""
    lag: float = 0.0
    """Seconds until an event appears in the listing."""
    window: ListingWindow = ListingWindow.SENT_AT
