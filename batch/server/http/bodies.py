"""The JSON bodies of the server's API as pydantic models. Pure.

The OpenAPI document describes all of them. The server builds its health and upload responses from them; `batch.fal`
builds the others, and tests compare them with the document.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from batch.fal.platform import PlatformError
from batch.fal.platform_queries import EstimateKind

__all__ = [
    "AlreadyCompletedBody",
    "AnnouncementBody",
    "BillingPageBody",
    "Body",
    "CancellationBody",
    "CompletedBody",
    "EmptyBody",
    "EstimateBody",
    "HealthBody",
    "InProgressBody",
    "InQueueBody",
    "JoinedBody",
    "KeySetBody",
    "MetaBody",
    "ModelErrorBody",
    "MultipartBody",
    "NotFoundBody",
    "PartBody",
    "PartListBody",
    "PlatformErrorBody",
    "PricePageBody",
    "RequestErrorBody",
    "RequestPageBody",
    "ReservedBody",
    "StoredBody",
    "TicketBody",
    "TokenBody",
    "without_nulls",
]

_Url = Annotated[str, Field(json_schema_extra={"format": "uri"})]
_Uuid = Annotated[str, Field(json_schema_extra={"format": "uuid"})]
_Instant = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


def without_nulls(schema: dict[str, Any]) -> None:
    """Change a schema in place: a field that defaults to None is absent from the JSON, never null."""
    for field in schema.get("properties", {}).values():
        if field.get("default", ...) is None:
            del field["default"]
            field.update(field.pop("anyOf")[0])


class Body(BaseModel):
    """A JSON object that the server sends or receives."""

    model_config = ConfigDict(frozen=True, json_schema_extra=without_nulls, defer_build=True)


# --- the queue --------------------------------------------------------------------------------------------


class MetricsBody(Body):
    """Measured times in seconds."""

    inference_time: NonNegativeFloat | None = None


class LogLineBody(Body):
    """A log line."""

    message: str
    timestamp: _Instant
    level: Literal["STDERR", "STDOUT", "ERROR", "INFO", "WARN", "DEBUG"]
    source: Literal["USER"]
    labels: dict[str, Any]


class _RequestBody(Body):
    request_id: _Uuid
    response_url: _Url
    status_url: _Url
    cancel_url: _Url


class TicketBody(_RequestBody):
    """An accepted request."""

    status: Literal["IN_QUEUE"]
    logs: None
    metrics: MetricsBody
    queue_position: NonNegativeInt


class InQueueBody(_RequestBody):
    """The status of a waiting request."""

    status: Literal["IN_QUEUE"]
    queue_position: NonNegativeInt


class InProgressBody(_RequestBody):
    """The status of a running request."""

    status: Literal["IN_PROGRESS"]
    logs: list[LogLineBody]


class CompletedBody(_RequestBody):
    """The status of a request that has ended, successfully or not."""

    status: Literal["COMPLETED"]
    logs: list[LogLineBody]
    metrics: MetricsBody
    error: str | None = None
    error_type: str | None = None


class CancellationBody(Body):
    """The cancellation was accepted."""

    status: Literal["CANCELLATION_REQUESTED"]


class AlreadyCompletedBody(Body):
    """The cancellation came too late."""

    status: Literal["ALREADY_COMPLETED"]


class HealthBody(Body):
    """The engine and the load of the server."""

    engine: str
    model: str
    revision: str
    safety_checker: str
    safety_checked: bool
    slots: PositiveInt
    honours_idempotency_key: bool
    honours_start_timeout: bool
    queue_depth: NonNegativeInt
    running: NonNegativeInt
    accepted: NonNegativeInt
    submit_posts: NonNegativeInt
    disk: Literal["ok", "refuses"]


# --- errors -----------------------------------------------------------------------------------------------


class RequestErrorBody(Body):
    """An infrastructure error."""

    detail: str
    error_type: str | None = None


class ModelErrorEntry(Body):
    """One problem of an invalid or failed request."""

    loc: list[str | int]
    msg: str
    type: str
    url: _Url
    ctx: dict[str, Any] | None = None
    input: Annotated[Any, Field(default_factory=lambda: None)]


class ModelErrorBody(Body):
    """A model error: one entry for each problem."""

    detail: Annotated[list[ModelErrorEntry], Field(min_length=1)]


class NotFoundBody(Body):
    """The request id is unknown."""

    status: Literal["NOT_FOUND"]


class PlatformErrorEntry(Body):
    """The type and text of an error."""

    type: PlatformError
    message: str
    request_id: str | None = None


class PlatformErrorBody(Body):
    """An error of the platform API."""

    error: PlatformErrorEntry


# --- files ------------------------------------------------------------------------------------------------


class TokenBody(Body):
    """A token for uploads."""

    token: str
    token_type: str
    base_url: _Url
    expires_at: _Instant


class AnnouncementBody(Body):
    """The file that an upload will send."""

    content_type: str | None = None
    file_name: str | None = None


class ReservedBody(Body):
    """An announced upload."""

    upload_url: _Url
    file_url: _Url


class StoredBody(Body):
    """A stored file."""

    access_url: _Url


class MultipartBody(Body):
    """An announced multipart upload."""

    access_url: _Url
    uploadId: str  # noqa: N815 - fal's field name


class EmptyBody(Body):
    """An empty object."""


class PartBody(Body):
    """One part of a file."""

    partNumber: PositiveInt  # noqa: N815 - fal's field name
    etag: str


class PartListBody(Body):
    """All parts of a file."""

    parts: Annotated[list[PartBody], Field(min_length=1)]


class JoinedBody(Body):
    """A file joined from its parts."""

    access_url: _Url
    file_url: _Url


class PublicKeyBody(Body):
    """A public key (JWK)."""

    kty: Literal["OKP"]
    x: str


class KeySetBody(Body):
    """The public keys of webhook signatures."""

    keys: list[PublicKeyBody]


# --- the platform API -------------------------------------------------------------------------------------


class _PageBody(Body):
    next_cursor: Annotated[str | None, Field(description="Cursor of the next page; null on the last page.")]
    has_more: bool


class RequestItemBody(Body):
    """A request in the listing."""

    request_id: str
    endpoint_id: str
    sent_at: _Instant
    started_at: _Instant
    ended_at: _Instant | None = None
    duration: NonNegativeFloat | None = None
    status_code: int | None = None
    json_input: dict[str, Any] | None = None
    json_output: dict[str, Any] | None = None


class RequestPageBody(_PageBody):
    """One page of requests."""

    items: list[RequestItemBody]


class BillingEventBody(Body):
    """A charge."""

    request_id: str
    endpoint_id: str
    timestamp: _Instant
    output_units: NonNegativeFloat
    unit_price: NonNegativeFloat
    percent_discount: None
    cost_subtotal: NonNegativeFloat
    cost_discount: NonNegativeFloat
    cost_total: NonNegativeFloat
    cost_estimate_nano_usd: NonNegativeFloat
    tags: dict[str, str] | None = None


class BillingPageBody(_PageBody):
    """One page of charges."""

    billing_events: list[BillingEventBody]


class PriceBody(Body):
    """The price of a billing unit."""

    endpoint_id: str
    unit_price: NonNegativeFloat
    unit: str
    currency: Literal["USD"]


class PricePageBody(_PageBody):
    """The prices of the endpoints."""

    prices: list[PriceBody]


class EstimateBody(Body):
    """An estimated cost."""

    estimate_type: EstimateKind
    total_cost: NonNegativeFloat
    currency: Literal["USD"]


class MetaBody(Body):
    """The address ranges that webhooks come from, in CIDR notation."""

    webhook_ip_ranges: list[str]
