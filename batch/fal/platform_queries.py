"""What is asked of the platform API, as a server reads it: query strings and bodies into values. Pure.

The answers, and the same calls in the client's role, are `platform`'s. Shapes: fal's platform OpenAPI document, August
2026. Parameters that it does not name are passed over.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, TypeVar
from uuid import UUID

from batch.fal.platform import BILLING_LIMIT, BILLING_SPAN, PAGE_LIMIT, instant_of
from batch.fal.protocol import TAG_PAIRS, Malformed, is_plain_id, read_object
from batch.types import AppId, Json, RequestId

__all__ = [
    "ID_LIMIT",
    "BillingQuery",
    "ChargeSource",
    "EstimateKind",
    "EstimateQuery",
    "ListingQuery",
    "RequestOutcome",
    "SortBy",
    "cursor_of",
    "read_billing_query",
    "read_estimate",
    "read_listing_query",
    "read_pricing_query",
]

ID_LIMIT = 50
"""The most ids that one call may name."""
DAY = 86400.0
_LAST_PAGE = 10**9
"""Beyond it no cursor was ever given out; an offset has to fit an SQLite integer."""
_QUANTITY_LIMIT = 1e15


class RequestOutcome(StrEnum):
    """How a request ended, in the listing's words."""

    SUCCESS = "success"
    ERROR = "error"
    """The service's fault: 5xx."""
    USER_ERROR = "user_error"
    """The caller's: 4xx."""


class ChargeSource(StrEnum):
    """Which feed of billing events is read."""

    BILLED = "billed"
    TAGGED = "tagged-billed"
    """Each event with the tags of its request."""


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
    outcome: RequestOutcome | None = None
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
    tagged: bool = False
    """Whether each event shows its request's tags."""
    tags: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Only requests that have, for each of these keys, one of its values; `(untagged)`: that lack the key."""
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


class EstimateQuery(NamedTuple):
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
        outcome=given.word("status", RequestOutcome, None),
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
    request_ids = given.ids("request_id")
    if strange := [one for one in request_ids if not is_plain_id(one)]:
        raise Malformed(f"request_id is none: {strange[0][:60]!r}")
    if end - start > BILLING_SPAN:
        raise Malformed(f"start and end lie {(end - start) / DAY:.0f} days apart; 90 are the most")
    tagged = given.word("source", ChargeSource, ChargeSource.BILLED) is ChargeSource.TAGGED
    return BillingQuery(
        start,
        end,
        apps=tuple(AppId(app) for app in given.ids("endpoint_id")),
        request_ids=tuple(RequestId(one) for one in request_ids),
        tagged=tagged,
        tags=_tags(given.every("tag"), tagged=tagged),
        limit=given.limit(BILLING_LIMIT, BILLING_LIMIT),
        page=given.page(),
    )


def _tags(filters: Sequence[str], *, tagged: bool) -> dict[str, list[str]]:
    """`key=value` filters: the values that are wanted of each key."""
    if filters and not tagged:
        raise Malformed(f"tag needs source={ChargeSource.TAGGED}")
    if len(filters) > TAG_PAIRS:
        raise Malformed(f"tag takes 1 to {TAG_PAIRS} filters, {len(filters)} were given")
    wanted: dict[str, list[str]] = {}
    for one in filters:
        key, found, value = one.partition("=")
        if not key or not found:
            raise Malformed(f"invalid tag filter {one[:60]!r}: use key=value")
        wanted.setdefault(key.strip().lower(), []).append(value.strip())
    return wanted


def read_pricing_query(query: Sequence[tuple[str, str]]) -> tuple[AppId, ...]:
    """The endpoints whose prices are asked for.

    Raises:
        Malformed: none, or too many.
    """
    return tuple(AppId(app) for app in _Given(query).ids("endpoint_id", required=True))


def read_estimate(body: bytes) -> EstimateQuery:
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
    return EstimateQuery(kind, {AppId(app): _quantity(app, entry, name) for app, entry in endpoints.items()})


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
        at = instant_of(text)
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
