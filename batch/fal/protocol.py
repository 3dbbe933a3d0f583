"""The queue protocol without I/O, for both roles: values in, requests and replies out, and back.

Owns the wire: paths, headers, bodies, status codes. Refuses to know sockets, clocks and storage. The client
edge (`batch.fal.client`) and our server (`batch.server.http.app`) both speak through it, so that they cannot
drift apart. Facts are those of fal's reference as read in autumn 2026; where the real service was seen to
differ from its pages, the comment says so. Pure.
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
# Header names are lower case everywhere inside; HTTP does not care.
REQUEST_ID = "x-fal-request-id"
ERROR_TYPE = "x-fal-error-type"
NEEDS_RETRY = "x-fal-needs-retry"  # newer name; values 1, true, false were seen
RETRYABLE = "x-fal-retryable"  # older name of the same
BILLABLE_UNITS = "x-fal-billable-units"
IDEMPOTENCY_KEY = "idempotency-key"  # ours: honoured by our server, ignored by fal
ENGINE = "x-restyle-engine"  # ours: what executed the request
REDIRECTS = frozenset({301, 302, 303, 307, 308})
"""Statuses that name another address in `Location`."""
START_TIMEOUT = "x-fal-request-start-timeout"
START_TIMEOUT_OLD = "x-fal-request-timeout"  # the only name that released clients send
PRIORITY = "x-fal-queue-priority"
LIFECYCLE = "x-fal-object-lifecycle-preference"
TAGS = "x-fal-tags"


class Malformed(ValueError):
    """The other side sent something that the protocol does not allow. The message says what."""


class RedirectRefused(ValueError):
    """A redirect that is not followed. The message says where it leads, as far as that may be shown."""


class Call(NamedTuple):
    """One HTTP request to make. It carries no key: the edge adds it where the origin is the target's own."""

    method: str
    url: str
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes = b""


class Reply(NamedTuple):
    """One HTTP answer. Its headers are asked for by their names in lower case; aiohttp's own mapping will do."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = MappingProxyType({})


# --- where things are -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Origins:
    """The origins that belong to one target. Only these ever see its key."""

    queue: str
    run: str
    rest: str
    cdn: str
    platform: str
    _prefixes: tuple[str, ...] = field(init=False, repr=False)
    """Of URLs that lie on these origins beyond doubt: the slash ends the host."""

    def __post_init__(self) -> None:
        origins = (self.queue, self.run, self.rest, self.cdn, self.platform)
        object.__setattr__(self, "_prefixes", tuple({origin + "/" for origin in origins}))

    @classmethod
    def of_server(cls, url: str) -> Origins:
        """All roles on one origin, as our own server has them. `url` is `scheme://host[:port][/prefix]`."""
        base = url.rstrip("/")
        return cls(queue=base, run=base + "/run", rest=base, cdn=base, platform=base + "/v1")

    def own(self, url: str) -> bool:
        """Whether `url` lies on one of these origins, that is: whether it may be shown the key."""
        return url.startswith(self._prefixes) or origin_of(url) in {origin_of(own) for own in self._prefixes}


FAL = Origins(
    queue="https://queue.fal.run",
    run="https://fal.run",
    rest="https://rest.fal.ai",
    cdn="https://v3.fal.media",
    platform="https://api.fal.ai/v1",
)

_FAL_DOMAINS = ("fal.run", "fal.ai", "fal.media", "fal.dev", "falrun.com")
"""Everything at or below them is fal's: queue, direct calls, storage, platform, files, tokens, web sockets."""
_IGNORED = re.compile("[\\s\\x00-\\x20\\u034f\\u115f\\u1160\\u180b-\\u180f\\u3164\\ufe00-\\ufe0f]+")
"""Characters that some readers of URLs pass over, besides those of Unicode's category Cf."""
_DECODINGS = 3
"""A host may be percent-encoded more than once."""
_DEFAULT_PORTS = {"http": 80, "https": 443}
_UNAMBIGUOUS = re.compile(r"https?://[^/?#@\\\s\x00-\x20]+([/?#][^\\\s\x00-\x20]*)?", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Whether a host, as a URL names it, is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def origin_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a URL; `("", "", 0)` for one that has no usable origin.

    Nor has one with a user in it, or with a character that some readers of URLs skip or take for a slash: they
    would not agree on whose host it names.
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
    """Whether some reader of URLs may take the host of `url` for one of fal's; the scheme may be missing.

    Judged with caution: in any case and encoding, in the spellings that become the same name (full-width letters,
    ideographic full stops, trailing dots, invisible characters), before and after a user name. A path does not count.
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
    """What a queue path asks for."""

    SUBMIT = "submit"
    STATUS = "status"
    STREAM = "stream"
    RESULT = "result"
    CANCEL = "cancel"


class Address(NamedTuple):
    """A parsed queue path. For everything but SUBMIT `app` may be the owner/alias form or the full id."""

    operation: Operation
    app: AppId
    request_id: RequestId | None


class App(NamedTuple):
    """An app id in its parts."""

    owner: str
    alias: str
    path: str


_PLAIN_ID = re.compile(r"(?=[-_]*[A-Za-z0-9])[A-Za-z0-9_-]{1,200}")
_NAMESPACES = frozenset({"workflows", "comfy"})
_TAILS = {
    "": Operation.RESULT,
    "response": Operation.RESULT,  # older examples end the result URL so
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
    """Split `owner/alias/path`; with `workflows/` or `comfy/` in front the owner has two segments.

    Raises:
        Malformed: fewer than two segments, or an empty one.
    """
    parts = app.strip("/").split("/")
    head = 2 if parts[0] in _NAMESPACES else 1
    if len(parts) <= head or not all(parts):
        raise Malformed(f"{app!r} is not an app id: it needs at least owner/alias")
    return App("/".join(parts[:head]), parts[head], "/".join(parts[head + 1 :]))


def request_path(operation: Operation, app: str, request_id: str) -> str:
    """Path of a read or cancel, in the owner/alias form that the newest reference calls right."""
    owner, alias, _ = split_app(app)
    return f"/{owner}/{alias}/requests/{request_id}{_SUFFIXES[operation]}"


def parse_path(path: str) -> Address | None:
    """Read a queue path: owner/alias or full id, `/response`, trailing slash; None where it is not one.

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


# --- what a submit asks for besides its input ---------------------------------------------------------------

TAG_PAIRS = 10
"""The most tags of one request."""
TAGS_BYTES = 1024
"""The most bytes of all keys and values of one request's tags."""
_TAG_KEY = re.compile(r"[a-z0-9._-]{1,64}")
_TAG_VALUE = re.compile(r"[\x20-\x2b\x2d-\x7e]{0,256}")
_RESERVED_TAGS = "fal."


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a submit asks of the service besides its input. Headers carry it: `option_headers`, `options_in`."""

    start_timeout: float | None = None
    """Seconds from its acceptance: a request that has not started by then ends with 504 and costs nothing."""
    low_priority: bool = False
    """Whether it waits behind all requests of normal priority."""
    file_seconds: float | None = None
    """Lifetime of its result files. None: the service's default."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Labels for bills, as `checked_tag` returns them. An empty value leaves its tag out."""


def option_headers(options: RequestOptions) -> dict[str, str]:
    """The headers of a submit that ask for this. The start timeout goes under both names that fal has documented."""
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
    """What the headers of a submit ask for. Values that make no sense are ignored, as fal ignores them."""
    return RequestOptions(
        start_timeout=_start_timeout_in(headers),
        low_priority=headers.get(PRIORITY, "").strip().lower() == "low",
        file_seconds=lifetime_in(headers),
        tags=_tags_in(headers.get(TAGS, "")),
    )


def checked_tag(key: str, value: str) -> tuple[str, str]:
    """A tag as fal stores it: without spaces around key and value, the key in lower case.

    Raises:
        ValueError: fal would drop it. The message says why.
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
    """Tags of a header. Those that break a rule or exceed a limit are dropped; of equal keys the last one counts."""
    return dict(_first_tags(packed.split(",")))


def _first_tags(parts: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Valid tags within the limits, which count repeated keys too."""
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
    """Seconds; the newer name wins. None where it is absent, no number, or at most a tenth of a second."""
    text = headers.get(START_TIMEOUT) or headers.get(START_TIMEOUT_OLD)
    try:
        seconds = float(text) if text else 0.0
    except ValueError:
        return None
    return seconds if 0.1 < seconds < 1e9 else None


def _decimal(seconds: float) -> str:
    """Seconds with up to three decimals: `30`, `2.5`."""
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
    """The one POST that costs money. `webhook` is called when the request has ended; empty: nobody is.

    Fallback models are switched off under both names that the documentation has used, so that a seed means
    something; a server that knows neither ignores them.
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
    """A read or cancel of an accepted request.

    The URL that the server returned is used where it lies on the target's own origins; a foreign one, or
    one of a server that has since moved to another port, is rebuilt from the request id.
    """
    given = {
        Operation.STATUS: ticket.status_url,
        Operation.RESULT: ticket.response_url,
        Operation.CANCEL: ticket.cancel_url,
    }.get(operation, "")
    on_target = given.startswith(f"{origins.queue}/")  # which no URL with somebody's user name in it does
    url = given if on_target else origins.queue + request_path(operation, app, ticket.request_id)
    if logs and operation in {Operation.STATUS, Operation.STREAM}:
        url += ("&" if "?" in url else "?") + "logs=1"
    return Call(_METHODS.get(operation, "GET"), url)


def redirected(origins: Origins, call: Call, reply: Reply) -> Call:
    """The same read at the address that a 3xx answer names, where that is one of the target's own.

    Raises:
        RedirectRefused: it leads elsewhere, or nowhere. Only scheme, host and port are named: the rest may be secret.
    """
    location = reply.headers.get("location")
    if reply.status not in REDIRECTS or not location:
        raise RedirectRefused(f"HTTP {reply.status} names no address to read instead")
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
    """The ticket in a 2xx answer to a submit.

    Raises:
        Malformed: no JSON object, or no `request_id` in it. Whether the job was accepted is then unknown.
    """
    answer = read_object(reply.body)
    request_id = answer.get("request_id")
    if not is_plain_id(request_id):
        raise Malformed("the answer to the submit has no usable request_id")
    status_url, response_url, cancel_url = (
        _text(answer.get(name)) or "" for name in ("status_url", "response_url", "cancel_url")
    )
    position = _position(answer.get("queue_position"))
    return Ticket(RequestId(request_id), status_url, response_url, cancel_url, position)


# Other services of this shape use these words. fal has QueueState's three only. Letters alone count, in any case.
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
"""Say nothing: JOB_STATE_FAILED is FAILED."""
_DOUBTS = _QUEUED_WORDS | _RUNNING_WORDS | {"no", "not", "progress", "queue", "requested", "without"}
"""A compound with one of these among its parts does not say that the work failed: ERROR_RETRYING."""
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_STATUS_WORD_LIMIT = 100


def read_status(reply: Reply) -> TicketStatus:
    """A status answer (202 or 200), whatever its status word is, and also without one.

    Raises:
        Malformed: no JSON object.
    """
    answer = read_object(reply.body)
    said = answer.get("status")
    word = said[:_STATUS_WORD_LIMIT] if isinstance(said, str) else ""
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
    """The state that a status word stands for, None where it is unknown; and whether it stands for a failure."""
    parts = [part.lower() for part in _PART.findall(word)]
    bare = [part for part in parts if part not in _SUBJECTS]
    meaning = _MEANINGS.get("".join(parts)) or _MEANINGS.get("".join(bare))
    if meaning is not None:
        return meaning
    if _FAILED_WORDS.intersection(bare) and not _DOUBTS.intersection(bare):
        return (QueueState.COMPLETED, True)
    return (None, False)


def _first_text(*values: Json) -> str | None:
    """The first of these that says anything: a text, an object with a message, or fal's list of errors."""
    for value in values:
        said = value
        if isinstance(said, dict):
            said = next((said[name] for name in ("message", "msg", "detail", "error") if said.get(name)), None)
        if isinstance(said, list):
            said = "; ".join(_describe(item) for item in said[:5] if isinstance(item, dict))
        if isinstance(said, str) and said:
            return said[:1000]
    return None


def read_output(body: bytes) -> JsonObject:
    """The bare model output of a 200 result.

    Read leniently, for it is paid for: a byte order mark, bytes that are not UTF-8, `NaN` and unpaired surrogates cost
    only the value that they are in, although JSON forbids them.

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
    """A parsed JSON value in which every text can be encoded as UTF-8."""
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
    """What a cancel may answer. Each is a request, not a fact: a running job may finish all the same."""

    REQUESTED = "CANCELLATION_REQUESTED"
    ALREADY_COMPLETED = "ALREADY_COMPLETED"
    NOT_FOUND = "NOT_FOUND"


def read_cancel(reply: Reply) -> CancelOutcome | None:
    """What became of a cancel; None where the answer says nothing of it (401, 5xx, ...)."""
    if 200 <= reply.status < 300:
        return CancelOutcome.REQUESTED
    return {400: CancelOutcome.ALREADY_COMPLETED, 404: CancelOutcome.NOT_FOUND}.get(reply.status)


class ErrorBody(NamedTuple):
    """What an error answer says, as far as it is fal's own shape."""

    type: str | None
    """Machine word: `error_type`, else the type of the first model error, else the header."""
    message: str
    is_fal: bool
    """Whether the body has one of fal's shapes: a proxy's HTML page says nothing about a job."""
    needs_retry: bool | None
    """What the service says about another try; None where it says nothing."""


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
    """Whether what an error answer refuses is the callback that was asked for (`fal_webhook`); never raises."""
    return "fal_webhook" in _place_of(reply)


def names_idempotency_key(reply: Reply) -> bool:
    """Whether what an error answer refuses is the `Idempotency-Key`, by its type or by its `loc`; never raises."""
    words = (error_body_of(reply).type, *_place_of(reply))
    return any(isinstance(word, str) and "idempotency" in word.lower() for word in words)


def _place_of(reply: Reply) -> list[Json]:
    """The `loc` of the first model error; empty where there is none."""
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
    """HTTP 200 with all eight fields; `base` is the scheme and host that the caller used."""
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
    """HTTP 202 while IN_QUEUE or IN_PROGRESS. Clients subscript `queue_position` and `logs`: always there."""
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
    """HTTP 200: the work ended. A failure is COMPLETED too, with `error` (and `error_type`)."""
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
    """202, 400 or 404 with the status word."""
    status = {CancelOutcome.REQUESTED: 202, CancelOutcome.ALREADY_COMPLETED: 400}.get(outcome, 404)
    return json_reply(status, {"status": outcome}, request_id)


def request_error_reply(
    status: int, error_type: str | None, detail: str, request_id: RequestId | None = None, **headers: str
) -> Reply:
    """An infrastructure error: `{"detail": text, "error_type": word}` and the header of the same name."""
    body: JsonObject = {"detail": detail}
    if error_type is not None:
        body["error_type"] = error_type
        headers = {ERROR_TYPE: error_type, **headers}
    return json_reply(status, body, request_id, headers)


def model_error_reply(
    status: int, errors: list[JsonObject], request_id: RequestId | None = None, **headers: str
) -> Reply:
    """A model error: `{"detail": [{loc, msg, type, url, ctx, input}, ...]}`."""
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
    """Any JSON answer, with the request id that clients look for."""
    # Python's official client retries errors that lack a request id as "ingress errors": always set one.
    own = {"content-type": CONTENT_JSON, REQUEST_ID: request_id or ""}
    return Reply(status, orjson.dumps(body), own | dict(headers or {}))


def lifetime_in(headers: Mapping[str, str]) -> float | None:
    """Seconds that files shall live, as the lifecycle header wishes; None where nothing, or no number, is said."""
    text = headers.get(LIFECYCLE) or headers.get("x-fal-object-lifecycle")
    if not text:
        return None
    try:
        seconds = read_object(text.encode("utf-8", "replace")).get("expiration_duration_seconds")
    except Malformed:
        return None
    return float(seconds) if _number(seconds) and 0 < seconds < 1e10 else None


# --- reading foreign JSON ---------------------------------------------------------------------------------


VALUES_LIMIT = 100_000
"""In one answer. Each takes up to a hundred bytes of memory for its two on the wire; a result has a few dozen."""


def read_object(body: bytes, *, values: int = VALUES_LIMIT) -> JsonObject:
    """A body that has to be a JSON object of at most so many values (commas and brackets inside texts count too).

    Raises:
        Malformed: it is none.
    """
    if _too_many_values(body, values):
        raise Malformed(f"more than {values} values")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Malformed(f"not JSON: {body[:80]!r}") from error
    if not isinstance(value, dict):
        raise Malformed(f"a JSON object was expected, not {body[:80]!r}")
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
    """A request id becomes part of URLs that we build: up to 200 letters, digits, dashes and underscores only."""
    return isinstance(text, str) and _PLAIN_ID.fullmatch(text) is not None
