"""Serve the queue over HTTP: parse requests, call the service, build responses.

Defines routes, limits and error responses; `batch.fal.protocol` and `responses` define the wire format. Every error
response is JSON with an `x-fal-request-id`: without it, fal's Python client attributes the error to a proxy.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

import orjson
from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.typedefs import Middleware

from batch.errors import StorageError
from batch.fal import protocol
from batch.fal.endpoint import APP_ID
from batch.fal.platform import PlatformError, platform_error_reply
from batch.fal.protocol import Address, Malformed, Operation
from batch.server.egress.ssrf import AddressRefused, AddressRule
from batch.server.http import fal_proxy as proxy
from batch.server.http import files as uploads
from batch.server.http import metrics, openapi
from batch.server.http.auth import Access, Authenticator, Denied, access_of, owner_of, set_owner
from batch.server.http.bodies import HealthBody
from batch.server.http.cors import CorsPolicy
from batch.server.http.page import routes as page
from batch.server.http.routing import Handler, Route, base_of, read_routes, response
from batch.server.limits import DEFAULT_LIMITS, ServerLimits
from batch.server.queue import responses as answers
from batch.server.queue.records import CompletedRequest, Priority, RetentionOptions
from batch.server.queue.service import QueueFull, QueueService, RequestState, SubmitOptions
from batch.server.queue.webhooks import webhook_of
from batch.system.descriptors import ServerShare, lacks_descriptor
from batch.types import AppId, RequestId
from batch.version import tool_version

__all__ = ["application"]

_log = logging.getLogger(__name__)

_HELD_SHARE = 0.75
"""Share of connections that may wait for the end of a request (streams, direct calls)."""
_RETRY_SECONDS = "1"
"""`Retry-After` of a call that found no free connection."""
_TRUE = frozenset({"1", "true", "yes"})
_READS = frozenset({"GET", "HEAD"})


def application(
    service: QueueService,
    authenticator: Authenticator,
    permitted: AddressRule,
    app_id: AppId = APP_ID,
    more: Iterable[Route] = (),
    *,
    idempotency: bool = True,
    middleware: Middleware | None = None,
    share: ServerShare | None = None,
    limits: ServerLimits = DEFAULT_LIMITS,
) -> web.Application:
    """Build the server's application. The queue handles every path without a route.

    Args:
        service: the queue.
        authenticator: authenticates calls.
        permitted: the addresses that webhooks may use.
        app_id: the served endpoint.
        more: further routes.
        idempotency: whether the server honours a repeated `Idempotency-Key`.
        middleware: wraps every handler; fault injection is one.
        share: limits of open connections and files; None: no limits.
        limits: limits of sizes and times.
    """
    api = _QueueApi(
        service,
        app_id,
        authenticator,
        permitted,
        idempotency=idempotency,
        held=None if share is None else max(1, int(share.connections * _HELD_SHARE)),
        limits=limits,
    )
    app = web.Application(client_max_size=limits.body_bytes)
    known = (
        *read_routes("/health", api.health),
        *read_routes("/openapi.json", api.schema),
        ("POST", "/run/{app:.+}", api.run),
        *proxy.routes(),
        *uploads.routes(service, authenticator, None if share is None else share.downloads, limits),
        *metrics.routes(service),
        *page.routes(service, app_id),
        *more,
        ("*", r"/{path:[\s\S]*}", api.queue),
    )
    for method, path, handler in known:
        guarded = api.guarded(handler, access_of(method, path))
        app.router.add_route(method, path, guarded, expect_handler=api.expect)
    if middleware is not None:
        app.middlewares.append(middleware)
    return app


class _QueueApi:
    """The handlers and their dependencies."""

    def __init__(
        self,
        service: QueueService,
        app_id: AppId,
        authenticator: Authenticator,
        permitted: AddressRule,
        *,
        idempotency: bool,
        held: int | None,
        limits: ServerLimits,
    ) -> None:
        self._service = service
        self._authenticator = authenticator
        self._permitted = permitted
        self._app_id = app_id
        self._idempotency = idempotency
        self._limits = limits
        self._held, self._held_limit = 0, held
        """Connections that wait for the end of a request."""
        self._cors = CorsPolicy(keyed=authenticator.keyed)
        self._owner, self._alias, _ = protocol.split_app(app_id)
        self._schema = b""

    def guarded(self, handler: Handler, access: Access = Access.KEY) -> Handler:
        """Wrap a handler: set the owner of the call (see `owner_of`), and convert exceptions to responses."""

        async def handle(request: web.Request) -> web.StreamResponse:
            answer: web.StreamResponse
            try:
                if request.method == "OPTIONS":  # a browser's preflight, which has no key
                    return self._with_cors(request, web.Response(status=204))
                self._cors.check(request.host)
                set_owner(request, self._authenticator.owner(_authorization(request), access))
                answer = await handler(request)
            except Denied as denied:
                answer = self._deny(request, denied)
            except StorageError as error:
                if lacks_descriptor(error):
                    answer = self._no_descriptor(error)
                else:
                    self._service.disk_refused(error)
                    answer = self._refuse(503, str(error), "internal_error")
            except web.HTTPException as error:
                answer = self._refuse(error.status, error.text or error.reason)
            except (web.RequestPayloadError, BadHttpMessage) as error:
                answer = self._refuse(400, " ".join(f"The body cannot be read: {error}".split())[:300])
            except ConnectionError:
                answer = self._refuse(499, "The client closed the connection", "client_disconnected")
            except Exception as error:  # one call's failure must not stop the server
                if lacks_descriptor(error):
                    answer = self._no_descriptor(error)
                else:
                    _log.exception("%s %s: unexpected error", request.method, request.path)
                    answer = self._refuse(500, "Internal Server Error", "internal_error")
            self._with_cors(request, answer)
            self._service.tally.answered(request.method, request.path, answer.status)
            return answer

        return handle

    async def expect(self, request: web.Request) -> web.Response | None:
        """Answer an `Expect` header before the handlers run; aiohttp's default response echoes the header unescaped."""
        expected = request.headers.get("expect", "")
        if request.version < HttpVersion11:
            return None
        if expected.lower() != "100-continue":
            return self._refuse(417, f"Expect: {expected[:100]!r} is not supported; use 100-continue")
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # of the response itself
        return None

    async def health(self, _: web.Request) -> web.Response:
        """Return the engine and the load of the server."""
        info, counts = self._service.engine, self._service.statistics()
        body = HealthBody(
            engine=info.name,
            model=info.model,
            revision=info.revision,
            safety_checker=info.safety_checker or "not checked",
            safety_checked=info.safety_checker is not None,
            slots=info.slots,
            honours_idempotency_key=self._idempotency,
            honours_start_timeout=True,
            queue_depth=counts.waiting,
            running=counts.running,
            accepted=counts.accepted,
            submit_posts=self._service.submit_posts,
            disk="ok" if self._service.disk_refuses is None else "refuses",
        )
        return web.Response(body=body.model_dump_json().encode(), content_type=protocol.CONTENT_JSON)

    async def schema(self, _: web.Request) -> web.Response:
        """Return the OpenAPI document, built on the first call."""
        if not self._schema:
            self._schema = orjson.dumps(openapi.document(self._app_id, tool_version()))
        headers = {"content-type": protocol.CONTENT_JSON, protocol.REQUEST_ID: self._service.new_id()}
        return web.Response(body=self._schema, headers=headers)

    async def queue(self, request: web.Request) -> web.StreamResponse:
        """Handle calls to paths below an app id."""
        address = protocol.parse_path(request.path)
        if address is None:
            return self._refuse(404, f"Path {request.path} not found", **{protocol.BILLABLE_UNITS: "0"})
        allowed = {Operation.SUBMIT: {"POST"}, Operation.CANCEL: {"PUT", "POST"}}.get(address.operation, _READS)
        if request.method not in allowed:
            return self._refuse(405, f"{request.method} is not allowed; use {' or '.join(sorted(allowed))}")
        if address.operation is Operation.SUBMIT:
            direct = proxy.is_direct(request.host)
            return await (self._run if direct else self._submit)(request, address.app)
        return await self._read(request, address)

    async def run(self, request: web.Request) -> web.StreamResponse:
        """Handle a direct call below `/run`."""
        return await self._run(request, AppId(request.match_info["app"].strip("/")))

    async def _run(self, request: web.Request, app: AppId) -> web.StreamResponse:
        """Return the output on the same connection. A lost connection does not cancel the request."""
        return await self._hold(partial(self._run_held, request, app))

    async def _run_held(self, request: web.Request, app: AppId) -> web.StreamResponse:
        accepted = await self._accept(request, app)
        if isinstance(accepted, web.Response):
            return accepted
        known = await self._service.find(accepted, expired=True)
        while known is not None and not isinstance(known.state, CompletedRequest):
            if self._service.stopping:
                return self._refuse(503, "The server is shutting down; the request stays queued", "runner_disconnected")
            await self._service.changed(accepted, self._limits.keep_alive_seconds)
            known = await self._service.find(accepted, expired=True)
        if known is None:  # ended and expired between two reads
            return response(answers.not_found_reply(accepted))
        return await self._result(request, accepted, known)

    # --- submit -------------------------------------------------------------------------------------------

    async def _submit(self, request: web.Request, app: AppId) -> web.Response:
        accepted = await self._accept(request, app)
        if isinstance(accepted, web.Response):
            return accepted
        return response(protocol.accepted_reply(base_of(request), app, accepted, self._service.position(accepted)))

    async def _accept(self, request: web.Request, app: AppId) -> RequestId | web.Response:
        """Accept a request; return its id, or an error response."""
        self._service.submit_posts += 1
        if app != self._app_id:
            return self._unknown_app(app)
        try:
            options = _submit_options(request, self._permitted)
            if not self._idempotency:
                options = options._replace(idempotency_key=None)
            body = await _body(request, self._limits.body_seconds)
            admission = await self._service.submit(app, body, options, owner_of(request))
        except web.HTTPRequestEntityTooLarge:
            limit = self._limits.body_bytes // 2**20
            return self._refuse(413, f"The body is larger than {limit} MiB; upload the image and send its URL")
        except Malformed as error:
            return self._invalid("json_invalid", str(error), "body")
        except AddressRefused as refusal:
            message = f"Invalid webhook URL: {refusal} (--allow-private permits loopback and private addresses)"
            return self._invalid("url_error", message, "query", "fal_webhook")
        except QueueFull as full:
            return self._refuse(429, f"Not accepted: {full}")
        if not admission.same_input:
            message = "This Idempotency-Key was used with a different input; use a new key for a new request"
            return self._invalid("idempotency_key_reused", message, "header", "idempotency-key")
        return admission.request_id

    def _unknown_app(self, app: AppId) -> web.Response:
        try:
            owner, alias, path = protocol.split_app(app)
        except Malformed:
            owner, alias, path = app, "", ""
        if (owner, alias) == (self._owner, self._alias):
            return self._refuse(404, f"Path /{path} not found", **{protocol.BILLABLE_UNITS: "0"})
        return self._refuse(404, f'Application "{app}" not found; this server has {self._app_id}')

    # --- reads --------------------------------------------------------------------------------------------

    async def _read(self, request: web.Request, address: Address) -> web.StreamResponse:
        request_id = address.request_id
        assert request_id is not None, "only a submit has no request id"
        known = await self._service.find(request_id) if len(request_id) == 36 else None
        # A request of another owner is reported as unknown, so that its existence is not revealed.
        owner = owner_of(request)
        if known is None or (owner and known.owner != owner):
            return response(answers.not_found_reply(self._service.new_id()))
        if protocol.split_app(address.app)[:2] != (self._owner, self._alias):
            return response(answers.not_found_reply(self._service.new_id()))
        match address.operation:
            case Operation.STATUS:
                return self._status(request, request_id, known)
            case Operation.STREAM:
                return await self._hold(partial(self._stream, request, request_id, known))
            case Operation.CANCEL:
                outcome = await self._service.cancel(request_id)
                return response(protocol.cancel_reply(outcome, request_id))
            case _:
                return await self._result(request, request_id, known)

    def _status(self, request: web.Request, request_id: RequestId, known: RequestState) -> web.Response:
        logs = _wants_logs(request)
        return response(answers.status_reply(base_of(request), known.app, request_id, known.state, logs=logs))

    async def _result(self, request: web.Request, request_id: RequestId, known: RequestState) -> web.Response:
        if not isinstance(known.state, CompletedRequest):
            return response(answers.still_running_reply(request_id))
        inlined = await self._service.inlined(known.state) if known.state.inline else None
        return response(answers.result_reply(base_of(request), known.state, inlined))

    async def _stream(
        self, request: web.Request, request_id: RequestId, known: RequestState | None
    ) -> web.StreamResponse:
        """Send server-sent events: one per change, a comment in each idle interval; ends after COMPLETED."""
        stream = web.StreamResponse(
            headers={
                "content-type": "text/event-stream",
                "cache-control": "no-cache",
                protocol.REQUEST_ID: request_id,
            }
        )
        await self._with_cors(request, stream).prepare(request)
        logs, base, last = _wants_logs(request), base_of(request), b""
        while known is not None:
            body = answers.status_reply(base, known.app, request_id, known.state, logs=logs).body
            await stream.write(b"data: " + body + b"\n\n" if body != last else b": still here\n\n")
            if isinstance(known.state, CompletedRequest) or self._service.stopping:
                break
            last = body
            await self._service.changed(request_id, self._limits.keep_alive_seconds)
            known = await self._service.find(request_id, expired=True)
        await stream.write_eof()
        return stream

    async def _hold(self, work: Callable[[], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        """Run a call that waits for the end of a request, or reject it if too many do."""
        if self._held_limit is not None and self._held >= self._held_limit:
            return self._refuse_for_now(
                f"{self._held} connections already wait for a result, the limit; submit the request and poll its status"
            )
        self._held += 1
        try:
            return await work()
        finally:
            self._held -= 1

    def _no_descriptor(self, error: Exception) -> web.Response:
        self._service.lacked_descriptor(error)
        return self._refuse_for_now("The server has too many files open; try again")

    def _refuse_for_now(self, message: str) -> web.Response:
        """Reject a valid call with 429 before anything is accepted."""
        return self._refuse(429, message, **{"retry-after": _RETRY_SECONDS})

    def _with_cors(self, request: web.Request, answer: web.StreamResponse) -> web.StreamResponse:
        """Add the CORS headers if the request has an origin."""
        if (origin := request.headers.get("origin")) is not None:
            self._cors.allow(origin, answer)
        return answer

    def _deny(self, request: web.Request, denied: Denied) -> web.Response:
        if request.path.startswith("/v1/"):
            reply = platform_error_reply(
                denied.status, PlatformError.AUTHORIZATION, denied.detail, self._service.new_id()
            )
            return response(reply)
        return self._refuse(denied.status, denied.detail, **{"www-authenticate": "Key"})

    def _invalid(self, kind: str, message: str, *place: str) -> web.Response:
        errors = [answers.model_error(kind, message, place, {}, None)]
        return response(protocol.model_error_reply(422, errors, self._service.new_id()))

    def _refuse(self, status: int, detail: str, error_type: str | None = None, **headers: str) -> web.Response:
        new_id = self._service.new_id()
        return response(protocol.request_error_reply(status, error_type, detail, new_id, **headers))


def _authorization(request: web.Request) -> str | None:
    """Return the Authorization header; repeated headers are joined by commas, as in HTTP."""
    given = request.headers.getall("authorization", ())
    return ", ".join(given) if given else None


async def _body(request: web.Request, seconds: float) -> bytes:
    if request.content.is_eof():
        return await request.read()
    try:
        async with asyncio.timeout(seconds):
            return await request.read()
    except TimeoutError as error:
        raise web.HTTPRequestTimeout(text=f"The body did not arrive within {seconds:.0f} s") from error


def _wants_logs(request: web.Request) -> bool:
    return bool(request.query_string) and request.query.get("logs", "").lower() in _TRUE


def _submit_options(request: web.Request, permitted: AddressRule) -> SubmitOptions:
    headers, options = request.headers, protocol.options_in(request.headers)
    limit = request.query.get("fal_max_queue_length", "") if request.query_string else ""
    webhook = request.query.get("fal_webhook", "") if request.query_string else ""
    return SubmitOptions(
        idempotency_key=_text(headers.get(protocol.IDEMPOTENCY_KEY)),
        priority=Priority.LOW if options.low_priority else Priority.NORMAL,
        start_timeout=options.start_timeout,
        queue_limit=int(limit) if limit.isdecimal() and len(limit) < 20 else None,
        webhook=webhook_of(webhook, base_of(request), permitted) if webhook else None,
        retention=RetentionOptions(headers.get("x-fal-store-io") == "0", options.file_seconds),
        tags=options.tags,
    )


def _text(header: str | None) -> str | None:
    """Return a header as valid Unicode.

    Bytes that are not UTF-8 arrive as lone surrogates and are escaped, so that different values stay different.
    """
    return header if header is None or header.isascii() else header.encode("utf-8", "backslashreplace").decode()
