"""Inject the faults that `plan` selects: an aiohttp middleware for HTTP calls, a wrapper around the engine.

A server without a faults file has neither. State of requests and files (expiring or odd results, refused files) is lost
when the process ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from random import Random

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from batch.fal import protocol
from batch.fal.platform import PlatformError, platform_error_reply
from batch.fal.protocol import Operation
from batch.server.engines.base import (
    Cancelled,
    Engine,
    EngineCancelled,
    EngineFailure,
    EngineInfo,
    EngineJob,
    EngineResult,
    OnStep,
    WorkerCrashed,
)
from batch.server.faults.plan import ErrorBodyKind, FaultAction, FaultPlan, FaultPoint, FaultRule, FaultSequence
from batch.server.files.storage import content_type_of
from batch.server.http import fal_proxy as proxy
from batch.server.http.routing import response
from batch.server.queue import responses as answers
from batch.server.queue.records import CompletedRequest, ListingRules
from batch.server.queue.service import QueueService
from batch.types import AppId, Json, JsonObject, RequestId

__all__ = ["FaultInjection", "fault_point_of"]

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1
"""Interval for checking whether a delayed request was cancelled."""
_PIECES = 20
"""Number of pieces of a slow body."""
_POINTS = {
    Operation.SUBMIT: FaultPoint.SUBMIT,
    Operation.STATUS: FaultPoint.STATUS,
    Operation.RESULT: FaultPoint.RESULT,
    Operation.CANCEL: FaultPoint.CANCEL,
}
_METHODS = {FaultPoint.SUBMIT: {"POST"}, FaultPoint.CANCEL: {"PUT", "POST"}}
_LISTING_PATH = "/v1/models/requests/by-endpoint"
_DETAILS = {
    401: "No user found for Key ID and Secret",
    403: "User is locked. Reason: Exhausted balance. Top up your balance at fal.ai/dashboard/billing.",
    429: "Too many requests; not accepted",
}
_REQUEST_ERRORS = {
    500: "internal_error",
    502: "runner_incomplete_response",
    503: "runner_scheduling_failure",
    504: "request_timeout",
}
_MODEL_ERRORS = {503: "downstream_service_unavailable", 504: "generation_timeout"}
_PLATFORM_ERRORS = {
    401: PlatformError.AUTHORIZATION,
    403: PlatformError.AUTHORIZATION,
    404: PlatformError.NOT_FOUND,
    429: PlatformError.RATE_LIMITED,
}


def fault_point_of(method: str, path: str, app_id: AppId) -> FaultPoint | None:
    """Return the point of an HTTP call; None if no fault applies to it."""
    if path.startswith(("/files/", "/storage/")):
        return FaultPoint.FILE if method == "GET" else FaultPoint.UPLOAD if method in {"POST", "PUT"} else None
    if path == _LISTING_PATH:
        return FaultPoint.LISTING
    address = protocol.parse_path(path)
    point = None if address is None else _POINTS.get(address.operation)
    if address is None or point is None or method not in _METHODS.get(point, {"GET"}):
        return None
    return point if point is not FaultPoint.SUBMIT or address.app == app_id else None


class FaultInjection:
    """The faults of one server.

    Args:
        plan: a faults file.
        clock: Unix seconds.
    """

    def __init__(self, plan: FaultPlan, clock: Callable[[], float] = time.time) -> None:
        self.listing: ListingRules = plan.listing
        self.idempotency: bool = plan.idempotency
        self._faults = FaultSequence(plan)
        self._clock = clock
        self._expiring: dict[str, float] = {}
        """Lifetime of results in seconds, by request id."""
        self._odd: dict[str, float] = {}
        """Random draw that selects the odd fields, by request id; see `_made_odd`."""
        self._refused: dict[str, _LastingFault] = {}
        """Refused files, by path."""
        self._without_images: dict[str, _LastingFault] = {}
        """Results without images, by request id."""

    def engine(self, engine: Engine) -> Engine:
        """Wrap an engine to inject the faults of the point `execute`."""
        return _FaultyEngine(engine, self._faults, self._expiring)

    def middleware(self, service: QueueService, app_id: AppId) -> Middleware:
        """Build the middleware that injects the faults of all other points."""

        @web.middleware
        async def inject(request: web.Request, handler: Handler) -> web.StreamResponse:
            path = _path_of(request)
            point = fault_point_of(request.method, path, app_id)
            if point is None or (point is FaultPoint.SUBMIT and proxy.is_direct(request.host)):
                return await handler(request)
            if point is FaultPoint.RESULT and await self._has_expired(service, path):
                return response(answers.not_found_reply(service.new_id()))
            if point is FaultPoint.FILE and (refusal := self._refusal(path)) is not None:
                return _error(refusal, service)
            fault = self._faults.decide(point)
            if fault is not None and not self._begin(fault, path):
                fault = None
            if point is FaultPoint.RESULT and (way := self._odd.get(_request_id_in(path))) is not None:
                handler = _changed(handler, lambda output: _made_odd(output, way))
            if point is FaultPoint.RESULT and (refused := self._without_images.get(_request_id_in(path))) is not None:
                handler = _changed(handler, lambda output: self._emptied(output, refused))
            if fault is None:
                return await handler(request)
            _log.info("injected fault: %s at %s %s", fault.do, request.method, path)
            return await _inject(fault, request, handler, service)

        return inject

    def _begin(self, fault: FaultRule, path: str) -> bool:
        """Remember a fault that lasts beyond its call; False if the file or result already had this fault."""
        if fault.do is FaultAction.ODD_FIELDS:
            self._odd.setdefault(_request_id_in(path), self._faults.draw(fault))
        if fault.do is FaultAction.REFUSE:
            if path in self._refused:
                return False
            self._refused[path] = _LastingFault(fault, self._clock() + fault.seconds, 1)
        if fault.do is FaultAction.NO_IMAGES:
            request_id = _request_id_in(path)
            if request_id in self._without_images:
                return False
            self._without_images[request_id] = _LastingFault(fault, self._clock() + fault.seconds, 0)
        return True

    def _emptied(self, output: JsonObject, refused: _LastingFault) -> JsonObject:
        """Remove the images from an output while the fault lasts."""
        if refused.is_over(self._clock()):
            return output
        refused.reads += 1
        return output | {"images": []}

    def _refusal(self, path: str) -> FaultRule | None:
        """Find the fault that refuses a file now, if any."""
        refused = self._refused.get(path)
        if refused is None or refused.is_over(self._clock()):
            return None
        refused.reads += 1
        return refused.fault

    async def _has_expired(self, service: QueueService, path: str) -> bool:
        request_id = _request_id_in(path)
        seconds = self._expiring.get(request_id)
        if seconds is None:
            return False
        known = await service.find(RequestId(request_id))
        return (
            known is not None
            and isinstance(known.state, CompletedRequest)
            and self._clock() - known.state.ended_at >= seconds
        )


@dataclass(slots=True)
class _LastingFault:
    """A fault of one file or result that lasts for some time or some reads."""

    fault: FaultRule
    until: float
    """Unix seconds."""
    reads: int
    """Number of affected reads so far."""

    def is_over(self, now: float) -> bool:
        return now >= self.until if self.fault.reads is None else self.reads >= self.fault.reads


def _request_id_in(path: str) -> str:
    """Return the request id in a path; empty without one."""
    address = protocol.parse_path(path)
    return "" if address is None else address.request_id or ""


def _path_of(request: web.Request) -> str:
    """Return the path of a call; for the proxy route, the path of the inner call."""
    target = request.headers.get(proxy.TARGET) if request.path == proxy.PATH else None
    found = proxy.own_path(target) if target is not None else None
    return request.path if found is None else found.path


# --- calls ------------------------------------------------------------------------------------------------


async def _inject(
    fault: FaultRule, request: web.Request, handler: Handler, service: QueueService
) -> web.StreamResponse:
    match fault.do:
        case FaultAction.DROP:
            await request.read()  # unread bytes would make the kernel reset the connection
            return _hang_up(request)
        case FaultAction.ANSWER | FaultAction.REFUSE:
            await request.read()
            return _error(fault, service)
        case FaultAction.DROP_AFTER_ACCEPT | FaultAction.ANSWER_AFTER_ACCEPT:
            answer = await handler(request)
            if answer.status != 200:
                return answer  # rejected: no request was accepted
            return _hang_up(request) if fault.do is FaultAction.DROP_AFTER_ACCEPT else _error(fault, service)
        case FaultAction.LATE:
            answer = await handler(request)
            await asyncio.sleep(fault.seconds)
            return answer
        case FaultAction.ODD_FIELDS | FaultAction.NO_IMAGES:
            return await handler(request)  # `_changed` applies the fault
        case FaultAction.SLOW | FaultAction.CUT | FaultAction.SHORT:
            return await _corrupted(fault, request, handler, service)
        case _:
            raise AssertionError(f"the fault {fault.do} has no effect on a call; add a case here")


def _hang_up(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.close()
    return web.Response()  # never sent: the connection is closed


def _error(fault: FaultRule, service: QueueService) -> web.Response:
    headers = {} if fault.retry_after is None else {"retry-after": f"{fault.retry_after:g}"}
    status, reason = fault.status, _phrase(fault.status)
    if fault.body is ErrorBodyKind.EMPTY:
        return web.Response(status=status, headers=headers)
    if fault.body is ErrorBodyKind.HTML:
        page = (
            f"<html>\r\n<head><title>{status} {reason}</title></head>\r\n<body>\r\n"
            f"<center><h1>{status} {reason}</h1></center>\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
        )
        plain = {"content-type": "text/html", "server": "nginx"}
        return web.Response(status=status, body=page.encode(), headers=plain | headers)
    detail, new_id = _DETAILS.get(status, reason), service.new_id()
    if fault.at is FaultPoint.LISTING:
        kind = _PLATFORM_ERRORS.get(status, PlatformError.SERVER if status >= 500 else PlatformError.VALIDATION)
        reply = platform_error_reply(status, kind, detail, new_id)
    else:
        reply = protocol.request_error_reply(status, _REQUEST_ERRORS.get(status), detail, new_id)
    return web.Response(status=status, body=reply.body, headers={**reply.headers, **headers})


async def _corrupted(
    fault: FaultRule, request: web.Request, handler: Handler, service: QueueService
) -> web.StreamResponse:
    """Return the correct response with a slow, cut or short body."""
    found = await _whole(fault, request, handler, service)
    if isinstance(found, web.StreamResponse):
        return found
    status, headers, body = found
    half = body[: len(body) // 2]
    if fault.do is FaultAction.SHORT:
        return web.Response(status=status, body=half, headers=headers)
    stream = web.StreamResponse(status=status, headers=headers)
    stream.content_length = len(body)
    await stream.prepare(request)
    if fault.do is FaultAction.CUT:
        await stream.write(half)
        _hang_up(request)
        return stream
    size = -(-len(body) // _PIECES) or 1
    for start in range(0, len(body), size):
        await stream.write(body[start : start + size])
        await asyncio.sleep(fault.seconds * size / len(body))
    await stream.write_eof()
    return stream


async def _whole(
    fault: FaultRule, request: web.Request, handler: Handler, service: QueueService
) -> tuple[int, dict[str, str], bytes] | web.StreamResponse:
    """Return status, headers and body of the correct response, or the response itself if it is an error or a stream."""
    if fault.at is FaultPoint.FILE:
        data = await service.storage.read(request.path)
        if data is None:
            return await handler(request)
        return 200, {"content-type": content_type_of(request.path)}, data
    answer = await handler(request)
    body = answer.body if isinstance(answer, web.Response) else None
    if answer.status >= 400 or not isinstance(body, bytes | bytearray):
        return answer
    return answer.status, _kept(answer), bytes(body)


_ODD: Mapping[str, tuple[Json, ...]] = {
    "seed": (True, "7", -1, 1.5, [], {}, [None], {"value": 1}),
    "has_nsfw_concepts": (True, "no", 0, [None], ["no"], {}, {"0": False}),
    "timings": (True, "fast", 0.5, [], [0.5], {"inference": None}, {"inference": "0.5"}, {"inference": {"s": 1}}),
    "prompt": (7, [], {"text": "a cat"}),
}
"""Values of wrong types. None of the seeds is a valid one."""


def _made_odd(output: JsonObject, way: float) -> JsonObject:
    """Return the output with one to four fields missing, null or of the wrong type, selected by `way` (0 to 1)."""
    chance, odd = Random(way), dict(output)
    for name in chance.sample(sorted(_ODD), chance.randint(1, len(_ODD))):
        match chance.randrange(3):
            case 0:
                odd.pop(name, None)
            case 1:
                odd[name] = None
            case _:
                odd[name] = chance.choice(_ODD[name])
    return odd


def _changed(handler: Handler, change: Callable[[JsonObject], JsonObject]) -> Handler:
    """Wrap a handler to change its results; errors are unchanged."""

    async def handle(request: web.Request) -> web.StreamResponse:
        answer = await handler(request)
        body = answer.body if isinstance(answer, web.Response) else None
        if answer.status != 200 or not isinstance(body, bytes | bytearray):
            return answer
        changed = orjson.dumps(change(protocol.read_object(bytes(body))))
        return web.Response(status=200, body=changed, headers=_kept(answer))

    return handle


def _kept(answer: web.StreamResponse) -> dict[str, str]:
    """Return the headers of a response without Content-Length."""
    return {name: value for name, value in answer.headers.items() if name.lower() != "content-length"}


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


# --- the engine -------------------------------------------------------------------------------------------


class _SentBack(WorkerCrashed):
    """The request returns to the queue."""

    def __init__(self, seconds: float) -> None:
        super().__init__("requeued by fault injection")
        self.pause = seconds


class _FaultyEngine:
    """An engine with injected faults."""

    def __init__(self, engine: Engine, faults: FaultSequence, expiring: dict[str, float]) -> None:
        self._engine = engine
        self._faults = faults
        self._expiring = expiring

    def info(self) -> EngineInfo:
        """Delegate to the engine."""
        return self._engine.info()

    async def start(self) -> None:
        """Delegate to the engine."""
        await self._engine.start()

    async def aclose(self) -> None:
        """Delegate to the engine."""
        await self._engine.aclose()

    async def generate(self, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        """Run the engine, or inject a fault.

        Raises:
            EngineFailure: a model error, real or injected.
            EngineCancelled: the job was cancelled.
            WorkerCrashed: real, injected, or the request returns to the queue.
        """
        fault = self._faults.decide(FaultPoint.EXECUTE)
        if fault is not None:
            _log.info("injected fault: %s of request %s", fault.do, job.request_id)
            await self._inject(fault, job, cancelled)
        return await self._engine.generate(job, on_step, cancelled)

    async def _inject(self, fault: FaultRule, job: EngineJob, cancelled: Cancelled) -> None:
        match fault.do:
            case FaultAction.EXPIRE:
                self._expiring[job.request_id] = fault.seconds
            case FaultAction.CRASH:
                raise WorkerCrashed("injected fault")
            case FaultAction.REQUEUE:
                await _while_not(cancelled, fault.seconds)
                raise _SentBack(fault.seconds)
            case FaultAction.CONTENT_POLICY:
                words = "The content could not be processed because it contained material flagged by a content checker."
                raise EngineFailure(422, "content_policy_violation", words, ("body", "prompt"))
            case FaultAction.FAIL:
                kind = _MODEL_ERRORS.get(fault.status, "internal_server_error")
                raise EngineFailure(fault.status, kind, "Injected fault", ("body",), retryable=fault.retryable)
            case _:
                raise AssertionError(f"the fault {fault.do} has no effect on an execution; add a case here")


async def _while_not(cancelled: Cancelled, seconds: float) -> None:
    """Wait until the time is over.

    Raises:
        EngineCancelled: the job was cancelled.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while (left := end - loop.time()) > 0:
        if cancelled():
            raise EngineCancelled
        await asyncio.sleep(min(left, _LOOK_SECONDS))
