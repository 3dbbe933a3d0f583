"""How requests are answered: records in, replies out, and engine results into payloads. Pure.

Owns the bodies of fal's two error families and the output of the endpoint. The wire around them is
`batch.fal.protocol`'s; sockets and storage are nobody's business here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson
from pydantic import ValidationError

from batch.fal import protocol
from batch.fal.protocol import Reply
from batch.server.engines.base import EngineFailure, EngineResult
from batch.server.queue.records import CompletedRequest, LogLine
from batch.server.queue.scheduler import LiveView
from batch.types import AppId, JsonObject, RequestId

__all__ = [
    "CANCELLED",
    "NOT_STARTED",
    "billable_units",
    "error_payload",
    "failure_payload",
    "kept_for",
    "model_error",
    "not_found_reply",
    "output_payload",
    "result_reply",
    "status_reply",
    "still_running_reply",
    "validation_payload",
    "with_urls",
]

CANCELLED = (499, "client_cancelled", "Request was cancelled")
NOT_STARTED = (504, "request_timeout", "Request was not started within its start timeout")
_ERRORS_PAGE = "https://docs.fal.ai/errors#"
_OWN_URL = b'"url":"/files/'


def status_reply(
    base: str, app: AppId, request_id: RequestId, known: LiveView | CompletedRequest, *, logs: bool
) -> Reply:
    """202 while it waits or runs, 200 once it ended. `logs`: whether the caller asked for log lines."""
    lines = [_log_json(line) for line in known.logs] if logs else []
    if isinstance(known, LiveView):
        return protocol.progress_reply(base, app, request_id, known.state, position=known.position, logs=lines)
    return protocol.completed_reply(
        base,
        app,
        request_id,
        inference_time=known.inference_time,
        error=f"Invalid status code: {known.status}" if known.status >= 400 and not _is_silent(known) else None,
        error_type=known.error_type,
        logs=lines,
    )


def result_reply(base: str, ending: CompletedRequest, inlined: Mapping[str, str] | None = None) -> Reply:
    """The bare output, or the error, with the status that the model gave.

    Args:
        base: scheme and host of this request; the images' URLs are built on it.
        ending: how the request ended.
        inlined: data URIs by stored path, for an ending whose images are answered inline.
    """
    headers = {
        "content-type": protocol.CONTENT_JSON,
        protocol.REQUEST_ID: ending.request_id,
        protocol.BILLABLE_UNITS: f"{ending.billable_units:.4f}" if ending.billable_units else "0",
    }
    if ending.engine is not None:
        headers[protocol.ENGINE] = ending.engine
    if ending.error_type is not None:
        headers[protocol.ERROR_TYPE] = ending.error_type
    if ending.retryable is not None:
        headers[protocol.NEEDS_RETRY] = "true" if ending.retryable else "false"
    if ending.status == NOT_STARTED[0] and ending.error_type == NOT_STARTED[1]:
        headers["x-fal-request-timeout-type"] = "user"
    return Reply(ending.status, with_urls(base, ending.payload, inlined), headers)


def still_running_reply(request_id: RequestId) -> Reply:
    """400: the result was asked for too early."""
    return protocol.request_error_reply(400, None, "Request is still in progress", request_id)


def not_found_reply(request_id: RequestId) -> Reply:
    """404 for a request id that was never given out."""
    return Reply(
        404,
        b'{"status":"NOT_FOUND"}',
        {"content-type": protocol.CONTENT_JSON, protocol.REQUEST_ID: request_id},
    )


def output_payload(result: EngineResult, paths: Sequence[str]) -> bytes:
    """The endpoint's output as JSON; `paths` are where the images lie, in their order."""
    images = [
        {
            "url": path,
            "width": image.width,
            "height": image.height,
            "content_type": image.content_type,
            "file_name": path.rpartition("/")[2],
            "file_size": len(image.data),
        }
        for image, path in zip(result.images, paths, strict=True)
    ]
    return orjson.dumps(
        {
            "images": images,
            "timings": result.timings,
            "seed": result.seed,
            "has_nsfw_concepts": result.has_nsfw_concepts,
            "prompt": result.prompt,
        }
    )


def billable_units(result: EngineResult) -> float:
    """Megapixels (10^6) of all result images, exact to four decimals, never rounded up to whole ones."""
    return round(sum(image.width * image.height for image in result.images) / 1e6, 4)


def model_error(type: str, message: str, loc: Sequence[str | int], ctx: Mapping[str, Any], value: Any) -> JsonObject:  # noqa: A002 - the wire's own word
    """One entry of a model error's `detail`."""
    error: JsonObject = {"loc": list(loc), "msg": message, "type": type, "url": _ERRORS_PAGE + type}
    if ctx:
        error["ctx"] = dict(ctx)
    if value is not None:
        error["input"] = value
    return error


def validation_payload(error: ValidationError) -> bytes:
    """The 422 body of an input that the endpoint's schema refuses: an entry for each problem."""
    details = [
        model_error(
            problem["type"],
            problem["msg"],
            ("body", *problem["loc"]),
            problem.get("ctx", {}),
            _short(problem["input"]),
        )
        for problem in error.errors()
    ]
    return orjson.dumps({"detail": details}, default=str)


def failure_payload(failure: EngineFailure, image_url: str) -> bytes:
    """The body of a model error that the engine, or the download of the source, raised."""
    value = _short(image_url) if failure.loc[-1:] == ("image_url",) else None
    detail = model_error(failure.type, failure.message, failure.loc, failure.ctx, value)
    return orjson.dumps({"detail": [detail]}, default=str)


def kept_for(payload: bytes) -> float:
    """Seconds that a result is told whose caller wants nothing stored: fal's short store, by its size."""
    return 3600.0 if len(payload) < 10_000 else 360.0


def error_payload(error_type: str, detail: str) -> bytes:
    """The body of an infrastructure error."""
    return orjson.dumps({"detail": detail, "error_type": error_type})


def with_urls(base: str, payload: bytes, inlined: Mapping[str, str] | None = None) -> bytes:
    """Absolute URLs in place of stored paths.

    A plain replacement is safe: inside a JSON string every quote is escaped, so that the searched bytes can
    only be a member of ours, never a part of somebody's prompt.
    """
    if _OWN_URL not in payload:
        return payload
    for path, data_uri in (inlined or {}).items():
        payload = payload.replace(b'"url":"' + path.encode(), b'"url":"' + data_uri.encode())
    return payload.replace(_OWN_URL, b'"url":' + orjson.dumps(base)[:-1] + b"/files/")


def _is_silent(ending: CompletedRequest) -> bool:
    """Of a content-policy rejection fal was seen to say nothing in the status: only the result does."""
    return ending.status == 422 and b'"type":"content_policy_violation"' in ending.payload


def _log_json(line: LogLine) -> JsonObject:
    timestamp = datetime.fromtimestamp(line.at, UTC).isoformat()
    return {"message": line.message, "timestamp": timestamp, "level": line.level, "source": "USER", "labels": {}}


def _short(value: Any) -> Any:
    """What was sent, for the error's reader: an image inside it would drown the rest."""
    if isinstance(value, str) and len(value) > 300:
        return value[:300] + "..."
    if isinstance(value, int) and value.bit_length() > 63:
        return float(value) if value.bit_length() < 1024 else None  # JSON as orjson writes it has no such whole numbers
    return value if isinstance(value, str | int | float | bool) or value is None else None
