"""Serve a subset of the platform API below `/v1`: requests, billing events, prices, estimates and `meta`.

Errors have the platform API's format, `{"error": {type, message, request_id}}`. The listing:

- `json_input` is the submitted body. Embedded images are data URIs, up to `listed_images_bytes` per page;
  further images are URLs. Bodies above 1 MiB are omitted.
- `json_output` is the result with URLs, or the body of an error; `sync_mode` results are not stored and are omitted.
- Unfinished requests are not listed, and the listing does not lag, unless a faults file changes that.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import orjson
from aiohttp import web

from batch.fal import platform
from batch.fal import platform_queries as queries
from batch.fal.platform import Charge, Listed, PlatformError
from batch.fal.platform_queries import EstimateKind
from batch.fal.protocol import Malformed, Reply
from batch.server.files.storage import content_type_of
from batch.server.http.auth import owner_of
from batch.server.http.routing import Handler, Route, base_of, response
from batch.server.limits import DEFAULT_LIMITS, ServerLimits
from batch.server.queue import responses as answers
from batch.server.queue.request_log import LoggedCharge, LoggedRequest, RequestLog
from batch.server.queue.service import QueueService
from batch.types import AppId, JsonObject

__all__ = ["routes"]

_DEFAULT_UNITS = 1.0
"""Megapixels per call, used before the first call."""
_IMAGE = b'"image_url":"/files/'


def routes(
    service: QueueService,
    app_id: AppId,
    request_log: RequestLog,
    price_usd: float = 0.0,
    clock: Callable[[], float] = time.time,
    *,
    limits: ServerLimits = DEFAULT_LIMITS,
) -> list[Route]:
    """Build the route table.

    Args:
        service: the queue.
        app_id: the served endpoint.
        request_log: the log of requests.
        price_usd: price per megapixel.
        clock: Unix seconds.
        limits: limits of a page.
    """
    api = _Platform(service, app_id, request_log, price_usd, clock, limits.listed_images_bytes)
    return [
        ("GET", "/v1/models/requests/by-endpoint", api.guarded(api.requests)),
        ("GET", "/v1/models/billing-events", api.guarded(api.charges)),
        ("GET", "/v1/models/pricing", api.guarded(api.prices)),
        ("POST", "/v1/models/pricing/estimate", api.guarded(api.estimate)),
        ("GET", "/v1/meta", api.guarded(api.meta)),
        ("*", r"/v1/{path:[\s\S]*}", api.guarded(api.nothing)),
    ]


class _Platform:
    """The handlers and their dependencies."""

    def __init__(
        self,
        service: QueueService,
        app_id: AppId,
        request_log: RequestLog,
        price_usd: float,
        clock: Callable[[], float],
        images_bytes: int,
    ) -> None:
        self._service = service
        self._app_id = app_id
        self._request_log = request_log
        self._price_usd = price_usd
        self._clock = clock
        self._images_bytes = images_bytes

    def guarded(self, handler: Callable[[web.Request], Awaitable[Reply]]) -> Handler:
        """Adapt a handler to aiohttp, with errors in the platform API's format."""

        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                reply = await handler(request)
            except Malformed as error:
                reply = self._refuse(400, PlatformError.VALIDATION, str(error))
            except web.HTTPException as error:
                reply = self._refuse(error.status, PlatformError.VALIDATION, error.text or error.reason)
            return response(reply)

        return handle

    async def requests(self, request: web.Request) -> Reply:
        """Return one page of the endpoint's requests."""
        query = queries.read_listing_query(list(request.query.items()), self._clock())
        found: list[LoggedRequest] = []
        more = False
        if self._app_id in query.apps:
            found, more = await self._request_log.page(query, _owner(request))
        base = base_of(request)
        images = await self._images(found)
        make = partial(_listed, base, found, images)
        # Decoding a page of inputs with images takes long enough to block the event loop.
        items = await asyncio.to_thread(make) if query.payloads else make()
        cursor = queries.cursor_of(query.page + 1) if more else None
        answer = partial(
            platform.listing_reply, items, cursor, payloads=query.payloads, request_id=self._service.new_id()
        )
        return await asyncio.to_thread(answer) if query.payloads else answer()

    async def charges(self, request: web.Request) -> Reply:
        """Return one page of charges: the measured units at the configured price."""
        query = queries.read_billing_query(list(request.query.items()), self._clock())
        found: list[LoggedCharge] = []
        more = False
        if not query.apps or self._app_id in query.apps:
            found, more = await self._request_log.charges(query, _owner(request))
        charges = [Charge(one.request_id, one.app, one.at, one.units, self._price_usd, one.tags) for one in found]
        cursor = queries.cursor_of(query.page + 1) if more else None
        return platform.billing_reply(charges, cursor, self._service.new_id())

    async def prices(self, request: web.Request) -> Reply:
        """Return the price of the endpoint."""
        apps = queries.read_pricing_query(list(request.query.items()))
        if missing := self._missing(apps):
            return missing
        return platform.pricing_reply({self._app_id: self._price_usd}, request_id=self._service.new_id())

    async def estimate(self, request: web.Request) -> Reply:
        """Estimate the cost of units, or of calls at their average size."""
        kind, quantities = queries.read_estimate(await request.read())
        if missing := self._missing(tuple(quantities)):
            return missing
        units = 1.0
        if kind is EstimateKind.HISTORICAL:
            units = await self._request_log.units_a_call(_owner(request)) or _DEFAULT_UNITS
        total = sum(quantities.values()) * units * self._price_usd
        return platform.estimate_reply(kind, round(total, 9), self._service.new_id())

    async def meta(self, request: web.Request) -> Reply:
        """Return the source of this server's webhooks: the local address of the connection."""
        name = request.transport.get_extra_info("sockname") if request.transport is not None else None
        ranges = [str(ipaddress.ip_network(name[0].partition("%")[0]))] if isinstance(name, tuple) else []
        return platform.meta_reply(ranges, self._service.new_id())

    async def nothing(self, request: web.Request) -> Reply:
        """Return 404 for every other path of the platform API."""
        words = f"{request.method} {request.path} not found; see /openapi.json"
        return self._refuse(404, PlatformError.NOT_FOUND, words)

    def _missing(self, apps: Sequence[AppId]) -> Reply | None:
        others = [app for app in apps if app != self._app_id]
        words = f"Endpoint {', '.join(others)!r:.200} not found; this server has {self._app_id}"
        return self._refuse(404, PlatformError.NOT_FOUND, words) if others else None

    def _refuse(self, status: int, kind: PlatformError, message: str) -> Reply:
        return platform.platform_error_reply(status, kind, message, self._service.new_id())

    async def _images(self, found: Sequence[LoggedRequest]) -> dict[str, bytes]:
        """Read the embedded images of the inputs, by stored path, up to the limit of a page."""
        images: dict[str, bytes] = {}
        left = self._images_bytes
        for past in found:
            if past.body is None or _IMAGE not in past.body:
                continue
            path = orjson.loads(past.body).get("image_url")
            data = await self._service.storage.read(path) if isinstance(path, str) and path not in images else None
            if data is not None and len(data) <= left:
                images[path] = data
                left -= len(data)
        return images


def _listed(base: str, found: Sequence[LoggedRequest], images: dict[str, bytes]) -> list[Listed]:
    return [
        Listed(
            past.request_id,
            past.app,
            past.accepted_at,
            past.started_at,
            past.ended_at,
            past.status,
            None if past.body is None else _input(base, past.body, images),
            None if past.payload is None else orjson.loads(answers.with_urls(base, past.payload)),
        )
        for past in found
    ]


def _input(base: str, body: bytes, images: dict[str, bytes]) -> JsonObject:
    """Restore the input as submitted."""
    given: JsonObject = orjson.loads(body)
    path = given.get("image_url")
    if _IMAGE in body and isinstance(path, str):
        data = images.get(path)
        encoded = None if data is None else base64.b64encode(data).decode()
        given["image_url"] = base + path if data is None else f"data:{content_type_of(path)};base64,{encoded}"
    return given


def _owner(request: web.Request) -> str | None:
    """Return the owner whose requests are visible; None on a server without keys, where all are visible."""
    return owner_of(request) or None
