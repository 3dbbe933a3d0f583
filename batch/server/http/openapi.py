"""The server's API described in OpenAPI 3.1: what `GET /openapi.json` answers. Pure.

Input and output are generated from the types of `batch.fal.endpoint`; everything around them, calls, answers and error
bodies, is written here once and held against the running server by a test. Refuses to know how anything is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from batch.fal import protocol
from batch.fal.endpoint import APP_ID, ImageToImageInput, ImageToImageOutput
from batch.fal.platform import BILLING_LIMIT, PAGE_LIMIT, PlatformError
from batch.fal.platform_queries import _ID_LIMIT as ID_LIMIT, ChargeSource, EstimateKind, RequestOutcome, SortBy
from batch.types import AppId, Json, JsonObject

__all__ = ["document"]

_JSON = protocol.CONTENT_JSON
_TEXT: JsonObject = {"type": "string"}
_URL: JsonObject = {"type": "string", "format": "uri"}
_INSTANT: JsonObject = {"type": "string", "format": "date-time"}
_NUMBER: JsonObject = {"type": "number"}
_TAG_FILTERS: JsonObject = {
    "type": "array",
    "items": {"type": "string", "pattern": "^[^=,]+=[^,]*$"},
    "minItems": 1,
    "maxItems": protocol.TAG_PAIRS,
}
_AMOUNT: JsonObject = {"type": "number", "minimum": 0}
_CURSOR: JsonObject = {"type": ["string", "null"], "description": "of the next page; null on the last one"}
_NAME: JsonObject = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
_BYTES: JsonObject = {"required": True, "content": {"application/octet-stream": {"schema": _TEXT}}}
_UUID: JsonObject = {"type": "string", "format": "uuid"}


def document(app_id: AppId = APP_ID, version: str = "0") -> JsonObject:
    """The whole description.

    Args:
        app_id: the one endpoint that is served.
        version: of restyle.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"restyle serve: {app_id}",
            "version": version,
            "description": (
                "FLUX.1 [dev] image-to-image behind fal's queue protocol, on a machine of your own. Without keys the"
                " server listens on loopback only and asks nobody for one."
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"key": []}],
        "tags": [{"name": name} for name in ("queue", "files", "platform", "server")],
        "paths": {**_queue(app_id), **_files(), **_platform(), **_server()},
        "components": {
            "securitySchemes": {
                "key": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Authorization",
                    "description": "`Key NAME:SECRET`, as the official clients send FAL_KEY",
                }
            },
            "schemas": _schemas(),
        },
    }


# --- the paths --------------------------------------------------------------------------------------------


def _queue(app_id: AppId) -> JsonObject:
    owner, alias, _ = protocol.split_app(app_id)
    requests = f"/{owner}/{alias}/requests/{{request_id}}"
    request_id = _parameter("request_id", "path", _UUID, "as the submit answered it", required=True)
    logs = _parameter("logs", "query", {"enum": ["0", "1", "false", "true"]}, "whether log lines are answered too")
    submit = _operation(
        "submit",
        "queue",
        "Accept a request; it is durable when this answers. Its input is judged when it is executed.",
        {200: _answer("accepted", "Ticket"), **_refusals(401, 403, 404, 413, 422, 429, 503)},
        [
            *_wishes(),
            _parameter("fal_webhook", "query", _URL, "told of the end"),
            _parameter("fal_max_queue_length", "query", {"type": "integer", "minimum": 0}, "else 429"),
            _parameter("Idempotency-Key", "header", {"type": "string", "maxLength": 255}, "same key, same request"),
        ],
        _body("ImageToImageInput"),
    )
    run = _operation(
        "run",
        "queue",
        "Execute a request and answer with its output on the same connection.",
        {200: _answer("the output", "ImageToImageOutput", _RESULT_HEADERS), **_outcomes(401, 403, 404, 413, 503)},
        _wishes(),
        _body("ImageToImageInput"),
    )
    result = _operation(
        "result",
        "queue",
        "The output of a request that has ended, or its error with the status that the model gave.",
        {
            200: _answer("the output", "ImageToImageOutput", _RESULT_HEADERS),
            400: _answer("it has not ended", "RequestError"),
            **_outcomes(401, 403, 404),
        },
    )
    return {
        f"/{app_id}": {"post": submit},
        f"/run/{app_id}": {"post": run},
        requests: {"parameters": [request_id], "get": result},
        f"{requests}/status": {
            "parameters": [request_id],
            "get": _operation(
                "status",
                "queue",
                "Where a request stands. COMPLETED may be a failure: the result says.",
                {
                    202: _answer("it waits or runs", "InQueue", others=("InProgress",)),
                    200: _answer("it has ended", "Completed"),
                    **_refusals(401, 403, 404),
                },
                [logs],
            ),
        },
        f"{requests}/status/stream": {
            "parameters": [request_id],
            "get": _operation(
                "stream",
                "queue",
                "The same as server-sent events: one at each change, the last one COMPLETED.",
                {
                    200: {"description": "events", "content": {"text/event-stream": {"schema": _TEXT}}},
                    **_refusals(401, 403, 404),
                },
                [logs],
            ),
        },
        f"{requests}/cancel": {
            "parameters": [request_id],
            "put": _operation(
                "cancel",
                "queue",
                "Take a request out of the queue, or ask its engine to stop; it may finish all the same.",
                {
                    202: _answer("asked", "CancellationRequested"),
                    400: _answer("too late", "AlreadyCompleted"),
                    **_refusals(401, 403, 404),
                },
            ),
        },
    }


def _wishes() -> list[JsonObject]:
    seconds = {"type": "number", "exclusiveMinimum": 0.1}
    return [
        _parameter("X-Fal-Request-Start-Timeout", "header", seconds, "not started within so many seconds: 504"),
        _parameter("X-Fal-Request-Timeout", "header", seconds, "the older name of it"),
        _parameter("X-Fal-Queue-Priority", "header", {"enum": ["normal", "low"]}, "low waits behind every normal one"),
        _parameter(
            "X-Fal-Object-Lifecycle-Preference",
            "header",
            _TEXT,
            'lifetime of the result files: `{"expiration_duration_seconds": 604800}`',
        ),
        _parameter("X-Fal-Tags", "header", _TEXT, "up to 10 labels, `team=design,env=prod`; billing events show them"),
    ]


def _files() -> JsonObject:
    announced, part, joined = "/storage/upload/{token}/files/{prefix}/{name}", "/{number}", "/complete"
    in_parts = "/files/{prefix}/{name}/multipart/{token}"
    refused = _refusals(401, 403)
    return {
        "/storage/auth/token": {
            "post": _operation("token", "files", "A token for uploads.", {200: _answer("it", "Token"), **refused})
        },
        "/tokens/": {
            "post": _operation(
                "realtimeToken", "files", "A short-lived token.", {200: _answer("it", "TokenText"), **refused}
            )
        },
        "/storage/upload/initiate": {"post": _announcing("initiate", "Announce an upload.")},
        "/storage/upload/initiate-multipart": {"post": _announcing("initiateParts", "Announce an upload in parts.")},
        announced: _uploading("put", "put", "The bytes of an announced upload.", "Put"),
        announced + part: _uploading("putPart", "put", "One part of an announced upload.", "PartPut"),
        announced + joined: _uploading("complete", "post", "All parts have come: make them one file.", "Joined"),
        "/files/upload": {
            "post": _operation(
                "upload",
                "files",
                "Bytes in, URL out.",
                {200: _answer("the URL", "Stored"), **_refusals(401, 403, 413, 503)},
                body=_BYTES,
            )
        },
        "/files/upload/multipart": {
            "post": _operation(
                "begin",
                "files",
                "Announce an upload in parts.",
                {200: _answer("it", "Begun"), **_refusals(401, 403, 503)},
            )
        },
        in_parts + part: _uploading("filePart", "put", "One part of an announced upload.", "PartPut", 401),
        in_parts + joined: _uploading("fileComplete", "post", "All parts have come.", "Joined", 401),
        "/files/{prefix}/{name}": {
            "parameters": _named(),
            "get": _operation(
                "file",
                "files",
                "A stored file, for whoever knows its name.",
                {
                    200: {"description": "its bytes", "content": {"*/*": {"schema": {}}}},
                    206: {"description": "the range that was asked for", "content": {"*/*": {"schema": {}}}},
                    304: {"description": "it has not changed"},
                    416: {"description": "it has no such range"},
                    **_refusals(404),
                },
                security=[],
            ),
        },
    }


def _announcing(name: str, summary: str) -> JsonObject:
    responses = {200: _answer("both URLs", "Reserved"), **_refusals(401, 403, 413, 422, 503)}
    kind = _parameter("storage_type", "query", _TEXT, "passed over")
    return _operation(name, "files", summary, responses, [kind], _body("Announcement"))


def _uploading(name: str, method: str, summary: str, answer: str, *more: int) -> JsonObject:
    """A path below an announced upload: whoever knows the token in it may write there."""
    parameters = [*_named(), _parameter("token", "path", _NAME, "as it was announced", required=True)]
    responses = {200: _answer("it is durable", answer), **_refusals(403, 413, 503, *more)}
    body = _body("PartList") if method == "post" else _BYTES
    if answer != "Put":
        responses[400] = _answer("a part is wrong or missing", "RequestError")
        responses[422] = _answer("the body is no JSON object", "RequestError")
    if answer == "PartPut":
        number = {"type": "integer", "minimum": 1, "maximum": 1000}
        parameters.append(_parameter("number", "path", number, "of the part", required=True))
    return {"parameters": parameters, method: _operation(name, "files", summary, responses, body=body)}


def _named() -> list[Json]:
    prefix = {"type": "string", "pattern": "^[0-9a-f]{2}$"}
    name = {"type": "string", "pattern": "^[0-9a-f]{32}([.][a-z0-9]{1,8})?$"}
    return [
        _parameter("prefix", "path", prefix, "of the name", required=True),
        _parameter("name", "path", name, "of the file", required=True),
    ]


def _platform() -> JsonObject:
    apps = _ids("endpoint_id", "the endpoints")
    span = [
        _parameter("start", "query", _INSTANT, "default: 24 hours ago"),
        _parameter("end", "query", _INSTANT, "exclusive; default: now"),
    ]
    listing = [
        {**apps, "required": True},
        *span,
        _parameter("status", "query", {"enum": [str(one) for one in RequestOutcome]}, "how they ended"),
        _parameter("request_id", "query", _UUID, "only this one; then `start` is 90 days ago by default"),
        _parameter("expand", "query", {"enum": ["payloads"]}, "inputs and outputs too"),
        _parameter("sort_by", "query", {"enum": [str(one) for one in SortBy]}, "the greatest first"),
        *_paging(PAGE_LIMIT),
    ]
    sources = {"enum": [str(one) for one in ChargeSource]}
    charges = [
        apps,
        _ids("request_id", "only these"),
        *span,
        _parameter("source", "query", sources, "tagged-billed: with the tags of each request"),
        _parameter("tag", "query", _TAG_FILTERS, "key=value, with source=tagged-billed; `(untagged)` as the value"),
        *_paging(BILLING_LIMIT),
    ]
    return {
        "/v1/models/requests/by-endpoint": {
            "get": _asked("listRequestsByEndpoint", "Requests of the endpoint, page by page.", "RequestPage", listing)
        },
        "/v1/models/billing-events": {
            "get": _asked("getBillingEvents", "What requests cost, the newest first.", "BillingPage", charges)
        },
        "/v1/models/pricing": {
            "get": _asked("getPricing", "What a unit costs.", "PricePage", [{**apps, "required": True}], 404)
        },
        "/v1/models/pricing/estimate": {
            "post": _asked("estimatePricing", "What so much would cost.", "Estimate", [], 404, 413, body="EstimateOf")
        },
        "/v1/meta": {"get": _asked("getMeta", "Where webhooks come from.", "Meta", [])},
    }


def _server() -> JsonObject:
    return {
        "/health": {"get": _open("health", "What runs here, and how much of it.", _ref("Health"))},
        "/openapi.json": {"get": _open("openapi", "This description.", {"type": "object"})},
        "/.well-known/jwks.json": {"get": _open("keys", "What webhooks are signed with.", _ref("KeySet"))},
    }


def _open(name: str, summary: str, schema: JsonObject) -> JsonObject:
    """What anybody may read."""
    answer: JsonObject = {"description": "it", "content": {_JSON: {"schema": schema}}}
    return _operation(name, "server", summary, {200: answer}, security=[])


# --- their parts ------------------------------------------------------------------------------------------

_RESULT_HEADERS: JsonObject = {
    "x-fal-billable-units": {"schema": _TEXT, "description": "megapixels"},
    "x-restyle-engine": {"schema": _TEXT, "description": "what executed it"},
}
_WORDS = {
    401: "no key, or none of this server",
    403: "the key's owner is locked",
    404: "there is none",
    413: "the body is too large",
    422: "the body is no JSON object, or the Idempotency-Key was used with another one",
    429: "more requests wait than the caller allows",
    503: "the disk refuses",
}


def _operation(
    name: str,
    tag: str,
    summary: str,
    responses: Mapping[int, Any],
    parameters: Sequence[JsonObject] = (),
    body: JsonObject | None = None,
    security: list[Any] | None = None,
) -> JsonObject:
    operation: JsonObject = {"operationId": name, "tags": [tag], "summary": summary}
    if parameters:
        operation["parameters"] = list(parameters)
    if body is not None:
        operation["requestBody"] = body
    if security is not None:
        operation["security"] = security
    operation["responses"] = {str(status): responses[status] for status in sorted(responses)}
    return operation


def _asked(name: str, summary: str, answer: str, parameters: list[Any], *more: int, body: str = "") -> JsonObject:
    """An operation of the platform API, whose errors have its own shape."""
    words = {400: "a parameter is wrong", **_WORDS}
    responses = {status: _answer(words[status], "PlatformError") for status in (400, 401, 403, *more)}
    if name == "getMeta":
        responses = {}
    responses[200] = _answer("it", answer)
    return _operation(name, "platform", summary, responses, parameters, _body(body) if body else None)


def _parameter(name: str, place: str, schema: Mapping[str, Any], words: str, *, required: bool = False) -> JsonObject:
    parameter: JsonObject = {"name": name, "in": place, "required": required, "schema": dict(schema)}
    if words:
        parameter["description"] = words
    return parameter


def _ids(name: str, words: str) -> JsonObject:
    schema = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": ID_LIMIT}
    return {**_parameter(name, "query", schema, words + ", repeated or with commas"), "style": "form", "explode": True}


def _paging(most: int) -> list[JsonObject]:
    return [
        _parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": most}, "of one page"),
        _parameter("cursor", "query", _TEXT, "as the page before gave it"),
    ]


def _body(schema: str) -> JsonObject:
    return {"required": True, "content": {_JSON: {"schema": _ref(schema)}}}


def _answer(words: str, schema: str, headers: JsonObject | None = None, others: Sequence[str] = ()) -> JsonObject:
    own: JsonObject = {
        protocol.REQUEST_ID: {"schema": _TEXT, "required": True, "description": "of the request or call"}
    }
    either: list[Json] = [_ref(schema), *map(_ref, others)]
    shape: JsonObject = {"oneOf": either} if others else _ref(schema)
    return {"description": words, "headers": {**own, **(headers or {})}, "content": {_JSON: {"schema": shape}}}


def _refusals(*statuses: int) -> dict[int, JsonObject]:
    """Error answers of the queue and the files, in fal's two shapes."""
    shapes = {404: ("RequestError", ("NotFound",)), 422: ("RequestError", ("ModelError",))}
    return {status: _refusal(status, *shapes.get(status, ("RequestError", ()))) for status in statuses}


def _refusal(status: int, schema: str, others: Sequence[str]) -> JsonObject:
    return _answer(_WORDS[status], schema, others=others)


def _outcomes(*statuses: int) -> dict[int, JsonObject]:
    """Error answers of a request that was executed, and these refusals of the call."""
    return {
        **_refusals(*statuses),
        422: _answer("the input cannot work", "ModelError", _RESULT_HEADERS),
        499: _answer("it was cancelled", "RequestError", _RESULT_HEADERS),
        500: _answer("the engine failed", "RequestError", _RESULT_HEADERS, ("ModelError",)),
        504: _answer("it was not started in time", "RequestError", _RESULT_HEADERS, ("ModelError",)),
    }


def _ref(name: str) -> JsonObject:
    return {"$ref": f"#/components/schemas/{name}"}


# --- the schemas ------------------------------------------------------------------------------------------


def _schemas() -> JsonObject:
    _, models = models_json_schema(
        [(ImageToImageInput, "validation"), (ImageToImageOutput, "validation")],
        ref_template="#/components/schemas/{model}",
    )
    return {**models["$defs"], **_queue_schemas(), **_error_schemas(), **_file_schemas(), **_platform_schemas()}


def _queue_schemas() -> JsonObject:
    urls = {"request_id": _UUID, "response_url": _URL, "status_url": _URL, "cancel_url": _URL}
    logs = {"type": "array", "items": _ref("LogLine")}
    position = {"type": "integer", "minimum": 0}
    metrics = _object({}, inference_time=_AMOUNT)
    return {
        "Ticket": _object(
            {
                "status": _word("IN_QUEUE"),
                **urls,
                "logs": {"type": "null"},
                "metrics": metrics,
                "queue_position": position,
            }
        ),
        "InQueue": _object({"status": _word("IN_QUEUE"), **urls, "queue_position": position}),
        "InProgress": _object({"status": _word("IN_PROGRESS"), **urls, "logs": logs}),
        "Completed": _object(
            {"status": _word("COMPLETED"), **urls, "logs": logs, "metrics": metrics}, error=_TEXT, error_type=_TEXT
        ),
        "LogLine": _object(
            {
                "message": _TEXT,
                "timestamp": _INSTANT,
                "level": {"enum": ["STDERR", "STDOUT", "ERROR", "INFO", "WARN", "DEBUG"]},
                "source": _word("USER"),
                "labels": {"type": "object"},
            }
        ),
        "CancellationRequested": _object({"status": _word("CANCELLATION_REQUESTED")}),
        "AlreadyCompleted": _object({"status": _word("ALREADY_COMPLETED")}),
        "Health": _object(
            {
                "engine": _TEXT,
                "model": _TEXT,
                "revision": _TEXT,
                "safety_checker": _TEXT,
                "safety_checked": {"type": "boolean"},
                "slots": {"type": "integer", "minimum": 1},
                "honours_idempotency_key": {"type": "boolean"},
                "honours_start_timeout": {"type": "boolean"},
                **dict.fromkeys(("queue_depth", "running", "accepted", "submit_posts"), position),
                "disk": {"enum": ["ok", "refuses"]},
            }
        ),
    }


def _error_schemas() -> JsonObject:
    place = {"type": "array", "items": {"type": ["string", "integer"]}}
    entry = _object({"loc": place, "msg": _TEXT, "type": _TEXT, "url": _URL}, ctx={"type": "object"}, input={})
    return {
        "RequestError": _object({"detail": _TEXT}, error_type=_TEXT),
        "ModelError": _object({"detail": {"type": "array", "items": entry, "minItems": 1}}),
        "NotFound": _object({"status": _word("NOT_FOUND")}),
        "PlatformError": _object(
            {
                "error": _object(
                    {"type": {"enum": [str(one) for one in PlatformError]}, "message": _TEXT}, request_id=_TEXT
                )
            }
        ),
    }


def _file_schemas() -> JsonObject:
    return {
        "Token": _object({"token": _TEXT, "token_type": _TEXT, "base_url": _URL, "expires_at": _INSTANT}),
        "TokenText": _TEXT,
        "Announcement": _object({}, content_type=_TEXT, file_name=_TEXT),
        "Reserved": _object({"upload_url": _URL, "file_url": _URL}),
        "Stored": _object({"access_url": _URL}),
        "Begun": _object({"access_url": _URL, "uploadId": _TEXT}),
        "Put": _object({}),
        "PartPut": _part(),
        "PartList": _object({"parts": {"type": "array", "minItems": 1, "items": _part()}}),
        "Joined": _object({"access_url": _URL, "file_url": _URL}),
        "KeySet": _object({"keys": {"type": "array", "items": _object({"kty": _word("OKP"), "x": _TEXT})}}),
    }


def _part() -> JsonObject:
    return _object({"partNumber": {"type": "integer", "minimum": 1}, "etag": _TEXT})


def _platform_schemas() -> JsonObject:
    one = {"request_id": _TEXT, "endpoint_id": _TEXT}
    money = ("output_units", "unit_price", "cost_subtotal", "cost_discount", "cost_total", "cost_estimate_nano_usd")
    quantities = {
        EstimateKind.UNIT_PRICE: ("unit_quantity", {"type": "number", "minimum": 1e-6, "maximum": 1e15}),
        EstimateKind.HISTORICAL: ("call_quantity", {"type": "integer", "minimum": 1, "maximum": 10**15}),
    }
    return {
        "RequestPage": _page(
            "items",
            _object(
                {**one, "sent_at": _INSTANT, "started_at": _INSTANT},
                ended_at=_INSTANT,
                duration=_AMOUNT,
                status_code={"type": "integer"},
                json_input={"type": "object"},
                json_output={"type": "object"},
            ),
        ),
        "BillingPage": _page(
            "billing_events",
            _object(
                {**one, "timestamp": _INSTANT, "percent_discount": {"type": "null"}, **dict.fromkeys(money, _AMOUNT)},
                tags={"type": "object", "additionalProperties": _TEXT},
            ),
        ),
        "PricePage": _page(
            "prices",
            _object({"endpoint_id": _TEXT, "unit_price": _AMOUNT, "unit": _TEXT, "currency": _word("USD")}),
        ),
        "EstimateOf": {
            "oneOf": [
                _object(
                    {
                        "estimate_type": _word(kind),
                        "endpoints": {"type": "object", "additionalProperties": _object({name: quantity})},
                    }
                )
                for kind, (name, quantity) in quantities.items()
            ]
        },
        "Estimate": _object(
            {
                "estimate_type": {"enum": [str(kind) for kind in EstimateKind]},
                "total_cost": _AMOUNT,
                "currency": _word("USD"),
            }
        ),
        "Meta": _object({"webhook_ip_ranges": {"type": "array", "items": _TEXT}}),
    }


def _page(name: str, item: JsonObject) -> JsonObject:
    rows = {"type": "array", "items": item}
    return _object({name: rows, "next_cursor": _CURSOR, "has_more": {"type": "boolean"}})


def _object(required: Mapping[str, Any], **optional: Any) -> JsonObject:
    schema: JsonObject = {"type": "object", "properties": {**required, **optional}}
    if required:
        schema["required"] = list(required)
    return schema


def _word(word: str) -> JsonObject:
    return {"type": "string", "const": str(word)}
