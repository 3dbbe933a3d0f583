"""What the server remembers of a request: how it came in and how it ended. Pure values.

Instants are Unix seconds, durations seconds. Nothing here knows where a record is kept or how it is answered.
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
    """`low` waits behind every normal request. Kept by the store as these numbers."""

    NORMAL = 0
    LOW = 1


class LogLine(NamedTuple):
    """One line of a request's log."""

    at: float
    level: str
    """`INFO`, `ERROR`, ..., as the wire names them."""
    message: str


class Webhook(NamedTuple):
    """Whom to tell when a request has ended."""

    url: str
    host: str
    """Of the URL: a host that does not answer must not hold up the others."""
    base: str
    """Scheme and host of the server as the submitter saw it: the images' URLs are built on it."""


class Delivery(NamedTuple):
    """A callback that is due."""

    request_id: RequestId
    webhook: Webhook
    tries: int
    """Made so far."""


class DeliveryOutcome(NamedTuple):
    """What a try at a callback left."""

    request_id: RequestId
    due_at: float | None
    """Of the next try; None: there is nothing more to do."""


class RetentionOptions(NamedTuple):
    """What a caller wishes to be forgotten sooner than the rest."""

    brief: bool = False
    """Input and output of the request: `X-Fal-Store-IO: 0`."""
    file_life: float | None = None
    """Its result's images: seconds from its end. None: as all others."""


DEFAULT_RETENTION = RetentionOptions()


@dataclass(frozen=True, slots=True)
class Submission:
    """A request as it was accepted."""

    request_id: RequestId
    app: AppId
    accepted_at: float
    body: bytes = field(repr=False)
    """The input as JSON. Images that came inside it lie in the storage; their `/files/...` path stands here."""
    digest: bytes = field(default=b"", repr=False)
    """Of app and input as they were received: what an idempotency key is compared with."""
    idempotency_key: str | None = None
    priority: Priority = Priority.NORMAL
    start_by: float | None = None
    """If it was not started by then it ends with 504."""
    owner: str = ""
    """Whose key it came with; empty on a server without keys. His idempotency keys are his own."""
    webhook: Webhook | None = None
    keeping: RetentionOptions = DEFAULT_RETENTION
    source: str | None = None
    """`/files/...` of its source image, where that is a file of ours."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """`X-Fal-Tags`: labels that its billing event shows."""


class AcceptedSubmission(NamedTuple):
    """What became of a submission."""

    request_id: RequestId
    """Its own, or that of the earlier request with the same idempotency key."""
    fresh: bool
    """False: a repeat, nothing was added."""
    same_input: bool = True
    """False: the idempotency key was used before with another input."""


class RecoveredRequest(NamedTuple):
    """A request that had not ended when the server stopped."""

    request_id: RequestId
    app: AppId
    priority: Priority
    start_by: float | None
    owner: str = ""
    keeping: RetentionOptions = DEFAULT_RETENTION


@dataclass(frozen=True, slots=True)
class CompletedRequest:
    """How a request ended: what its result URL answers from now on."""

    request_id: RequestId
    app: AppId
    ended_at: float
    status: int
    """HTTP status of the result: 200, 422, 499, 500, 504, ..."""
    payload: bytes = field(repr=False)
    """JSON body of the result. Images stand in it as `/files/...` paths: a server may move to another port."""
    started_at: float | None = None
    inference_time: float | None = None
    billable_units: float = 0.0
    error_type: str | None = None
    """Set for infrastructure errors only; a model error names itself in its payload."""
    retryable: bool | None = None
    """Whether another try may help; None where that says itself."""
    inline: bool = False
    """`sync_mode`: images are answered as data URIs."""
    logs: tuple[LogLine, ...] = ()
    owner: str = ""
    kept_for: float | None = None
    """Seconds from its end that it is told; None: as long as the server keeps all others."""
    engine: str | None = None
    """What executed it: a server may be started again with another one. None: nothing did."""


class StoredRequest(NamedTuple):
    """What the store knows of a request."""

    app: AppId
    ending: CompletedRequest | None
    """None: accepted, and not ended as far as the store knows."""
    owner: str = ""


class RequestSummary(NamedTuple):
    """A request as a list of many shows it."""

    request_id: RequestId
    accepted_at: float
    body: bytes | None
    """The input as it was accepted; None for one that is too long to be listed."""
    started_at: float | None
    """None as long as it has not ended, too: the store hears of it at the end."""
    ended_at: float | None
    status: int | None
    payload: bytes | None
    """The result's body; None for one that is too long to be listed."""
    error_type: str | None
    inference_time: float | None
    inline: bool
    """Its images belong to the answer alone and are not for a list."""


def uuid7(now: float, chance: int) -> RequestId:
    """A UUID version 7: its first 48 bits are `now` in milliseconds, 74 bits of `chance` follow.

    fal's own ids have been of this kind since 2026; their age can be read off them.
    """
    high = (int(now * 1000) << 16) | 0x7000 | (chance >> 62 & 0xFFF)
    digits = f"{high & (1 << 64) - 1:016x}{1 << 63 | chance & (1 << 62) - 1:016x}"
    return RequestId(f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}")


class ListingWindow(StrEnum):
    """Which instant of a request the listing's `start` and `end` are compared with; fal does not say."""

    SENT_AT = "sent_at"
    ENDED_AT = "ended_at"


@dataclass(frozen=True, slots=True)
class ListingRules:
    """How the platform's listing behaves where fal's behaviour is not known."""

    show_waiting: bool = False
    """Whether requests that have not ended are listed."""
    lag: float = 0.0
    """Seconds until the listing knows of an event."""
    window: ListingWindow = ListingWindow.SENT_AT
