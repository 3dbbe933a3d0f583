"""Build replies from records, and payloads from engine results. Pure.

Defines the bodies of fal's two error families and of the endpoint's output; `batch.fal.protocol` adds URLs, statuses
and headers.
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
    """Return 202 while the request waits or runs, 200 after it ended. `logs`: include log lines."""
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


def result_reply(base: str, completed: CompletedRequest, inlined: Mapping[str, str] | None = None) -> Reply:
    """Return the output, or the error with its status.

    Args:
        base: scheme and host of the HTTP request; image URLs start with it.
        completed: the finished request.
        inlined: data URIs by stored path, for a request with `sync_mode`.
    """
    headers = {
        "content-type": protocol.CONTENT_JSON,
        protocol.REQUEST_ID: completed.request_id,
        protocol.BILLABLE_UNITS: f"{completed.billable_units:.4f}" if completed.billable_units else "0",
    }
    if completed.engine is not None:
        headers[protocol.ENGINE] = completed.engine
    if completed.error_type is not None:
        headers[protocol.ERROR_TYPE] = completed.error_type
    if completed.retryable is not None:
        headers[protocol.NEEDS_RETRY] = "true" if completed.retryable else "false"
    if completed.status == NOT_STARTED[0] and completed.error_type == NOT_STARTED[1]:
        headers["x-fal-request-timeout-type"] = "user"
    return Reply(completed.status, with_urls(base, completed.payload, inlined), headers)


def still_running_reply(request_id: RequestId) -> Reply:
    """Return 400: the request has no result yet."""
    return protocol.request_error_reply(400, None, "Request is still in progress", request_id)


def not_found_reply(request_id: RequestId) -> Reply:
    """Return 404: the request id is unknown."""
    return Reply(
        404,
        b'{"status":"NOT_FOUND"}',
        {"content-type": protocol.CONTENT_JSON, protocol.REQUEST_ID: request_id},
    )


def output_payload(result: EngineResult, paths: Sequence[str]) -> bytes:
    """Return the endpoint's output as JSON. `paths`: the stored images, in the order of the result."""
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
    """Return the megapixels (10^6 pixels) of all images, to four decimals, not rounded up to whole megapixels."""
    return round(sum(image.width * image.height for image in result.images) / 1e6, 4)


def model_error(type: str, message: str, loc: Sequence[str | int], ctx: Mapping[str, Any], value: Any) -> JsonObject:  # noqa: A002 - the wire's name
    """Return one entry of a model error's `detail`."""
    error: JsonObject = {"loc": list(loc), "msg": message, "type": type, "url": _ERRORS_PAGE + type}
    if ctx:
        error["ctx"] = dict(ctx)
    if value is not None:
        error["input"] = value
    return error


def validation_payload(error: ValidationError) -> bytes:
    """Return the 422 body for an invalid input, with one entry per problem."""
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
    """Return the body of a model error from the engine or the source image's download."""
    value = _short(image_url) if failure.loc[-1:] == ("image_url",) else None
    detail = model_error(failure.type, failure.message, failure.loc, failure.ctx, value)
    return orjson.dumps({"detail": [detail]}, default=str)


def kept_for(payload: bytes) -> float:
    """Return the lifetime in seconds of a result with `X-Fal-Store-IO: 0`, by its size as on fal."""
    return 3600.0 if len(payload) < 10_000 else 360.0


def error_payload(error_type: str, detail: str) -> bytes:
    """Return the body of an infrastructure error."""
    return orjson.dumps({"detail": detail, "error_type": error_type})


def with_urls(base: str, payload: bytes, inlined: Mapping[str, str] | None = None) -> bytes:
    """Replace stored paths by absolute URLs.

    Replacing bytes is safe: quotes inside JSON strings are escaped, so that the searched bytes never occur in a prompt.
    """
    if _OWN_URL not in payload:
        return payload
    for path, data_uri in (inlined or {}).items():
        payload = payload.replace(b'"url":"' + path.encode(), b'"url":"' + data_uri.encode())
    return payload.replace(_OWN_URL, b'"url":' + orjson.dumps(base)[:-1] + b"/files/")


def _is_silent(completed: CompletedRequest) -> bool:
    """Whether the status omits the error, as observed on fal for content-policy rejections."""
    return completed.status == 422 and b'"type":"content_policy_violation"' in completed.payload


def _log_json(line: LogLine) -> JsonObject:
    timestamp = datetime.fromtimestamp(line.at, UTC).isoformat()
    return {"message": line.message, "timestamp": timestamp, "level": line.level, "source": "USER", "labels": {}}


def _short(value: Any) -> Any:
    """Return an invalid value shortened for an error message: it may contain a whole image."""
    if isinstance(value, str) and len(value) > 300:
        return value[:300] + "..."
    if isinstance(value, int) and value.bit_length() > 63:
        return float(value) if value.bit_length() < 1024 else None  # orjson writes 64-bit integers only
    return value if isinstance(value, str | int | float | bool) or value is None else None
