"""The queue protocol without I/O, for client and server: build and parse requests and replies. Pure.

Contains paths, headers, bodies and status codes, but no sockets, clocks or storage. The client edge
(`batch.fal.client`) and our server (`batch.server.http.app`) share it, so they cannot diverge. Follows fal's reference
as read in autumn 2026; comments mark where the real service was seen to differ.
"""

from __future__ import annotations

import ipaddress
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard
from urllib.parse import quote, unquote, urljoin, urlsplit

import orjson

from batch.types import AppId, Json, JsonObject, QueueState, RequestId, Ticket, TicketStatus

__all__ = [
    "BILLABLE_UNITS",
    "CONTENT_JSON",
    "ENGINE",
    "ERROR_TYPE",
    "FAL",
    "IDEMPOTENCY_KEY",
    "NEEDS_RETRY",
    "REDIRECTS",
    "REQUEST_ID",
    "RETRYABLE",
    "TAGS_BYTES",
    "TAG_PAIRS",
    "Address",
    "Call",
    "CancelOutcome",
    "Malformed",
    "Operation",
    "Origins",
    "RedirectRefused",
    "Reply",
    "RequestOptions",
    "accepted_reply",
    "cancel_reply",
    "checked_tag",
    "completed_reply",
    "error_body_of",
    "is_loopback",
    "is_plain_id",
    "json_reply",
    "lifetime_in",
    "model_error_reply",
    "names_fal",
    "names_idempotency_key",
    "names_webhook",
    "option_headers",
    "options_in",
    "origin_of",
    "parse_path",
    "progress_reply",
    "read_cancel",
    "read_object",
    "read_output",
    "read_status",
    "read_ticket",
    "redirected",
    "request_error_reply",
    "request_path",
    "split_app",
    "submit_call",
    "ticket_call",
]

CONTENT_JSON = "application/json"
# Header names are lower case internally; HTTP ignores case.
REQUEST_ID = "x-fal-request-id"
ERROR_TYPE = "x-fal-error-type"
NEEDS_RETRY = "x-fal-needs-retry"  # newer name; values 1, true, false were seen
RETRYABLE = "x-fal-retryable"  # older name of NEEDS_RETRY
BILLABLE_UNITS = "x-fal-billable-units"
IDEMPOTENCY_KEY = "idempotency-key"  # ours: honoured by our server, ignored by fal
ENGINE = "x-restyle-engine"  # ours: the engine that executed the request
REDIRECTS = frozenset({301, 302, 303, 307, 308})
"""Statuses with a new address in `Location`."""
START_TIMEOUT = "x-fal-request-start-timeout"
START_TIMEOUT_OLD = "x-fal-request-timeout"  # the only name that released clients send
PRIORITY = "x-fal-queue-priority"
LIFECYCLE = "x-fal-object-lifecycle-preference"
TAGS = "x-fal-tags"


class Malformed(ValueError):
    """The other side violated the protocol. The message says how."""


class RedirectRefused(ValueError):
    """A redirect that is not followed. The message names its target as far as it is safe to show."""


class Call(NamedTuple):
    """One HTTP request to make, without a key: the edge adds it if the origin belongs to the target."""

    method: str
    url: str
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes = b""


class Reply(NamedTuple):
    """One HTTP answer. Header look-ups use lower case; aiohttp's mapping works too."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = MappingProxyType({})


# --- origins ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Origins:
    """The origins that belong to one target. Only these receive its key."""

    queue: str
    run: str
    rest: str
    cdn: str
    platform: str
    _prefixes: tuple[str, ...] = field(init=False, repr=False)
    """Prefixes of URLs that certainly belong to these origins: the slash ends the host."""

    def __post_init__(self) -> None:
        origins = (self.queue, self.run, self.rest, self.cdn, self.platform)
        object.__setattr__(self, "_prefixes", tuple({origin + "/" for origin in origins}))

    @classmethod
    def of_server(cls, url: str) -> Origins:
        """Return the origins of our own server, with all roles on `url`: `scheme://host[:port][/prefix]`."""
        base = url.rstrip("/")
        return cls(queue=base, run=base + "/run", rest=base, cdn=base, platform=base + "/v1")

    def own(self, url: str) -> bool:
        """Return whether `url` belongs to one of these origins, so that it may receive the key."""
        return url.startswith(self._prefixes) or origin_of(url) in {origin_of(own) for own in self._prefixes}


FAL = Origins(
    queue="https://queue.fal.run",
    run="https://fal.run",
    rest="https://rest.fal.ai",
    cdn="https://v3.fal.media",
    platform="https://api.fal.ai/v1",
)

_FAL_DOMAINS = ("fal.run", "fal.ai", "fal.media", "fal.dev", "falrun.com")
"""These domains and their subdomains belong to fal: queue, direct calls, storage, platform, files, tokens, web
sockets."""
_IGNORED = re.compile("[\\s\\x00-\\x20\\u034f\\u115f\\u1160\\u180b-\\u180f\\u3164\\ufe00-\\ufe0f]+")
"""Characters that some URL parsers skip, in addition to Unicode category Cf."""
_DECODINGS = 3
"""A host may be percent-encoded several times."""
_DEFAULT_PORTS = {"http": 80, "https": 443}
_UNAMBIGUOUS = re.compile(r"https?://[^/?#@\\\s\x00-\x20]+([/?#][^\\\s\x00-\x20]*)?", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Return whether a host, as it appears in a URL, is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def origin_of(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port of a URL; `("", "", 0)` if it has no usable origin.

    A URL with a user name, or with a character that some parsers skip or read as a slash, has no usable origin either:
    parsers would disagree about its host.
    """
    if not _UNAMBIGUOUS.fullmatch(url):
        return ("", "", 0)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return ("", "", 0)
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        return ("", "", 0)
    return (parts.scheme, parts.hostname, port or _DEFAULT_PORTS[parts.scheme])


def names_fal(url: str) -> bool:
    """Return whether any URL parser might read the host of `url` as one of fal's; the scheme may be missing.

    Strict on purpose: considers every case and encoding, spellings that normalize to the same name (full-width letters,
    ideographic full stops, trailing dots, invisible characters), and text before and after a user name. The path is
    ignored.
    """
    spellings = [url]
    for _ in range(_DECODINGS):
        spellings.append(unquote(spellings[-1]))
    return any(map(_names_fal, spellings))


def _names_fal(url: str) -> bool:
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", url).casefold()).replace("\u3002", ".")
    plain = "".join(c for c in _IGNORED.sub("", plain) if unicodedata.category(c) != "Cf")
    rest = re.sub(r"^(https?:[/\\]*|([a-z][a-z0-9+.-]*:)?[/\\]+)", "", plain)
    authorities = (re.split(r"[/?#]", rest, maxsplit=1)[0], re.split(r"[/?#\\]", rest, maxsplit=1)[0])
    hosts = {part for authority in authorities for part in re.split(r"[@\\]", authority)}
    return any(_is_fal(re.sub(r":\d*$", "", host).strip(".")) for host in hosts)


def _is_fal(host: str) -> bool:
    return host.endswith(tuple(f".{domain}" for domain in _FAL_DOMAINS)) or host in _FAL_DOMAINS


# --- paths ------------------------------------------------------------------------------------------------


class Operation(StrEnum):
    """The operation of a queue path."""

    SUBMIT = "submit"
    STATUS = "status"
    STREAM = "stream"
    RESULT = "result"
    CANCEL = "cancel"


class Address(NamedTuple):
    """A parsed queue path. Except for SUBMIT, `app` may be the owner/alias form or the full id."""

    operation: Operation
    app: AppId
    request_id: RequestId | None


class App(NamedTuple):
    """The parts of an app id."""

    owner: str
    alias: str
    path: str


_PLAIN_ID = re.compile(r"(?=[-_]*[A-Za-z0-9])[A-Za-z0-9_-]{1,200}")
_NAMESPACES = frozenset({"workflows", "comfy"})
_TAILS = {
    "": Operation.RESULT,
    "response": Operation.RESULT,  # older examples use this suffix
    "status": Operation.STATUS,
    "status/stream": Operation.STREAM,
    "cancel": Operation.CANCEL,
}
_METHODS = {Operation.CANCEL: "PUT", Operation.SUBMIT: "POST"}
_SUFFIXES = {
    Operation.RESULT: "",
    Operation.STATUS: "/status",
    Operation.STREAM: "/status/stream",
    Operation.CANCEL: "/cancel",
}


@lru_cache(maxsize=256)
def split_app(app: str) -> App:
    """Split `owner/alias/path`; after `workflows/` or `comfy/` the owner has two segments.

    Raises:
        Malformed: fewer than two segments, or an empty one.
    """
    parts = app.strip("/").split("/")
    head = 2 if parts[0] in _NAMESPACES else 1
    if len(parts) <= head or not all(parts):
        raise Malformed(f"invalid app id {app!r}: it needs at least owner/alias")
    return App("/".join(parts[:head]), parts[head], "/".join(parts[head + 1 :]))


def request_path(operation: Operation, app: str, request_id: str) -> str:
    """Return the path of a read or cancel, in the owner/alias form that fal's newest reference uses."""
    owner, alias, _ = split_app(app)
    return f"/{owner}/{alias}/requests/{request_id}{_SUFFIXES[operation]}"


def parse_path(path: str) -> Address | None:
    """Parse a queue path: owner/alias or full id, `/response`, trailing slash; None if it is not a queue path.

    A path without `/requests/` is a submit to the app that it names.
    """
    clean = path.strip("/")
    app, found, rest = clean.partition("/requests/")
    try:
        split_app(app)
    except Malformed:
        return None
    if not found:
        return Address(Operation.SUBMIT, AppId(app), None)
    request_id, _, tail = rest.partition("/")
    operation = _TAILS.get(tail)
    if operation is None or not request_id:
        return None
    return Address(operation, AppId(app), RequestId(request_id))


# --- options of a submit ------------------------------------------------------------------------------------

TAG_PAIRS = 10
"""Maximum tags of one request."""
TAGS_BYTES = 1024
"""Maximum total bytes of the keys and values of one request's tags."""
_TAG_KEY = re.compile(r"[a-z0-9._-]{1,64}")
_TAG_VALUE = re.compile(r"[\x20-\x2b\x2d-\x7e]{0,256}")
_RESERVED_TAGS = "fal."


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """Options of a submit besides its input. They are sent as headers: `option_headers`, `options_in`."""

    start_timeout: float | None = None
    """Seconds from acceptance: a request that has not started by then ends with 504 and costs nothing."""
    low_priority: bool = False
    """Whether the request waits behind all requests of normal priority."""
    file_seconds: float | None = None
    """Lifetime of the result files. None: the service's default."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Labels for billing, as `checked_tag` returns them. A tag with an empty value is omitted."""


def option_headers(options: RequestOptions) -> dict[str, str]:
    """Return the headers for these options. The start timeout is sent under both names that fal has documented."""
    headers = {PRIORITY: "low" if options.low_priority else "normal"}
    if options.start_timeout is not None:
        headers[START_TIMEOUT] = headers[START_TIMEOUT_OLD] = _decimal(options.start_timeout)
    if options.file_seconds is not None:
        wish = {"expiration_duration_seconds": math.ceil(options.file_seconds)}
        headers[LIFECYCLE] = orjson.dumps(wish).decode()
    if tags := ",".join(f"{key}={value}" for key, value in options.tags.items() if value):
        headers[TAGS] = tags
    return headers


def options_in(headers: Mapping[str, str]) -> RequestOptions:
    """Parse the options in the headers of a submit. Invalid values are ignored, as fal ignores them."""
    return RequestOptions(
        start_timeout=_start_timeout_in(headers),
        low_priority=headers.get(PRIORITY, "").strip().lower() == "low",
        file_seconds=lifetime_in(headers),
        tags=_tags_in(headers.get(TAGS, "")),
    )


def checked_tag(key: str, value: str) -> tuple[str, str]:
    """Return a tag as fal stores it: key and value stripped, the key in lower case.

    Raises:
        ValueError: fal would drop the tag. The message says why.
    """
    name, text = key.strip().lower(), value.strip()
    if not _TAG_KEY.fullmatch(name):
        raise ValueError(f"invalid tag key {key!r}: use 1 to 64 characters of a-z, 0-9, '.', '_' and '-'")
    if name.startswith(_RESERVED_TAGS):
        raise ValueError(f"invalid tag key {key!r}: keys that start with 'fal.' are reserved")
    if not _TAG_VALUE.fullmatch(text):
        raise ValueError(
            f"invalid value {value!r} of tag {name!r}: use up to 256 printable ASCII characters, without commas"
        )
    return name, text


def _tags_in(packed: str) -> dict[str, str]:
    """Parse the tags of a header. Invalid or excess tags are dropped; the last of equal keys counts."""
    return dict(_first_tags(packed.split(",")))


def _first_tags(parts: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Yield the valid tags within the limits, which include repeated keys."""
    pairs = size = 0
    for part in parts:
        name, _, text = part.partition("=")
        try:
            key, value = checked_tag(name, text)
        except ValueError:
            continue
        pairs, size = pairs + 1, size + len(key) + len(value)
        if pairs > TAG_PAIRS or size > TAGS_BYTES:
            return
        yield key, value


def _start_timeout_in(headers: Mapping[str, str]) -> float | None:
    """Return the seconds; the newer name wins. None if absent, not a number, or at most a tenth of a second."""
    text = headers.get(START_TIMEOUT) or headers.get(START_TIMEOUT_OLD)
    try:
        seconds = float(text) if text else 0.0
    except ValueError:
        return None
    return seconds if 0.1 < seconds < 1e9 else None


def _decimal(seconds: float) -> str:
    """Format seconds with up to three decimals: `30`, `2.5`."""
    return f"{seconds:.3f}".rstrip("0").rstrip(".")


# --- client role ------------------------------------------------------------------------------------------


def submit_call(
    origins: Origins,
    app: AppId,
    body: bytes,
    idempotency_key: str,
    webhook: str = "",
    options: RequestOptions | None = None,
) -> Call:
    """Return the one POST that costs money. `webhook` is called when the request has ended; empty: no callback.

    Fallback models would make a seed meaningless, so they are disabled under both documented names; a server that knows
    neither ignores them.
    """
    return Call(
        "POST",
        f"{origins.queue}/{app}" + (f"?fal_webhook={quote(webhook, safe='')}" if webhook else ""),
        {
            "content-type": CONTENT_JSON,
            IDEMPOTENCY_KEY: idempotency_key,
            "x-app-fal-disable-fallback": "true",
            "x-fal-disable-fallbacks": "true",
            **option_headers(options or RequestOptions()),
        },
        body,
    )


def ticket_call(origins: Origins, app: AppId, ticket: Ticket, operation: Operation, *, logs: bool = False) -> Call:
    """Return a read or cancel of an accepted request.

    Uses the URL that the server returned if it belongs to the target's own origins. Otherwise (a foreign origin, or a
    server that has moved to another port) it builds the URL from the request id.
    """
    given = {
        Operation.STATUS: ticket.status_url,
        Operation.RESULT: ticket.response_url,
        Operation.CANCEL: ticket.cancel_url,
    }.get(operation, "")
    on_target = given.startswith(f"{origins.queue}/")  # false for any URL with a user name
    url = given if on_target else origins.queue + request_path(operation, app, ticket.request_id)
    if logs and operation in {Operation.STATUS, Operation.STREAM}:
        url += ("&" if "?" in url else "?") + "logs=1"
    return Call(_METHODS.get(operation, "GET"), url)


def redirected(origins: Origins, call: Call, reply: Reply) -> Call:
    """Return the same read at the address of a redirect, if it belongs to the target.

    Raises:
        RedirectRefused: it does not. The message has only scheme, host and port: the rest may be secret.
    """
    location = reply.headers.get("location")
    if reply.status not in REDIRECTS or not location:
        raise RedirectRefused(f"HTTP {reply.status} without a usable Location")
    try:
        url = urljoin(call.url, location)
    except ValueError:
        url = ""
    scheme, host, port = origin_of(url)
    if not host:
        raise RedirectRefused(f"HTTP {reply.status} redirects to an address that is not valid, so it is not followed")
    if not origins.own(url):
        where = f"{scheme}://{host[:100]}:{port}".encode("ascii", "backslashreplace").decode()
        raise RedirectRefused(
            f"HTTP {reply.status} redirects to {where}, which is not the target's own address, so it is not followed;"
            " check the address of the target"
        )
    return Call("GET", url)


def read_ticket(reply: Reply) -> Ticket:
    """Return the ticket in a 2xx answer to a submit.

    Raises:
        Malformed: not a JSON object, or without a usable `request_id`. Then it is unknown whether the job was accepted.
    """
    answer = read_object(reply.body)
    request_id = answer.get("request_id")
    if not is_plain_id(request_id):
        raise Malformed("the submit response has no usable request_id")
    status_url, response_url, cancel_url = (
        _text(answer.get(name)) or "" for name in ("status_url", "response_url", "cancel_url")
    )
    position = _position(answer.get("queue_position"))
    return Ticket(RequestId(request_id), status_url, response_url, cancel_url, position)


# Status words of similar services. fal uses only the three of QueueState. Case and non-letters are ignored.
_QUEUED_WORDS = frozenset({
    "created", "enqueued", "inqueue", "notstarted", "pending", "queued", "received", "scheduled", "submitted",
    "waiting",
})  # fmt: skip
_RUNNING_WORDS = frozenset({
    "active", "booting", "canceling", "cancelling", "executing", "generating", "initializing", "inprogress", "loading",
    "preparing", "processing", "rendering", "retry", "retrying", "running", "started", "starting", "working",
})  # fmt: skip
_ENDED_WORDS = frozenset({
    "complete", "completed", "done", "finished", "ok", "succeeded", "success", "successful",
})  # fmt: skip
_FAILED_WORDS = frozenset({
    "aborted", "blocked", "canceled", "cancelled", "crashed", "dead", "declined", "deleted", "denied", "error",
    "errored", "errors", "exception", "expired", "fail", "failed", "failure", "interrupted", "invalid", "killed",
    "moderated", "refused", "rejected", "revoked", "stopped", "terminated", "timedout", "timeout",
})  # fmt: skip
_MEANINGS = {
    **dict.fromkeys(_QUEUED_WORDS, (QueueState.IN_QUEUE, False)),
    **dict.fromkeys(_RUNNING_WORDS, (QueueState.IN_PROGRESS, False)),
    **dict.fromkeys(_ENDED_WORDS, (QueueState.COMPLETED, False)),
    **dict.fromkeys(_FAILED_WORDS, (QueueState.COMPLETED, True)),
}
_SUBJECTS = frozenset({"execution", "job", "prediction", "request", "run", "state", "status", "task"})
"""Parts without meaning: JOB_STATE_FAILED is FAILED."""
_DOUBTS = _QUEUED_WORDS | _RUNNING_WORDS | {"no", "not", "progress", "queue", "requested", "without"}
"""A compound word with one of these parts is not a failure: ERROR_RETRYING."""
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_STATUS_WORD_LIMIT = 100


def read_status(reply: Reply) -> TicketStatus:
    """Parse a status answer (202 or 200) with any status word, or without one.

    Raises:
        Malformed: not a JSON object.
    """
    answer = read_object(reply.body)
    reported = answer.get("status")
    word = reported[:_STATUS_WORD_LIMIT] if isinstance(reported, str) else ""
    state, failed = _meaning_of(word)
    metrics, logs = answer.get("metrics"), answer.get("logs")
    inference = metrics.get("inference_time") if isinstance(metrics, dict) else None
    return TicketStatus(
        state,
        _position(answer.get("queue_position")),
        float(inference) if _number(inference) else None,
        _first_text(answer.get("error"), answer.get("detail")),
        _text(answer.get("error_type")),
        tuple(line for line in logs if isinstance(line, dict)) if isinstance(logs, list) else (),
        word,
        failed,
    )


@lru_cache(maxsize=256)
def _meaning_of(word: str) -> tuple[QueueState | None, bool]:
    """Return the state that a status word means, None if unknown; and whether it means a failure."""
    parts = [part.lower() for part in _PART.findall(word)]
    bare = [part for part in parts if part not in _SUBJECTS]
    meaning = _MEANINGS.get("".join(parts)) or _MEANINGS.get("".join(bare))
    if meaning is not None:
        return meaning
    if _FAILED_WORDS.intersection(bare) and not _DOUBTS.intersection(bare):
        return (QueueState.COMPLETED, True)
    return (None, False)


def _first_text(*values: Json) -> str | None:
    """Return the first value with a text: a text, an object with a message, or fal's list of errors."""
    for value in values:
        reported = value
        if isinstance(reported, dict):
            reported = next(
                (reported[name] for name in ("message", "msg", "detail", "error") if reported.get(name)), None
            )
        if isinstance(reported, list):
            reported = "; ".join(_describe(item) for item in reported[:5] if isinstance(item, dict))
        if isinstance(reported, str) and reported:
            return reported[:1000]
    return None


def read_output(body: bytes) -> JsonObject:
    """Parse the bare model output of a 200 result.

    Lenient, because the result is paid for: a byte order mark, bytes that are not UTF-8, `NaN` and unpaired surrogates
    affect only their own value, although JSON forbids them.

    Raises:
        Malformed: not a JSON object.
    """
    try:
        return read_object(body)
    except Malformed as strict:
        if _too_many_values(body, VALUES_LIMIT):
            raise
        try:
            value = json.loads(body.decode("utf-8-sig", "replace"), parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            raise strict from None
        if not isinstance(value, dict):
            raise
        output: JsonObject = _storable(value)
        return output


def _storable(value: Any) -> Any:
    """Return a parsed JSON value in which every text can be encoded as UTF-8."""
    match value:
        case str():
            return value.encode("utf-8", "replace").decode("utf-8")
        case dict():
            return {_storable(name): _storable(item) for name, item in value.items()}
        case list():
            return [_storable(item) for item in value]
        case _:
            return value


class CancelOutcome(StrEnum):
    """Answers to a cancel. None of them is final: a running job may still finish."""

    REQUESTED = "CANCELLATION_REQUESTED"
    ALREADY_COMPLETED = "ALREADY_COMPLETED"
    NOT_FOUND = "NOT_FOUND"


def read_cancel(reply: Reply) -> CancelOutcome | None:
    """Return the outcome of a cancel; None if the answer is inconclusive (401, 5xx, ...)."""
    if 200 <= reply.status < 300:
        return CancelOutcome.REQUESTED
    return {400: CancelOutcome.ALREADY_COMPLETED, 404: CancelOutcome.NOT_FOUND}.get(reply.status)


class ErrorBody(NamedTuple):
    """The parts of an error answer, as far as it has fal's own shape."""

    type: str | None
    """Machine word: `error_type`, else the type of the first model error, else the header."""
    message: str
    is_fal: bool
    """Whether the body has one of fal's shapes; a proxy's HTML page says nothing about a job."""
    needs_retry: bool | None
    """Whether the service recommends a retry; None if it does not say."""


def error_body_of(reply: Reply) -> ErrorBody:
    """Read an error answer of any kind; never raises."""
    header = reply.headers.get(ERROR_TYPE)
    flag = reply.headers.get(NEEDS_RETRY, reply.headers.get(RETRYABLE))
    needs_retry = None if flag is None else flag.strip().lower() in {"1", "true", "yes"}
    try:
        answer = read_object(reply.body)
    except Malformed:
        text = reply.body[:200].decode("utf-8", "replace").strip()
        return ErrorBody(header, text, header is not None, needs_retry)
    detail, error_type = answer.get("detail"), _text(answer.get("error_type"))
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):
        first = detail[0]
        message = "; ".join(_describe(item) for item in detail[:5] if isinstance(item, dict))
        return ErrorBody(error_type or _text(first.get("type")) or header, message, True, needs_retry)
    if isinstance(detail, str):
        return ErrorBody(error_type or header, detail[:1000], True, needs_retry)
    if isinstance(answer.get("status"), str):  # {"status": "NOT_FOUND"}
        return ErrorBody(
            error_type or header or str(answer["status"]).lower(), str(answer["status"]), True, needs_retry
        )
    text = reply.body[:200].decode("utf-8", "replace")
    return ErrorBody(error_type or header, text, bool(error_type or header), needs_retry)


def names_webhook(reply: Reply) -> bool:
    """Return whether an error answer refuses the requested callback (`fal_webhook`); never raises."""
    return "fal_webhook" in _place_of(reply)


def names_idempotency_key(reply: Reply) -> bool:
    """Return whether an error answer refuses the `Idempotency-Key`, by its type or its `loc`; never raises."""
    words = (error_body_of(reply).type, *_place_of(reply))
    return any(isinstance(word, str) and "idempotency" in word.lower() for word in words)


def _place_of(reply: Reply) -> list[Json]:
    """Return the `loc` of the first model error; empty without one."""
    try:
        detail = read_object(reply.body).get("detail")
    except Malformed:
        return []
    first = detail[0] if isinstance(detail, list) and detail else None
    where = first.get("loc") if isinstance(first, dict) else None
    return where if isinstance(where, list) else []


def _describe(item: JsonObject) -> str:
    where = item.get("loc")
    place = ".".join(str(part) for part in where if part != "body") if isinstance(where, list) else ""
    message = str(item.get("msg", item.get("type", "")))[:500]
    return f"{place}: {message}" if place else message


# --- server role ------------------------------------------------------------------------------------------


def accepted_reply(base: str, app: AppId, request_id: RequestId, position: int) -> Reply:
    """Return HTTP 200 with all eight fields; `base` is the scheme and host that the caller used."""
    return json_reply(
        200,
        {
            "status": QueueState.IN_QUEUE,
            **_request_urls(base, app, request_id),
            "logs": None,
            "metrics": {},
            "queue_position": position,
        },
        request_id,
    )


def progress_reply(
    base: str,
    app: AppId,
    request_id: RequestId,
    state: QueueState,
    *,
    position: int | None = None,
    logs: list[JsonObject] | None = None,
) -> Reply:
    """Return HTTP 202 for IN_QUEUE or IN_PROGRESS. Always has `queue_position` or `logs`, which clients subscript."""
    body: JsonObject = {"status": state, **_request_urls(base, app, request_id)}
    if state is QueueState.IN_QUEUE:
        body["queue_position"] = position or 0
    else:
        body["logs"] = list(logs or [])
    return json_reply(202, body, request_id)


def completed_reply(
    base: str,
    app: AppId,
    request_id: RequestId,
    *,
    inference_time: float | None,
    error: str | None = None,
    error_type: str | None = None,
    logs: list[JsonObject] | None = None,
) -> Reply:
    """Return HTTP 200: the work ended. A failure is COMPLETED too, with `error` (and `error_type`)."""
    body: JsonObject = {
        "status": QueueState.COMPLETED,
        **_request_urls(base, app, request_id),
        "logs": list(logs or []),
        "metrics": {} if inference_time is None else {"inference_time": inference_time},
    }
    if error is not None:
        body["error"] = error
    if error_type is not None:
        body["error_type"] = error_type
    return json_reply(200, body, request_id)


def cancel_reply(outcome: CancelOutcome, request_id: RequestId) -> Reply:
    """Return 202, 400 or 404 with the status word."""
    status = {CancelOutcome.REQUESTED: 202, CancelOutcome.ALREADY_COMPLETED: 400}.get(outcome, 404)
    return json_reply(status, {"status": outcome}, request_id)


def request_error_reply(
    status: int, error_type: str | None, detail: str, request_id: RequestId | None = None, **headers: str
) -> Reply:
    """Return an infrastructure error: `{"detail": text, "error_type": word}` and the header of the same name."""
    body: JsonObject = {"detail": detail}
    if error_type is not None:
        body["error_type"] = error_type
        headers = {ERROR_TYPE: error_type, **headers}
    return json_reply(status, body, request_id, headers)


def model_error_reply(
    status: int, errors: list[JsonObject], request_id: RequestId | None = None, **headers: str
) -> Reply:
    """Return a model error: `{"detail": [{loc, msg, type, url, ctx, input}, ...]}`."""
    return json_reply(status, {"detail": list(errors)}, request_id, headers)


def _request_urls(base: str, app: AppId, request_id: RequestId) -> JsonObject:
    def url(operation: Operation) -> str:
        return base + request_path(operation, app, request_id)

    return {
        "request_id": request_id,
        "response_url": url(Operation.RESULT),
        "status_url": url(Operation.STATUS),
        "cancel_url": url(Operation.CANCEL),
    }


def json_reply(
    status: int, body: JsonObject, request_id: RequestId | None = None, headers: Mapping[str, str] | None = None
) -> Reply:
    """Return a JSON answer with the request id that clients look for."""
    # Python's official client retries errors without a request id as "ingress errors", so it is always set.
    own = {"content-type": CONTENT_JSON, REQUEST_ID: request_id or ""}
    return Reply(status, orjson.dumps(body), own | dict(headers or {}))


def lifetime_in(headers: Mapping[str, str]) -> float | None:
    """Return the requested lifetime of files in seconds; None if missing or not a number."""
    text = headers.get(LIFECYCLE) or headers.get("x-fal-object-lifecycle")
    if not text:
        return None
    try:
        seconds = read_object(text.encode("utf-8", "replace")).get("expiration_duration_seconds")
    except Malformed:
        return None
    return float(seconds) if _number(seconds) and 0 < seconds < 1e10 else None


# --- parsing JSON -----------------------------------------------------------------------------------------


VALUES_LIMIT = 100_000
"""Maximum values in one answer. Two bytes on the wire can take a hundred bytes of memory; a result has a few dozen."""


def read_object(body: bytes, *, values: int = VALUES_LIMIT) -> JsonObject:
    """Parse a JSON object of at most `values` values (commas and brackets inside texts count too).

    Raises:
        Malformed: it is not one.
    """
    if _too_many_values(body, values):
        raise Malformed(f"more than {values} values")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Malformed(f"not JSON: {body[:80]!r}") from error
    if not isinstance(value, dict):
        raise Malformed(f"expected a JSON object, not {body[:80]!r}")
    return value


def _too_many_values(body: bytes, values: int) -> bool:
    return len(body) > values and sum(map(body.count, (b",", b"[", b"{"))) > values


def _position(value: Json) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _text(value: Json) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: Json) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_plain_id(text: Json) -> TypeGuard[str]:
    """Return whether a text may be used as a request id in URLs: up to 200 letters, digits, dashes and underscores."""
    return isinstance(text, str) and _PLAIN_ID.fullmatch(text) is not None
