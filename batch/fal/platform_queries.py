"""Parse the queries of the platform API on the server: query strings and bodies into validated values. Pure.

The models also describe the parameters in the OpenAPI document. `platform` writes the responses and builds the same
calls as a client. Source: fal's platform OpenAPI document, August 2026. Unknown parameters are ignored.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from batch.fal.platform import BILLING_LIMIT, BILLING_SPAN, PAGE_LIMIT, instant_of
from batch.fal.protocol import TAG_PAIRS, Malformed, is_plain_id, read_object
from batch.types import AppId, RequestId

__all__ = [
    "BillingQuery",
    "CallEstimate",
    "ChargeSource",
    "EstimateKind",
    "EstimateQuery",
    "ListingQuery",
    "PricingQuery",
    "RequestOutcome",
    "SortBy",
    "UnitEstimate",
    "cursor_of",
    "read_billing_query",
    "read_estimate",
    "read_listing_query",
    "read_pricing_query",
]

_ID_LIMIT = 50
"""Maximum number of ids per call."""
DAY = 86400.0
_LAST_PAGE = 10**9
"""Largest page number; the offset must fit into an SQLite integer."""
_LISTS = frozenset({"endpoint_id", "expand", "tag"})


class RequestOutcome(StrEnum):
    """Outcome of a request in the listing."""

    SUCCESS = "success"
    ERROR = "error"
    """The service failed: 5xx."""
    USER_ERROR = "user_error"
    """The request was invalid: 4xx."""


class ChargeSource(StrEnum):
    """Source of billing events."""

    BILLED = "billed"
    TAGGED = "tagged-billed"
    """Each event with the tags of its request."""


class SortBy(StrEnum):
    """Sort key of the listing, descending. fal does not document the direction; its search is newest-first."""

    ENDED_AT = "ended_at"
    DURATION = "duration"


# --- values -----------------------------------------------------------------------------------------------


def _instant(value: float | str) -> float:
    at = instant_of(value) if isinstance(value, str) else value
    if at is None:
        raise ValueError("should be an ISO 8601 date or time")
    return at


def _digits(text: str) -> str:
    if not (text.isascii() and text.isdecimal()):
        raise ValueError("should be a number in decimal digits")
    return text


def cursor_of(page: int) -> str:
    """Return the cursor of a page, counted from 1: its number in base64, as in fal's example `Mg==`."""
    return base64.b64encode(str(page).encode()).decode()


def _page_of(cursor: str) -> int:
    try:
        text = base64.b64decode(cursor, validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        text = ""
    if not (text.isdecimal() and len(text) <= 10 and 1 <= int(text) <= _LAST_PAGE):
        raise ValueError("should be the next_cursor of an earlier page")
    return int(text)


def _uuid(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text.lower()):
        raise ValueError("should be a UUID")
    return text.lower()


def _plain_id(text: str) -> str:
    if not is_plain_id(text):
        raise ValueError("should be a request id: letters, digits, dashes and underscores")
    return text


def _tags(filters: Sequence[str]) -> dict[str, list[str]]:
    """Parse `key=value` filters to the accepted values of each key."""
    wanted: dict[str, list[str]] = {}
    for key, found, value in (one.partition("=") for one in filters):
        if not key or not found:
            raise ValueError("should be filters of the form key=value")
        wanted.setdefault(key.strip().lower(), []).append(value.strip())
    if len(filters) > TAG_PAIRS:
        raise ValueError(f"should be at most {TAG_PAIRS} filters, not {len(filters)}")
    return wanted


_Instant = Annotated[float, BeforeValidator(_instant), WithJsonSchema({"type": "string", "format": "date-time"})]
_Uuid = Annotated[RequestId, BeforeValidator(_uuid), WithJsonSchema({"type": "string", "format": "uuid"})]
_Item = TypeVar("_Item", bound=str)
_Ids = Annotated[tuple[Annotated[_Item, Field(min_length=1)], ...], Field(min_length=1, max_length=_ID_LIMIT)]
_Limit = Annotated[int, Field(ge=1), BeforeValidator(_digits)]
_Cursor = Annotated[int, BeforeValidator(_page_of), WithJsonSchema({"type": "string"})]
_Payloads = Annotated[
    bool, BeforeValidator(lambda values: "payloads" in values), WithJsonSchema({"enum": ["payloads"]})
]
_FILTER = {"type": "string", "pattern": "^[^=,]+=[^,]*$"}
_Tags = Annotated[
    Mapping[str, Sequence[str]],
    BeforeValidator(_tags),
    WithJsonSchema({"type": "array", "items": _FILTER, "minItems": 1, "maxItems": TAG_PAIRS}),
]


# --- query strings ----------------------------------------------------------------------------------------


class _Query(BaseModel):
    # Deferred to the first call of the platform API, so that the server starts faster.
    model_config = ConfigDict(frozen=True, defer_build=True)


class _TimeWindow(_Query):
    """A page of a time window. Times are Unix seconds."""

    now: SkipJsonSchema[float]
    """Time of the call, for the default window."""
    end: _Instant = Field(default_factory=lambda given: given["now"], description="Exclusive end. Default: now.")
    limit: int
    page: _Cursor = Field(
        default_factory=lambda: 1, alias="cursor", description="The `next_cursor` of the previous page."
    )

    @property
    def offset(self) -> int:
        """Number of rows before this page."""
        return (self.page - 1) * self.limit


class ListingQuery(_TimeWindow):
    """The parameters of the request listing."""

    apps: _Ids[AppId] = Field(alias="endpoint_id", description="Only these endpoints.")
    request_id: _Uuid | None = Field(
        None, description="Only this request. Changes the default of `start` to 90 days ago."
    )
    start: _Instant = Field(
        default_factory=lambda given: given["now"] - (BILLING_SPAN if given.get("request_id") else DAY),
        description="Default: 24 hours ago.",
    )
    outcome: RequestOutcome | None = Field(None, alias="status", description="Only requests with this outcome.")
    payloads: _Payloads = Field(default_factory=bool, alias="expand", description="Include inputs and outputs.")
    sort_by: SortBy = Field(SortBy.ENDED_AT, description="Sort key; the largest value comes first.")
    limit: _Limit = Field(PAGE_LIMIT // 2, le=PAGE_LIMIT, description="Requests per page.")


class BillingQuery(_TimeWindow):
    """The parameters of the billing events."""

    apps: _Ids[AppId] = Field(default_factory=tuple, alias="endpoint_id", description="Only these endpoints.")
    """Empty: all."""
    request_ids: _Ids[Annotated[RequestId, AfterValidator(_plain_id)]] = Field(
        default_factory=tuple, alias="request_id", description="Only these requests."
    )
    """Empty: all."""
    start: _Instant = Field(default_factory=lambda given: given["now"] - DAY, description="Default: 24 hours ago.")
    source: ChargeSource = Field(ChargeSource.BILLED, description="`tagged-billed` adds the tags of each request.")
    tags: _Tags = Field(
        default_factory=dict,
        alias="tag",
        description="`key=value` or `key=(untagged)`; requires `source=tagged-billed`.",
    )
    """For each key, a request must have one of the values; `(untagged)` matches a request without the key."""
    limit: _Limit = Field(BILLING_LIMIT, le=BILLING_LIMIT, description="Events per page.")

    @property
    def tagged(self) -> bool:
        """Whether events include the tags of their requests."""
        return self.source is ChargeSource.TAGGED

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.end - self.start > BILLING_SPAN:
            raise ValueError(f"start and end are {(self.end - self.start) / DAY:.0f} days apart; use at most 90")
        if self.tags and not self.tagged:
            raise ValueError(f"tag requires source={ChargeSource.TAGGED}, not source={self.source}")
        return self


class PricingQuery(_Query):
    """The parameters of the prices."""

    apps: _Ids[AppId] = Field(alias="endpoint_id", description="Only these endpoints.")


def read_listing_query(query: Sequence[tuple[str, str]], now: float) -> ListingQuery:
    """Read the query string of the request listing.

    Raises:
        Malformed: a required parameter is missing, or a value is not allowed.
    """
    return _checked(ListingQuery.model_validate, {**_given(query, _LISTS), "now": now})


def read_billing_query(query: Sequence[tuple[str, str]], now: float) -> BillingQuery:
    """Read the query string of the billing events.

    Raises:
        Malformed: a value is not allowed, or the window is longer than 90 days.
    """
    return _checked(BillingQuery.model_validate, {**_given(query, _LISTS | {"request_id"}), "now": now})


def read_pricing_query(query: Sequence[tuple[str, str]]) -> tuple[AppId, ...]:
    """Read the endpoints of a price query.

    Raises:
        Malformed: the query contains no endpoint, or too many.
    """
    return _checked(PricingQuery.model_validate, _given(query, _LISTS)).apps


def _given(query: Sequence[tuple[str, str]], lists: frozenset[str]) -> dict[str, Any]:
    """Return the non-empty parameters. Lists are repeated or comma-separated; otherwise the last value counts."""
    given: dict[str, Any] = {}
    for name, value in query:
        parts = [part.strip() for part in value.split(",")]
        given[name] = [*filter(None, dict.fromkeys([*given.get(name, ()), *parts]))] if name in lists else value.strip()
    return {name: value for name, value in given.items() if value}


# --- estimates --------------------------------------------------------------------------------------------


class EstimateKind(StrEnum):
    """The type of an estimate."""

    UNIT_PRICE = "unit_price"
    """A number of billing units at the unit price."""
    HISTORICAL = "historical_api_price"
    """A number of calls at the average cost of earlier calls."""


class UnitQuantity(_Query):
    """A number of billing units."""

    quantity: Annotated[float, Field(alias="unit_quantity", strict=True, ge=1e-6, le=1e15)]


class CallQuantity(_Query):
    """A number of calls."""

    quantity: Annotated[
        float,
        Field(alias="call_quantity", strict=True, ge=1, le=1e15, multiple_of=1, json_schema_extra={"type": "integer"}),
    ]


class UnitEstimate(_Query):
    """A query for the cost of billing units."""

    estimate_type: Literal["unit_price"]
    endpoints: dict[AppId, UnitQuantity]


class CallEstimate(_Query):
    """A query for the cost of calls."""

    estimate_type: Literal["historical_api_price"]
    endpoints: dict[AppId, CallQuantity]


_ESTIMATE: TypeAdapter[UnitEstimate | CallEstimate] = TypeAdapter(
    Annotated[UnitEstimate | CallEstimate, Field(discriminator="estimate_type")], config=ConfigDict(defer_build=True)
)


class EstimateQuery(NamedTuple):
    """The type and quantities of an estimate."""

    kind: EstimateKind
    quantities: dict[AppId, float]


def read_estimate(body: bytes) -> EstimateQuery:
    """Read the body of an estimate.

    Raises:
        Malformed: the body does not have the documented format.
    """
    asked = _checked(_ESTIMATE.validate_python, {"estimate_type": None, **read_object(body)})
    return EstimateQuery(EstimateKind(asked.estimate_type), {app: one.quantity for app, one in asked.endpoints.items()})


# --- errors -----------------------------------------------------------------------------------------------

_Value = TypeVar("_Value")


def _checked(validate: Callable[[Any], _Value], given: Mapping[str, Any]) -> _Value:
    """Validate parameters; report the first invalid one.

    Raises:
        Malformed: a parameter is invalid.
    """
    try:
        return validate(given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in problem["loc"] if part not in list(EstimateKind))[:150]
    if problem["type"] == "missing":
        raise Malformed(f"{place} is missing")
    said = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if problem["type"] in {"model_type", "dict_type"}:
        said = "should be a JSON object"
    raise Malformed(f"{place} = {problem['input']!r:.60}: {said}" if place else said)
