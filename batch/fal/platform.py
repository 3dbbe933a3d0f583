"""The platform API's request listing and prices without I/O, for both roles. Pure.

It is the only way to learn whether a submit without an answer was accepted: list the endpoint's requests in a
window of time and compare inputs. Shapes: fal's platform OpenAPI document, August 2026. Whether a request that
still waits is listed is not documented, so absence proves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import urlencode
from uuid import UUID

from batch.fal.protocol import Call, Malformed, Origins, Reply, json_reply, read_object
from batch.model import AppId, Json, JsonObject, RequestId

__all__ = [
    "Listed",
    "Page",
    "estimate_reply",
    "listing_call",
    "listing_reply",
    "minted_at",
    "platform_error_reply",
    "pricing_call",
    "pricing_reply",
    "read_listing",
    "read_price",
]

PAGE_LIMIT = 100
"""The most that one page may hold."""


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


def listing_call(origins: Origins, app: AppId, *, start: float, end: float, cursor: str | None = None) -> Call:
    """List the endpoint's requests between two instants (`end` exclusive), with their payloads."""
    query = {
        "endpoint_id": app,
        "start": _iso(start),
        "end": _iso(end),
        "expand": "payloads",
        "limit": str(PAGE_LIMIT),
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
    if not isinstance(item, dict) or not isinstance(item.get("request_id"), str):
        raise Malformed("the request listing has an item without request_id")
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


def listing_reply(items: Sequence[Listed], next_cursor: str | None, *, payloads: bool) -> Reply:
    """The same page in the server's role."""
    listed: list[Json] = []
    for item in items:
        entry: JsonObject = {"request_id": item.request_id, "endpoint_id": item.app}
        for name, at in (("sent_at", item.sent_at), ("started_at", item.started_at), ("ended_at", item.ended_at)):
            if at is not None or name != "ended_at":
                entry[name] = None if at is None else _iso(at)
        if item.status_code is not None:
            entry["status_code"] = item.status_code
        if item.ended_at is not None and item.started_at is not None:
            entry["duration"] = round(item.ended_at - item.started_at, 6)
        if payloads:
            entry["json_input"] = item.input
            entry["json_output"] = item.output
        listed.append(entry)
    return json_reply(200, {"items": listed, "next_cursor": next_cursor, "has_more": next_cursor is not None})


def minted_at(request_id: str) -> float | None:
    """When a version-7 UUID was made; None for any other id. A second witness, not a proof."""
    try:
        value = UUID(request_id)
    except ValueError:
        return None
    return (value.int >> 80) / 1000.0 if value.version == 7 else None


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


def pricing_reply(prices: dict[AppId, float], unit: str = "megapixels") -> Reply:
    """Prices by endpoint, in the server's role."""
    rows: list[Json] = [
        {"endpoint_id": app, "unit_price": price, "unit": unit, "currency": "USD"} for app, price in prices.items()
    ]
    return json_reply(200, {"prices": rows, "next_cursor": None, "has_more": False})


def estimate_reply(kind: str, total_usd: float) -> Reply:
    """A cost estimate, in the server's role."""
    return json_reply(200, {"estimate_type": kind, "total_cost": total_usd, "currency": "USD"})


def platform_error_reply(status: int, kind: str, message: str) -> Reply:
    """`{"error": {type, message}}`: the platform API's own shape of an error."""
    return json_reply(status, {"error": {"type": kind, "message": message}})


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _instant(value: Json) -> float | None:
    if not isinstance(value, str):
        return None
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        return None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
