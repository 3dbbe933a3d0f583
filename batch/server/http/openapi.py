"""The server's API as an OpenAPI 3.1 document, served at `GET /openapi.json`. Pure.

Pydantic models describe the bodies and the queries: `bodies`, `batch.fal.endpoint` and `batch.fal.platform_queries`.
This module adds paths, headers and status codes; a test compares the document with a running server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from batch.fal import protocol
from batch.fal.endpoint import APP_ID, ImageToImageInput, ImageToImageOutput
from batch.fal.platform_queries import BillingQuery, CallEstimate, ListingQuery, PricingQuery, UnitEstimate
from batch.server.http import bodies
from batch.types import AppId, JsonObject

__all__ = ["document"]

_Object: TypeAlias = dict[str, Any]
"""A part of the document. It may contain models as schemas; `document` replaces them by references."""
_Schema: TypeAlias = type[BaseModel] | _Object

_REFERENCE = "#/components/schemas/{model}"
_TEXT = {"type": "string"}
_UUID = {"type": "string", "format": "uuid"}
_BYTES = {"required": True, "content": {"application/octet-stream": {"schema": _TEXT}}}


def document(app_id: AppId = APP_ID, version: str = "0") -> JsonObject:
    """Describe the whole API.

    Args:
        app_id: the served endpoint.
        version: restyle's version.
    """
    models: set[type[BaseModel]] = set()
    paths = _with_references({**_queue(app_id), **_files(), **_platform(), **_server()}, models)
    _, schemas = models_json_schema(
        [(model, "validation") for model in sorted(models, key=lambda model: model.__name__)],
        ref_template=_REFERENCE,
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"restyle serve: {app_id}",
            "version": version,
            "description": (
                "FLUX.1 [dev] image-to-image behind fal's queue protocol, on your own machine. Without keys, the server"
                " listens on loopback only and requires no key."
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"key": []}],
        "tags": [{"name": name} for name in ("queue", "files", "platform", "server")],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "key": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Authorization",
                    "description": "`Key NAME:SECRET`, as the official clients send FAL_KEY.",
                }
            },
            "schemas": schemas["$defs"],
        },
    }


def _with_references(value: Any, models: set[type[BaseModel]]) -> Any:
    """Replace each model with a reference to its schema, and collect it in `models`."""
    if isinstance(value, type):
        models.add(value)
        return {"$ref": _REFERENCE.format(model=value.__name__)}
    if isinstance(value, dict):
        return {str(key): _with_references(one, models) for key, one in value.items()}
    return [_with_references(one, models) for one in value] if isinstance(value, list) else value


# --- the paths --------------------------------------------------------------------------------------------


def _queue(app_id: AppId) -> _Object:
    owner, alias, _ = protocol.split_app(app_id)
    requests = f"/{owner}/{alias}/requests/{{request_id}}"
    shared = {"parameters": [_parameter("request_id", "path", _UUID, "The id from the submit response.")]}
    logs = _parameter("logs", "query", {"enum": ["0", "1", "false", "true"]}, "Whether to include log lines.")
    options = _request_headers()
    output = _response(ImageToImageOutput, text="The output.", headers=_RESULT_HEADERS)
    outcomes = {
        422: _response(bodies.ModelErrorBody, text="The input is invalid.", headers=_RESULT_HEADERS),
        499: _response(bodies.RequestErrorBody, text="The request was cancelled.", headers=_RESULT_HEADERS),
        500: _response(*_EITHER_ERROR, text="The engine failed.", headers=_RESULT_HEADERS),
        504: _response(*_EITHER_ERROR, text="The request did not start in time.", headers=_RESULT_HEADERS),
    }
    submit = _operation(
        "queue",
        "submit",
        "Submit a request. The response confirms that it is stored; the input is validated on execution.",
        {200: _response(bodies.TicketBody), **_errors(401, 403, 404, 413, 422, 429, 503)},
        *options,
        _parameter("fal_webhook", "query", {**_TEXT, "format": "uri"}, "URL that receives the result."),
        _parameter("fal_max_queue_length", "query", {"type": "integer", "minimum": 0}, "A longer queue answers 429."),
        _parameter(
            "Idempotency-Key", "header", {**_TEXT, "maxLength": 255}, "A repeated key returns the same request."
        ),
        body=ImageToImageInput,
    )
    run = _operation(
        "queue",
        "run",
        "Execute a request and return its output on the same connection.",
        {200: output, **_errors(401, 403, 404, 413, 503), **outcomes},
        *options,
        body=ImageToImageInput,
    )
    result = _operation(
        "queue",
        "result",
        "Get the output of a finished request, or its error.",
        {
            200: output,
            400: _response(bodies.RequestErrorBody, text="The request is not finished."),
            **_errors(401, 403, 404),
            **outcomes,
        },
    )
    status = _operation(
        "queue",
        "status",
        "Get the status of a request. COMPLETED includes failed requests; the result contains the error.",
        {
            202: _response(
                bodies.InQueueBody, bodies.InProgressBody, text="The status of a waiting or running request."
            ),
            200: _response(bodies.CompletedBody),
            **_errors(401, 403, 404),
        },
        logs,
    )
    stream = _operation(
        "queue",
        "stream",
        "Stream the status as server-sent events, one per change. The last one is COMPLETED.",
        {200: _content("The events.", "text/event-stream", _TEXT), **_errors(401, 403, 404)},
        logs,
    )
    cancel = _operation(
        "queue",
        "cancel",
        "Cancel a request. A running request may still finish.",
        {
            202: _response(bodies.CancellationBody),
            400: _response(bodies.AlreadyCompletedBody),
            **_errors(401, 403, 404),
        },
    )
    return {
        f"/{app_id}": {"post": submit},
        f"/run/{app_id}": {"post": run},
        requests: {**shared, "get": result},
        f"{requests}/status": {**shared, "get": status},
        f"{requests}/status/stream": {**shared, "get": stream},
        f"{requests}/cancel": {**shared, "put": cancel},
    }


def _request_headers() -> list[_Object]:
    seconds = {"type": "number", "exclusiveMinimum": 0.1}
    life = 'Lifetime of the result files: `{"expiration_duration_seconds": 604800}`.'
    return [
        _parameter(
            "X-Fal-Request-Start-Timeout",
            "header",
            seconds,
            "Seconds within which the request must start; 504 otherwise.",
        ),
        _parameter("X-Fal-Request-Timeout", "header", seconds, "Deprecated name of X-Fal-Request-Start-Timeout."),
        _parameter(
            "X-Fal-Queue-Priority",
            "header",
            {"enum": ["normal", "low"]},
            "A low-priority request runs after all normal ones.",
        ),
        _parameter("X-Fal-Object-Lifecycle-Preference", "header", _TEXT, life),
        _parameter("X-Fal-Tags", "header", _TEXT, "Up to 10 labels for billing events: `team=design,env=prod`."),
    ]


def _files() -> _Object:
    announced, in_parts = "/storage/upload/{token}/files/{prefix}/{name}", "/files/{prefix}/{name}/multipart/{token}"
    file = [
        _parameter("prefix", "path", {**_TEXT, "pattern": "^[0-9a-f]{2}$"}, "First two characters of the file's name."),
        _parameter("name", "path", {**_TEXT, "pattern": "^[0-9a-f]{32}([.][a-z0-9]{1,8})?$"}, "The file's name."),
    ]
    token = _parameter("token", "path", {**_TEXT, "pattern": "^[0-9a-f]{32}$"}, "Token of the announced upload.")
    number = _parameter("number", "path", {"type": "integer", "minimum": 1, "maximum": 1000}, "Number of the part.")
    invalid = {
        400: _response(bodies.RequestErrorBody, text="A part is invalid or missing."),
        422: _response(bodies.RequestErrorBody, text="The body is not a JSON object."),
    }

    def post(name: str, summary: str, answer: _Object, *errors: int, **more: Any) -> _Object:
        return {"post": _operation("files", name, summary, {200: answer, **_errors(401, 403, *errors)}, **more)}

    def announce(name: str, summary: str) -> _Object:
        responses = {200: _response(bodies.ReservedBody), **_errors(401, 403, 413, 422, 503)}
        storage = _parameter("storage_type", "query", _TEXT, "Ignored.")
        return {"post": _operation("files", name, summary, responses, storage, body=bodies.AnnouncementBody)}

    def part(name: str, *errors: int) -> _Object:
        responses = {200: _response(bodies.PartBody), **_errors(403, 413, 503, *errors), **invalid}
        operation = _operation("files", name, "Upload one part of a multipart upload.", responses, body=_BYTES)
        return {"parameters": [*file, token, number], "put": operation}

    def complete(name: str, *errors: int) -> _Object:
        responses = {200: _response(bodies.JoinedBody), **_errors(403, 413, 503, *errors), **invalid}
        operation = _operation(
            "files", name, "Complete a multipart upload by joining its parts.", responses, body=bodies.PartListBody
        )
        return {"parameters": [*file, token], "post": operation}

    put = _operation(
        "files",
        "put",
        "Upload the bytes of an announced file.",
        {200: _response(bodies.EmptyBody, text="The file is stored."), **_errors(403, 413, 503)},
        body=_BYTES,
    )
    get = _operation(
        "files",
        "file",
        "Download a file. No key is required; file names cannot be guessed.",
        {
            200: _content("The file.", "*/*", {}),
            206: _content("The requested range.", "*/*", {}),
            304: {"description": "The file has not changed."},
            416: {"description": "The requested range is outside the file."},
            **_errors(404),
        },
        public=True,
    )
    return {
        "/storage/auth/token": post("token", "Get a token for uploads.", _response(bodies.TokenBody)),
        "/tokens/": post("realtimeToken", "Get a short-lived token.", _response(_TEXT, text="The token.")),
        "/storage/upload/initiate": announce("initiate", "Announce an upload."),
        "/storage/upload/initiate-multipart": announce("initiateParts", "Announce a multipart upload."),
        announced: {"parameters": [*file, token], "put": put},
        f"{announced}/{{number}}": part("putPart"),
        f"{announced}/complete": complete("complete"),
        "/files/upload": post("upload", "Upload a file.", _response(bodies.StoredBody), 413, 503, body=_BYTES),
        "/files/upload/multipart": post("begin", "Announce a multipart upload.", _response(bodies.MultipartBody), 503),
        f"{in_parts}/{{number}}": part("filePart", 401),
        f"{in_parts}/complete": complete("fileComplete", 401),
        "/files/{prefix}/{name}": {"parameters": file, "get": get},
    }


def _platform() -> _Object:
    def operation(name: str, summary: str, model: type[BaseModel], *errors: int, **more: Any) -> _Object:
        responses = {status: _response(bodies.PlatformErrorBody, text=_ERRORS[status]) for status in errors}
        query = _query(more.pop("query")) if "query" in more else []
        return _operation("platform", name, summary, {200: _response(model), **responses}, *query, **more)

    refused, estimate = (400, 401, 403), {"oneOf": [UnitEstimate, CallEstimate]}
    listing = operation(
        "listRequestsByEndpoint", "List requests.", bodies.RequestPageBody, *refused, query=ListingQuery
    )
    charges = operation("getBillingEvents", "List charges.", bodies.BillingPageBody, *refused, query=BillingQuery)
    prices = operation("getPricing", "List prices.", bodies.PricePageBody, *refused, 404, query=PricingQuery)
    total = operation("estimatePricing", "Estimate a cost.", bodies.EstimateBody, *refused, 404, 413, body=estimate)
    return {
        "/v1/models/requests/by-endpoint": {"get": listing},
        "/v1/models/billing-events": {"get": charges},
        "/v1/models/pricing": {"get": prices},
        "/v1/models/pricing/estimate": {"post": total},
        "/v1/meta": {"get": operation("getMeta", "Get the source addresses of webhooks.", bodies.MetaBody)},
    }


def _server() -> _Object:
    def get(name: str, summary: str, text: str, schema: _Schema) -> _Object:
        answer = _content(text, protocol.CONTENT_JSON, schema)
        return {"get": _operation("server", name, summary, {200: answer}, public=True)}

    return {
        "/health": get("health", "Get the state of the server.", "The engine and its load.", bodies.HealthBody),
        "/openapi.json": get("openapi", "Get this document.", "The OpenAPI document.", {"type": "object"}),
        "/.well-known/jwks.json": get("keys", "Get the webhook keys.", "The public keys.", bodies.KeySetBody),
    }


# --- parts of operations ----------------------------------------------------------------------------------

_REQUEST_ID = {
    "schema": _TEXT,
    "required": True,
    "description": "The request's id; for other calls, an id of the call.",
}
_RESULT_HEADERS: _Object = {
    protocol.BILLABLE_UNITS: {"schema": _TEXT, "description": "Billed megapixels."},
    protocol.ENGINE: {"schema": _TEXT, "description": "The engine that executed the request."},
}
_ERRORS = {
    400: "A parameter is invalid.",
    401: "The key is missing or unknown.",
    403: "The key is locked, or the token does not permit the call.",
    404: "The request, file or endpoint does not exist.",
    413: "The body is too large.",
    422: "The body is invalid, or the Idempotency-Key was used with a different input.",
    429: "The queue exceeds fal_max_queue_length, or the server has no free connection.",
    503: "The server cannot write to its disk.",
}
_EITHER_ERROR = (bodies.RequestErrorBody, bodies.ModelErrorBody)
_ERROR_BODIES: Mapping[int, tuple[_Schema, ...]] = {
    404: (bodies.RequestErrorBody, bodies.NotFoundBody),
    422: _EITHER_ERROR,
}


def _operation(
    tag: str,
    name: str,
    summary: str,
    responses: Mapping[int, _Object],
    *parameters: _Object,
    body: _Schema | None = None,
    public: bool = False,
) -> _Object:
    """Build an operation. `body` is a schema or a complete request body; a public operation needs no key."""
    operation: _Object = {"operationId": name, "tags": [tag], "summary": summary}
    if parameters:
        operation["parameters"] = list(parameters)
    if body is not None:
        whole = isinstance(body, dict) and "content" in body
        json = {"required": True, "content": {protocol.CONTENT_JSON: {"schema": body}}}
        operation["requestBody"] = body if whole else json
    if public:
        operation["security"] = []
    return {**operation, "responses": dict(sorted(responses.items()))}


def _parameter(name: str, place: str, schema: _Object, text: str) -> _Object:
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "description": text}


def _query(model: type[BaseModel]) -> Iterable[_Object]:
    """Convert the fields of a model to query parameters."""
    schema = model.model_json_schema()
    bodies.without_nulls(schema)
    for name, field in schema["properties"].items():
        reference = field.pop("$ref", "").rpartition("/")[2]
        described = {**schema["$defs"][reference], **field} if reference else field
        described.pop("title", None)
        parameter = _parameter(name, "query", described, described.pop("description"))
        if described.get("type") == "array":
            parameter |= {"style": "form", "explode": True}
        yield {**parameter, "required": name in schema.get("required", ())}


def _content(text: str, media_type: str, schema: _Schema) -> _Object:
    return {"description": text, "content": {media_type: {"schema": schema}}}


def _response(*either: _Schema, text: str = "", headers: _Object | None = None) -> _Object:
    """Build a JSON response; without a text, the docstring of the model describes it."""
    schema = either[0] if len(either) == 1 else {"oneOf": list(either)}
    own = {protocol.REQUEST_ID: _REQUEST_ID, **(headers or {})}
    return {**_content(text or str(either[0].__doc__), protocol.CONTENT_JSON, schema), "headers": own}


def _errors(*statuses: int) -> dict[int, _Object]:
    """Build the error responses of the queue and the files."""
    return {one: _response(*_ERROR_BODIES.get(one, (bodies.RequestErrorBody,)), text=_ERRORS[one]) for one in statuses}
