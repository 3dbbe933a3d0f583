"""The platform API's request listing, prices and charges without I/O, for both roles. Pure.

It is the only way to learn whether a submit without an answer was accepted: list the endpoint's requests in a
window of time and compare inputs. Shapes: fal's platform OpenAPI document, August 2026. Whether a request that
still waits is listed is not documented, so absence proves nothing.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import NamedTuple, TypeGuard, TypeVar
from urllib.parse import urlencode
from uuid import UUID

from batch.fal.protocol import Call, Malformed, Origins, Reply, is_plain_id, json_reply, read_object
from batch.model import AppId, Json, JsonObject, RequestId

__all__ = [
    "BILLING_LIMIT",
    "BILLING_SPAN",
    "ID_LIMIT",
    "PAGE_LIMIT",
    "Bill",
    "BillPage",
    "BillingQuery",
    "Charge",
    "Estimate",
    "EstimateKind",
    "Listed",
    "ListingQuery",
    "Outcome",
    "Page",
    "PlatformError",
    "SortBy",
    "billing_call",
    "billing_reply",
    "cursor_of",
    "estimate_reply",
    "listing_call",
    "listing_reply",
    "meta_reply",
    "minted_at",
    "platform_error_reply",
    "pricing_call",
    "pricing_reply",
    "read_billing",
    "read_billing_query",
    "read_estimate",
    "read_listing",
    "read_listing_query",
    "read_price",
    "read_pricing_query",
]

PAGE_LIMIT = 100
"""The most that one page of the listing may hold; half of it where a caller names no limit."""
BILLING_LIMIT = 10_000
"""The most that one page of billing events may hold."""
ID_LIMIT = 50
"""The most ids that one call may name."""
DAY = 86400.0
BILLING_SPAN = 90 * DAY
"""The longest window that one call for billing events may name."""
_LAST_PAGE = 10**9
"""Beyond it no cursor was ever given out; an offset has to fit an SQLite integer."""
_NANO = 1_000_000_000
_QUANTITY_LIMIT = 1e15


@dataclass(frozen=True, slots=True)
class Listed:
    """One request of the listing. Instants in Unix seconds."""

    request_id: RequestId
    app: AppId
    sent_at: float | None
    started_at: float | None
    ended_at: float | None
    status_code: int | None
    input: JsonObject | None
    """None where payloads were not asked for, or not kept."""
    output: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """One page of the listing."""

    items: tuple[Listed, ...]
    next_cursor: str | None


# --- client role ------------------------------------------------------------------------------------------


def listing_call(
    origins: Origins, app: AppId, *, start: float, end: float, cursor: str | None = None, limit: int = PAGE_LIMIT
) -> Call:
    """List the endpoint's requests between two instants (`end` exclusive), with their payloads."""
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


def read_listing(reply: Reply) -> Page:
    """One page.

    Raises:
        Malformed: it has not the documented shape: then nothing may be concluded from it.
    """
    answer = read_object(reply.body)
    items = answer.get("items")
    if not isinstance(items, list):
        raise Malformed("the request listing has no items")
    cursor, more = answer.get("next_cursor"), answer.get("has_more")
    if more is True and not isinstance(cursor, str):
        raise Malformed("the request listing says that there is more, and not where")
    return Page(tuple(_listed(item) for item in items), cursor if more is True and isinstance(cursor, str) else None)


def _listed(item: Json) -> Listed:
    if not isinstance(item, dict) or not is_plain_id(item.get("request_id")):
        raise Malformed("the request listing has an item without a usable request_id")
    code, sent, output = item.get("status_code"), item.get("json_input"), item.get("json_output")
    return Listed(
        RequestId(str(item["request_id"])),
        AppId(str(item.get("endpoint_id", ""))),
        _instant(item.get("sent_at")),
        _instant(item.get("started_at")),
        _instant(item.get("ended_at")),
        code if isinstance(code, int) else None,
        sent if isinstance(sent, dict) else None,
        output if isinstance(output, dict) else None,
    )


@dataclass(frozen=True, slots=True)
class Bill:
    """One billing event as its payer reads it."""

    request_id: RequestId
    at: float
    """Unix seconds."""
    units: float
    usd: float
    """What it cost, discounts taken off."""


class BillPage(NamedTuple):
    """One page of billing events."""

    bills: tuple[Bill, ...]
    next_cursor: str | None


def billing_call(origins: Origins, app: AppId, *, start: float, end: float, cursor: str | None = None) -> Call:
    """Ask for the endpoint's billing events between two instants, at most `BILLING_SPAN` apart; scope ADMIN."""
    query = {"endpoint_id": app, "start": _iso(start), "end": _iso(end), "limit": str(BILLING_LIMIT)}
    if cursor is not None:
        query["cursor"] = cursor
    return Call("GET", f"{origins.platform}/models/billing-events?{urlencode(query)}")


def read_billing(reply: Reply) -> BillPage:
    """One page.

    Raises:
        Malformed: it has not the documented shape: then nothing may be concluded from it.
    """
    answer = read_object(reply.body)
    events, cursor, more = answer.get("billing_events"), answer.get("next_cursor"), answer.get("has_more")
    if not isinstance(events, list):
        raise Malformed("the answer has no billing_events")
    if more is True and not isinstance(cursor, str):
        raise Malformed("the billing events say that there is more, and not where")
    following = cursor if more is True and isinstance(cursor, str) else None
    return BillPage(tuple(_bill(event) for event in events), following)


def _bill(event: Json) -> Bill:
    if not isinstance(event, dict) or not isinstance(event.get("request_id"), str):
        raise Malformed("a billing event has no request_id")
    at, units, usd = _instant(event.get("timestamp")), event.get("output_units"), event.get("cost_total")
    if usd is None:  # fal's page shows both; the whole number is exact
        nano = event.get("cost_estimate_nano_usd")
        usd = nano / _NANO if _is_amount(nano) else None
    if at is None or not _is_amount(units) or not _is_amount(usd):
        raise Malformed(f"the billing event of {str(event['request_id'])[:60]!r} lacks its time, units or cost")
    return Bill(RequestId(str(event["request_id"])), at, float(units), float(usd))


def _is_amount(value: Json) -> TypeGuard[int | float]:
    """A number from 0 on; orjson reads no NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def pricing_call(origins: Origins, app: AppId) -> Call:
    """Ask for the endpoint's present price."""
    return Call("GET", f"{origins.platform}/models/pricing?{urlencode({'endpoint_id': app})}")


def read_price(reply: Reply, app: AppId) -> tuple[float, str]:
    """The unit price in US dollars and its unit.

    Raises:
        Malformed: the app is not in the answer, or its price is no number of dollars.
    """
    prices = read_object(reply.body).get("prices")
    for entry in prices if isinstance(prices, list) else []:
        if isinstance(entry, dict) and entry.get("endpoint_id") == app:
            price, currency = entry.get("unit_price"), entry.get("currency", "USD")
            if isinstance(price, int | float) and not isinstance(price, bool) and price >= 0 and currency == "USD":
                return float(price), str(entry.get("unit", ""))
    raise Malformed(f"the price list has no price in USD for {app}")


# --- server role: what is asked for -----------------------------------------------------------------------


class Outcome(StrEnum):
    """How a request ended, in the listing's words."""

    SUCCESS = "success"
    ERROR = "error"
    """The service's fault: 5xx."""
    USER_ERROR = "user_error"
    """The caller's: 4xx."""


class SortBy(StrEnum):
    """Order of the listing, the greatest first: fal does not say, and its search gives the newest first."""

    ENDED_AT = "ended_at"
    DURATION = "duration"


@dataclass(frozen=True, slots=True)
class ListingQuery:
    """A question to the listing. Instants in Unix seconds."""

    apps: tuple[AppId, ...]
    start: float
    end: float
    """Exclusive."""
    outcome: Outcome | None = None
    request_id: RequestId | None = None
    payloads: bool = False
    sort_by: SortBy = SortBy.ENDED_AT
    limit: int = PAGE_LIMIT // 2
    page: int = 1

    @property
    def offset(self) -> int:
        """Requests before this page."""
        return (self.page - 1) * self.limit


@dataclass(frozen=True, slots=True)
class BillingQuery:
    """A question to the billing events. Instants in Unix seconds; `end` is exclusive."""

    start: float
    end: float
    apps: tuple[AppId, ...] = ()
    """Empty: all."""
    request_ids: tuple[RequestId, ...] = ()
    """Empty: all."""
    limit: int = BILLING_LIMIT
    page: int = 1

    @property
    def offset(self) -> int:
        """Charges before this page."""
        return (self.page - 1) * self.limit


class EstimateKind(StrEnum):
    """What an estimate counts."""

    UNIT_PRICE = "unit_price"
    """Billing units, each at its price."""
    HISTORICAL = "historical_api_price"
    """Calls, each at what calls have cost so far."""


class Estimate(NamedTuple):
    """What an estimate is asked for."""

    kind: EstimateKind
    quantities: dict[AppId, float]


def read_listing_query(query: Sequence[tuple[str, str]], now: float) -> ListingQuery:
    """Read the query string of the request listing; parameters that it does not have are passed over.

    Raises:
        Malformed: a required one is missing, or a value is not one of its kind.
    """
    given = _Given(query)
    request_id = given.one("request_id")
    if request_id is not None and not _is_uuid(request_id):
        raise Malformed(f"request_id is not a UUID: {request_id[:60]!r}")
    return ListingQuery(
        apps=tuple(AppId(app) for app in given.ids("endpoint_id", required=True)),
        start=given.instant("start", now - (BILLING_SPAN if request_id else DAY)),
        end=given.instant("end", now),
        outcome=given.word("status", Outcome, None),
        request_id=RequestId(request_id.lower()) if request_id else None,
        payloads="payloads" in given.every("expand"),
        sort_by=given.word("sort_by", SortBy, SortBy.ENDED_AT) or SortBy.ENDED_AT,
        limit=given.limit(PAGE_LIMIT, PAGE_LIMIT // 2),
        page=given.page(),
    )


def read_billing_query(query: Sequence[tuple[str, str]], now: float) -> BillingQuery:
    """Read the query string of the billing events.

    Raises:
        Malformed: a value is not one of its kind, or the window is longer than 90 days.
    """
    given = _Given(query)
    start, end = given.instant("start", now - DAY), given.instant("end", now)
    if end - start > BILLING_SPAN:
        raise Malformed(f"start and end lie {(end - start) / DAY:.0f} days apart; 90 are the most")
    return BillingQuery(
        start,
        end,
        apps=tuple(AppId(app) for app in given.ids("endpoint_id")),
        request_ids=tuple(RequestId(one) for one in given.ids("request_id")),
        limit=given.limit(BILLING_LIMIT, BILLING_LIMIT),
        page=given.page(),
    )


def read_pricing_query(query: Sequence[tuple[str, str]]) -> tuple[AppId, ...]:
    """The endpoints whose prices are asked for.

    Raises:
        Malformed: none, or too many.
    """
    return tuple(AppId(app) for app in _Given(query).ids("endpoint_id", required=True))


def read_estimate(body: bytes) -> Estimate:
    """Read the body of an estimate.

    Raises:
        Malformed: it has not the documented shape.
    """
    asked = read_object(body)
    try:
        kind = EstimateKind(str(asked.get("estimate_type")))
    except ValueError:
        raise Malformed(f"estimate_type is one of {', '.join(EstimateKind)}") from None
    endpoints = asked.get("endpoints")
    if not isinstance(endpoints, dict):
        raise Malformed("endpoints has to be an object: endpoint ids and their quantities")
    name = "unit_quantity" if kind is EstimateKind.UNIT_PRICE else "call_quantity"
    return Estimate(kind, {AppId(app): _quantity(app, entry, name) for app, entry in endpoints.items()})


def _quantity(app: str, entry: Json, name: str) -> float:
    value = entry.get(name) if isinstance(entry, dict) else None
    whole = name == "call_quantity"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Malformed(f"endpoints.{app[:100]}.{name} has to be a number")
    least = 1 if whole else 1e-6
    if not least <= value <= _QUANTITY_LIMIT or (whole and value != int(value)):
        words = f"{'a whole number' if whole else 'a number'} from {least:g} to {_QUANTITY_LIMIT:g}"
        raise Malformed(f"endpoints.{app[:100]}.{name} = {value} has to be {words}")
    return float(value)


_Word = TypeVar("_Word", bound=StrEnum)


class _Given:
    """The parameters of a query string, read with their bounds."""

    def __init__(self, query: Sequence[tuple[str, str]]) -> None:
        self._query = query

    def one(self, name: str) -> str | None:
        """The last value of a parameter that counts once; None where it is missing or empty."""
        found = [value.strip() for key, value in self._query if key == name]
        return (found[-1] or None) if found else None

    def every(self, name: str) -> list[str]:
        """All values of a parameter, repeated or with commas between them."""
        values = [part.strip() for key, value in self._query if key == name for part in value.split(",")]
        return [value for value in dict.fromkeys(values) if value]

    def ids(self, name: str, *, required: bool = False) -> list[str]:
        found = self.every(name)
        if (required and not found) or len(found) > ID_LIMIT:
            raise Malformed(f"{name} takes 1 to {ID_LIMIT} ids, {len(found)} were given")
        return found

    def instant(self, name: str, default: float) -> float:
        text = self.one(name)
        if text is None:
            return default
        at = _instant(text)
        if at is None:
            raise Malformed(f"{name} is no ISO 8601 date or time: {text[:60]!r}")
        return at

    def word(self, name: str, kind: type[_Word], default: _Word | None) -> _Word | None:
        text = self.one(name)
        try:
            return default if text is None else kind(text)
        except ValueError:
            raise Malformed(f"{name} is one of {', '.join(kind)}, not {text!r:.60}") from None

    def limit(self, most: int, default: int) -> int:
        text = self.one("limit")
        if text is None:
            return default
        if not (text.isascii() and text.isdecimal() and 1 <= int(text[:12]) <= most):
            raise Malformed(f"limit is a number from 1 to {most}, not {text[:60]!r}")
        return int(text)

    def page(self) -> int:
        text = self.one("cursor")
        return 1 if text is None else _page_of(text)


def cursor_of(page: int) -> str:
    """The cursor of a page, counted from 1: its number in base64, as fal's example `Mg==` shows it."""
    return base64.b64encode(str(page).encode()).decode()


def _page_of(cursor: str) -> int:
    try:
        text = base64.b64decode(cursor, validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        text = ""
    if not (text.isdecimal() and len(text) <= 10 and 1 <= int(text) <= _LAST_PAGE):
        raise Malformed(f"cursor is none that this listing gave out: {cursor[:60]!r}")
    return int(text)


def _is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text.lower()
    except ValueError:
        return False


# --- server role: what is answered ------------------------------------------------------------------------


class PlatformError(StrEnum):
    """The platform API's words for what went wrong."""

    AUTHORIZATION = "authorization_error"
    VALIDATION = "validation_error"
    NOT_FOUND = "not_found"
    RATE_LIMITED = "rate_limited"
    SERVER = "server_error"
    NOT_IMPLEMENTED = "not_implemented"


@dataclass(frozen=True, slots=True)
class Charge:
    """One billing event."""

    request_id: RequestId
    app: AppId
    at: float
    units: float
    unit_price_usd: float


def listing_reply(
    items: Sequence[Listed], next_cursor: str | None, *, payloads: bool, request_id: RequestId | None = None
) -> Reply:
    """One page of the listing.

    `started_at` is required there: a request that never started shows when it ended, one that waits when it was sent.
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
    """One page of billing events."""
    events: list[Json] = [_event(charge) for charge in charges]
    return _page_reply("billing_events", events, next_cursor, request_id)


def _event(charge: Charge) -> JsonObject:
    nano = round(charge.units * charge.unit_price_usd * _NANO)
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
    }


def pricing_reply(prices: dict[AppId, float], unit: str = "megapixels", request_id: RequestId | None = None) -> Reply:
    """Prices by endpoint."""
    rows: list[Json] = [
        {"endpoint_id": app, "unit_price": price, "unit": unit, "currency": "USD"} for app, price in prices.items()
    ]
    return _page_reply("prices", rows, None, request_id)


def estimate_reply(kind: EstimateKind, total_usd: float, request_id: RequestId | None = None) -> Reply:
    """A cost estimate."""
    return json_reply(200, {"estimate_type": kind, "total_cost": total_usd, "currency": "USD"}, request_id)


def meta_reply(webhook_ranges: Sequence[str], request_id: RequestId | None = None) -> Reply:
    """Where webhooks come from, in CIDR notation."""
    return json_reply(200, {"webhook_ip_ranges": list(webhook_ranges)}, request_id)


def platform_error_reply(status: int, kind: PlatformError, message: str, request_id: RequestId | None = None) -> Reply:
    """`{"error": {type, message, request_id}}`: the platform API's own shape of an error."""
    error: JsonObject = {"type": kind, "message": message}
    if request_id is not None:
        error["request_id"] = request_id
    return json_reply(status, {"error": error}, request_id)


def _page_reply(name: str, rows: list[Json], next_cursor: str | None, request_id: RequestId | None) -> Reply:
    body: JsonObject = {name: rows, "next_cursor": next_cursor, "has_more": next_cursor is not None}
    return json_reply(200, body, request_id)


# --- instants ---------------------------------------------------------------------------------------------


def minted_at(request_id: str) -> float | None:
    """When a version-7 UUID was made; None for any other id. A second witness, not a proof."""
    try:
        value = UUID(request_id)
    except ValueError:
        return None
    return (value.int >> 80) / 1000.0 if value.version == 7 else None


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _instant(value: Json) -> float | None:
    if not isinstance(value, str):
        return None
    try:
        at = datetime.fromisoformat(value)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
