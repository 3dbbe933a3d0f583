"""Read and write the platform API's request listing, prices and charges, as client and as server. Pure.

Only the listing shows whether a submit without a response was accepted: list the endpoint's requests in a time window
and compare inputs. Source: fal's platform OpenAPI document, August 2026. It does not say whether a waiting request is
listed, so absence proves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import NamedTuple, TypeGuard
from urllib.parse import urlencode
from uuid import UUID

from batch.fal.protocol import Call, Malformed, Origins, Reply, is_plain_id, json_reply, read_object
from batch.types import AppId, Json, JsonObject, RequestId

__all__ = [
    "BILLING_LIMIT",
    "BILLING_SPAN",
    "PAGE_LIMIT",
    "Bill",
    "BillPage",
    "Charge",
    "Listed",
    "ListingPage",
    "PlatformError",
    "billing_call",
    "billing_reply",
    "estimate_reply",
    "instant_of",
    "listing_call",
    "listing_reply",
    "meta_reply",
    "minted_at",
    "platform_error_reply",
    "pricing_call",
    "pricing_reply",
    "read_billing",
    "read_listing",
    "read_price",
]

_VALUES_LIMIT = 1_000_000
"""Maximum number of JSON values per page; 10,000 billing events have about 90,000."""
PAGE_LIMIT = 100
"""Maximum page size of the listing; the default is half of it."""
BILLING_LIMIT = 10_000
"""Maximum page size of billing events."""
BILLING_SPAN = 90 * 86400.0
"""Maximum time window of a call for billing events, in seconds."""
_NANO = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Listed:
    """A request in the listing. Times are Unix seconds."""

    request_id: RequestId
    app: AppId
    sent_at: float | None
    started_at: float | None
    ended_at: float | None
    status_code: int | None
    input: JsonObject | None
    """None if payloads were not requested, or are not stored."""
    output: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class ListingPage:
    """One page of the listing."""

    items: tuple[Listed, ...]
    next_cursor: str | None


# --- client role ------------------------------------------------------------------------------------------


def listing_call(
    origins: Origins, app: AppId, *, start: float, end: float, cursor: str | None = None, limit: int = PAGE_LIMIT
) -> Call:
    """Build the call that lists the endpoint's requests from `start` to `end` (exclusive), with payloads."""
    query = {
        "endpoint_id": app,
        "start": _iso(start),
        "end": _iso(end),
        "expand": "payloads",
        "limit": str(limit),
    }
    if cursor is not None:
        query["cursor"] = cursor
    return Call("GET", f"{origins.platform}/models/requests/by-endpoint?{urlencode(query)}")


def read_listing(reply: Reply) -> ListingPage:
    """Read one page of the listing.

    Raises:
        Malformed: the page does not have the documented format, so it proves nothing.
    """
    items, cursor = _page_in(reply, "items")
    return ListingPage(tuple(_listed(item) for item in items), cursor)


def _page_in(reply: Reply, name: str) -> tuple[list[Json], str | None]:
    """Read the rows under a name, and the cursor of the next page; None on the last page."""
    answer = read_object(reply.body, values=_VALUES_LIMIT)
    rows, cursor = answer.get(name), answer.get("next_cursor")
    if not isinstance(rows, list):
        raise Malformed(f"the page has no list {name}")
    if answer.get("has_more") is not True:
        return rows, None
    if not isinstance(cursor, str):
        raise Malformed(f"the page of {name} has has_more = true but no next_cursor")
    return rows, cursor


def _listed(item: Json) -> Listed:
    if not isinstance(item, dict) or not is_plain_id(item.get("request_id")):
        raise Malformed(f"the request listing has an item without a valid request_id: {item!r:.60}")
    code, sent, output = item.get("status_code"), item.get("json_input"), item.get("json_output")
    return Listed(
        RequestId(str(item["request_id"])),
        AppId(str(item.get("endpoint_id", ""))),
        instant_of(item.get("sent_at")),
        instant_of(item.get("started_at")),
        instant_of(item.get("ended_at")),
        code if isinstance(code, int) else None,
        sent if isinstance(sent, dict) else None,
        output if isinstance(output, dict) else None,
    )


@dataclass(frozen=True, slots=True)
class Bill:
    """A billing event, as the client reads it."""

    request_id: RequestId
    at: float
    """Unix seconds."""
    units: float
    usd: float
    """The cost after discounts."""


class BillPage(NamedTuple):
    """One page of billing events."""

    bills: tuple[Bill, ...]
    next_cursor: str | None


def billing_call(origins: Origins, app: AppId, *, start: float, end: float, cursor: str | None = None) -> Call:
    """Build the call for billing events from `start` to `end`, at most `BILLING_SPAN`; requires an ADMIN key."""
    query = {"endpoint_id": app, "start": _iso(start), "end": _iso(end), "limit": str(BILLING_LIMIT)}
    if cursor is not None:
        query["cursor"] = cursor
    return Call("GET", f"{origins.platform}/models/billing-events?{urlencode(query)}")


def read_billing(reply: Reply) -> BillPage:
    """Read one page of billing events.

    Raises:
        Malformed: the page does not have the documented format, so it proves nothing.
    """
    events, cursor = _page_in(reply, "billing_events")
    return BillPage(tuple(_bill(event) for event in events), cursor)


def _bill(event: Json) -> Bill:
    if not isinstance(event, dict) or not isinstance(event.get("request_id"), str):
        raise Malformed("a billing event has no request_id")
    at, units, usd = instant_of(event.get("timestamp")), event.get("output_units"), event.get("cost_total")
    if usd is None:  # fal returns both; the integer is exact
        nano = event.get("cost_estimate_nano_usd")
        usd = nano / _NANO if _is_amount(nano) else None
    if at is None or not _is_amount(units) or not _is_amount(usd):
        raise Malformed(f"the billing event of {str(event['request_id'])[:60]!r} lacks its time, units or cost")
    return Bill(RequestId(str(event["request_id"])), at, float(units), float(usd))


def _is_amount(value: Json) -> TypeGuard[int | float]:
    """Whether a value is a number >= 0; orjson never returns NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def pricing_call(origins: Origins, app: AppId) -> Call:
    """Build the call for the endpoint's current price."""
    return Call("GET", f"{origins.platform}/models/pricing?{urlencode({'endpoint_id': app})}")


def read_price(reply: Reply, app: AppId) -> tuple[float, str]:
    """Read the unit price in US dollars and its unit.

    Raises:
        Malformed: the response contains no price in US dollars for the app.
    """
    prices = read_object(reply.body).get("prices")
    for entry in prices if isinstance(prices, list) else []:
        if isinstance(entry, dict) and entry.get("endpoint_id") == app:
            price, currency = entry.get("unit_price"), entry.get("currency", "USD")
            if isinstance(price, int | float) and not isinstance(price, bool) and price >= 0 and currency == "USD":
                return float(price), str(entry.get("unit", ""))
    raise Malformed(f"the price list has no price in USD for {app}")


# --- server role ------------------------------------------------------------------------------------------


class PlatformError(StrEnum):
    """Type of an error of the platform API."""

    AUTHORIZATION = "authorization_error"
    VALIDATION = "validation_error"
    NOT_FOUND = "not_found"
    RATE_LIMITED = "rate_limited"
    SERVER = "server_error"
    NOT_IMPLEMENTED = "not_implemented"


@dataclass(frozen=True, slots=True)
class Charge:
    """A billing event, as the server writes it."""

    request_id: RequestId
    app: AppId
    at: float
    units: float
    unit_price_usd: float
    tags: Mapping[str, str] | None = None
    """`X-Fal-Tags` of the request; None if they were not requested."""


def listing_reply(
    items: Sequence[Listed], next_cursor: str | None, *, payloads: bool, request_id: RequestId | None = None
) -> Reply:
    """Write one page of the listing.

    fal requires `started_at`; for a request that never started it is the end, or the time of the submit.
    """
    listed: list[Json] = [_item(item, payloads=payloads) for item in items]
    return _page_reply("items", listed, next_cursor, request_id)


def _item(item: Listed, *, payloads: bool) -> JsonObject:
    sent = item.sent_at if item.sent_at is not None else 0.0
    started = next((at for at in (item.started_at, item.ended_at) if at is not None), sent)
    entry: JsonObject = {
        "request_id": item.request_id,
        "endpoint_id": item.app,
        "sent_at": _iso(sent),
        "started_at": _iso(started),
    }
    if item.ended_at is not None:
        entry["ended_at"] = _iso(item.ended_at)
        entry["duration"] = round(max(0.0, item.ended_at - sent), 6)
    if item.status_code is not None:
        entry["status_code"] = item.status_code
    if payloads and item.input is not None:
        entry["json_input"] = item.input
    if payloads and item.output is not None:
        entry["json_output"] = item.output
    return entry


def billing_reply(charges: Sequence[Charge], next_cursor: str | None, request_id: RequestId | None = None) -> Reply:
    """Write one page of billing events."""
    events: list[Json] = [_event(charge) for charge in charges]
    return _page_reply("billing_events", events, next_cursor, request_id)


def _event(charge: Charge) -> JsonObject:
    nano = round(charge.units * charge.unit_price_usd * _NANO)
    tags: JsonObject = {} if charge.tags is None else {"tags": dict(charge.tags)}
    return {
        "request_id": charge.request_id,
        "endpoint_id": charge.app,
        "timestamp": _iso(charge.at),
        "output_units": charge.units,
        "unit_price": charge.unit_price_usd,
        "percent_discount": None,
        "cost_subtotal": nano / _NANO,
        "cost_discount": 0,
        "cost_total": nano / _NANO,
        "cost_estimate_nano_usd": nano,
        **tags,
    }


def pricing_reply(prices: dict[AppId, float], unit: str = "megapixels", request_id: RequestId | None = None) -> Reply:
    """Write the prices of endpoints."""
    rows: list[Json] = [
        {"endpoint_id": app, "unit_price": price, "unit": unit, "currency": "USD"} for app, price in prices.items()
    ]
    return _page_reply("prices", rows, None, request_id)


def estimate_reply(kind: str, total_usd: float, request_id: RequestId | None = None) -> Reply:
    """Write a cost estimate. `kind`: the requested estimate type."""
    return json_reply(200, {"estimate_type": kind, "total_cost": total_usd, "currency": "USD"}, request_id)


def meta_reply(webhook_ranges: Sequence[str], request_id: RequestId | None = None) -> Reply:
    """Write the address ranges of webhooks, in CIDR notation."""
    return json_reply(200, {"webhook_ip_ranges": list(webhook_ranges)}, request_id)


def platform_error_reply(status: int, kind: PlatformError, message: str, request_id: RequestId | None = None) -> Reply:
    """Write an error in the platform API's format: `{"error": {type, message, request_id}}`."""
    error: JsonObject = {"type": kind, "message": message}
    if request_id is not None:
        error["request_id"] = request_id
    return json_reply(status, {"error": error}, request_id)


def _page_reply(name: str, rows: list[Json], next_cursor: str | None, request_id: RequestId | None) -> Reply:
    body: JsonObject = {name: rows, "next_cursor": next_cursor, "has_more": next_cursor is not None}
    return json_reply(200, body, request_id)


# --- times ------------------------------------------------------------------------------------------------


def minted_at(request_id: str) -> float | None:
    """Read the creation time of a version-7 UUID; None for any other id. It is evidence, not proof."""
    try:
        value = UUID(request_id)
    except ValueError:
        return None
    return (value.int >> 80) / 1000.0 if value.version == 7 else None


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def instant_of(value: Json) -> float | None:
    """Parse an ISO 8601 date or time to Unix seconds; None for anything else. Without a zone, it is UTC."""
    if not isinstance(value, str):
        return None
    try:
        at = datetime.fromisoformat(value)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
