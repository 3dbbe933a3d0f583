"""The client edge: one exchange with a target over aiohttp, without retries or decisions.

Contains the HTTP session, the key, timeouts and size limits, and the only translation of aiohttp's exceptions into
`Trouble`. `batch.run.verdicts` decides what a trouble means; `batch.fal.protocol` parses the bytes.

The key is added to a request only if its URL belongs to the target's own origins. A read of a status or a result
follows redirects among these origins. A submit follows none, and no other request follows one with the key.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import io
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Self
from urllib.parse import urljoin

import aiohttp
import orjson
from pydantic import SecretStr

from batch.fal import platform, protocol
from batch.fal.answer import has_images, says_no_images
from batch.fal.errors import CallFailed, Trouble
from batch.fal.http import Http, Proxies, within
from batch.fal.protocol import (
    Call,
    CancelOutcome,
    Malformed,
    Operation,
    Origins,
    RedirectRefused,
    Reply,
    RequestOptions,
)
from batch.system.descriptors import CONNECTIONS, lacks_descriptor
from batch.types import Answer, AppId, Attempt, Ticket, TicketStatus

__all__ = ["FalClient", "trouble_of"]

READ_TIMEOUT = 60.0
"""Seconds without a byte after which a transfer fails."""
EXCHANGE_SECONDS = 120.0
"""From the first byte sent to the last received: a server that sends a byte a minute never hits a read timeout."""
TRANSFER_SECONDS = 900.0
"""The same for an exchange with an image: 64 MiB at 75 kB/s."""
ANSWER_LIMIT_BYTES = 2**20
"""Limit for an answer to a submit, status or cancel. Usually a few hundred bytes plus several hundred log lines."""
JSON_LIMIT_BYTES = 16 * 2**20
"""Limit for a page of a listing, and for a result where the limit for an image file is lower."""
ERROR_LIMIT_BYTES = 64 * 2**10
"""Kept bytes of an error body. The model's own errors quote the whole input, image included."""
LARGE_BODY_BYTES = 2**20
LARGE_BODIES_AT_ONCE = 8
"""Concurrent reads of larger bodies, so that memory does not grow with the requests in flight."""
HUGE_BODIES_AT_ONCE = 2
"""The same for bodies of more than `JSON_LIMIT_BYTES`."""
REDIRECTS = 5


class FalClient:
    """Implements `batch.run.interfaces.Service` for one target."""

    def __init__(
        self,
        origins: Origins,
        app: AppId,
        key: SecretStr | None = None,
        *,
        connections: int = CONNECTIONS,
        download_limit_bytes: int = 64 * 2**20,
        json_limit_bytes: int = JSON_LIMIT_BYTES,
        user_agent: str = "restyle",
        options: RequestOptions | None = None,
    ) -> None:
        """Create the client; nothing is opened yet.

        Args:
            origins: origins of the target.
            app: the endpoint's id.
            key: API key; None: requests are sent without one.
            connections: maximum concurrent connections. With fewer than usual, none to a foreign host is kept idle.
            download_limit_bytes: maximum size of a result image.
            json_limit_bytes: maximum size of a JSON answer.
            user_agent: the `User-Agent` header.
            options: sent with each submit; the job's key is added to their tags as `job`, unless they have that tag.
        """
        self._origins, self._app, self._key = origins, app, key
        self._options = options or RequestOptions()
        self._download_limit_bytes = download_limit_bytes
        self._json_limit_bytes = json_limit_bytes
        self._exchanging, self._transferring = within(EXCHANGE_SECONDS), within(TRANSFER_SECONDS, READ_TIMEOUT)
        self._own = Http(limit=connections, timeout=self._exchanging, user_agent=user_agent)
        keep = connections >= CONNECTIONS
        self._foreign = Http(limit=connections, timeout=self._exchanging, user_agent=user_agent, keep=keep)
        self._stack = contextlib.AsyncExitStack()
        self.webhook = ""
        """URL that each submit asks the target to call; empty: none."""
        self.before_send: Callable[[Attempt], Awaitable[None]] | None = None
        # Waiting for a connection must not count as part of an exchange, as it would in aiohttp's pool.
        self._free = asyncio.Semaphore(connections)
        self._large = asyncio.Semaphore(LARGE_BODIES_AT_ONCE)
        self._huge = asyncio.Semaphore(HUGE_BODIES_AT_ONCE)

    def __repr__(self) -> str:
        return f"<FalClient {self._origins.queue} app={self._app} key={'set' if self._key else 'none'}>"

    async def __aenter__(self) -> Self:
        Proxies().check(self._origins.queue)
        await self._stack.enter_async_context(self._own)
        await self._stack.enter_async_context(self._foreign)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    # --- Service ---------------------------------------------------------------------------------------

    async def submit(self, attempt: Attempt) -> Ticket:
        """Send the POST that costs money, once."""
        tags = self._options.tags
        options = replace(self._options, tags={**tags, "job": tags.get("job", attempt.job_key)})
        call = protocol.submit_call(
            self._origins, self._app, attempt.body, attempt.idempotency_key, self.webhook, options
        )
        before_send = None if self.before_send is None else partial(self.before_send, attempt)
        reply = await self._exchange("submit", call, before_send=before_send)
        with _reading("submit"):
            return protocol.read_ticket(reply)

    async def status(self, ticket: Ticket) -> TicketStatus:
        """Read the status once."""
        reply = await self._read("status", self._ticket_call(ticket, Operation.STATUS))
        with _reading("status"):
            return protocol.read_status(reply)

    async def result(self, ticket: Ticket) -> Answer:
        """Read the output once; it has an image, and any other field may be odd (`batch.fal.answer`)."""
        return _answer(await self._read("result", self._ticket_call(ticket, Operation.RESULT)))

    async def cancel(self, ticket: Ticket) -> CancelOutcome | None:
        """Ask for cancellation once."""
        try:
            reply = await self._exchange("cancel", self._ticket_call(ticket, Operation.CANCEL))
        except CallFailed as error:
            outcome = protocol.read_cancel(error.trouble.reply) if error.trouble.reply else None
            if outcome is None:
                raise
            return outcome
        return protocol.read_cancel(reply)

    async def upload(self, data: bytes, content_type: str, name: str) -> str:
        """Store an image at the target and return its URL: initiate with the key, PUT without it."""
        start = Call(
            "POST",
            f"{self._origins.rest}/storage/upload/initiate?storage_type=fal-cdn-v3",
            {"content-type": protocol.CONTENT_JSON},
            orjson.dumps({"content_type": content_type, "file_name": name}),
        )
        reply = await self._exchange("initiate", start)
        with _reading("initiate"):
            answer = protocol.read_object(reply.body)
            upload_url, file_url = answer.get("upload_url"), answer.get("file_url")
            if not isinstance(upload_url, str) or not isinstance(file_url, str):
                raise Malformed("the upload answer lacks upload_url or file_url")
        await self._exchange("upload", Call("PUT", upload_url, {"content-type": content_type}, data), key=False)
        return file_url

    async def listing(
        self, start: float, end: float, cursor: str | None, limit: int = platform.PAGE_LIMIT
    ) -> platform.ListingPage:
        """Read one page of the platform's request listing, once; instants in Unix seconds."""
        call = platform.listing_call(self._origins, self._app, start=start, end=end, cursor=cursor, limit=limit)
        reply = await self._exchange("listing", call)
        with _reading("listing"):
            return platform.read_listing(reply)

    async def billing(self, start: float, end: float, cursor: str | None) -> platform.BillPage:
        """Read one page of the endpoint's billing events, once; instants in Unix seconds, at most 90 days apart."""
        call = platform.billing_call(self._origins, self._app, start=start, end=end, cursor=cursor)
        reply = await self._exchange("billing", call)
        with _reading("billing"):
            return platform.read_billing(reply)

    async def price(self) -> tuple[float, str]:
        """Read the endpoint's current unit price in US dollars, and its unit."""
        reply = await self._exchange("price", platform.pricing_call(self._origins, self._app))
        with _reading("price"):
            return platform.read_price(reply, self._app)

    async def download(self, url: str) -> bytes:
        """Fetch a result image without the key, over at most five redirects, within the size limit."""
        if url.startswith("data:"):
            return _decode_data_uri(url)
        for _ in range(REDIRECTS + 1):
            reply = await self._request("download", Call("GET", url), self._download_limit_bytes, key=False)
            target = reply.headers.get("location")
            if reply.status not in protocol.REDIRECTS or target is None:
                return _successful("download", reply).body
            url = urljoin(url, target)
        raise CallFailed(Trouble("download", "redirect", detail=f"more than {REDIRECTS} redirects"))

    # --- one exchange ----------------------------------------------------------------------------------

    def _ticket_call(self, ticket: Ticket, operation: Operation) -> Call:
        return protocol.ticket_call(self._origins, self._app, ticket, operation)

    async def _read(self, phase: str, call: Call) -> Reply:
        """GET, following at most `REDIRECTS` redirects among the target's own origins."""
        for _ in range(REDIRECTS + 1):
            reply = await self._answered(phase, call, key=True)
            if not 300 <= reply.status < 400:
                return _successful(phase, reply)
            try:
                call = protocol.redirected(self._origins, call, reply)
            except RedirectRefused as refused:
                raise CallFailed(Trouble(phase, "redirect", detail=str(refused))) from refused
        raise CallFailed(Trouble(phase, "redirect", detail=f"more than {REDIRECTS} redirects in a row"))

    async def _exchange(
        self, phase: str, call: Call, *, key: bool = True, before_send: Callable[[], Awaitable[None]] | None = None
    ) -> Reply:
        return _successful(phase, await self._answered(phase, call, key=key, before_send=before_send))

    async def _answered(
        self, phase: str, call: Call, *, key: bool, before_send: Callable[[], Awaitable[None]] | None = None
    ) -> Reply:
        limit_bytes = self._json_limit_bytes if phase in _LONG_ANSWERS else ANSWER_LIMIT_BYTES
        if phase == "result":  # it may contain its images
            limit_bytes = max(limit_bytes, self._download_limit_bytes)
        return self._without_key(await self._request(phase, call, limit_bytes, key=key, before_send=before_send))

    def _without_key(self, reply: Reply) -> Reply:
        """Remove the key from an answer that echoes it, so that it does not reach our journal and log."""
        key = b"" if self._key is None else self._key.get_secret_value().encode()
        if not key or key not in reply.body:
            return reply
        return Reply(reply.status, reply.body.replace(key, b"[key]"), reply.headers)

    async def _request(
        self,
        phase: str,
        call: Call,
        limit_bytes: int,
        *,
        key: bool,
        before_send: Callable[[], Awaitable[None]] | None = None,
    ) -> Reply:
        """Do one exchange; `before_send` is awaited when a connection is free, before anything is sent."""
        headers, is_own = dict(call.headers), self._origins.own(call.url)
        if key and self._key is not None and is_own:
            headers["authorization"] = f"Key {self._key.get_secret_value()}"
        try:
            async with self._free:
                if before_send is not None:
                    await before_send()
                async with (self._own if is_own else self._foreign).request(
                    call.method,
                    call.url,
                    headers=headers,
                    data=_payload(call.body),
                    timeout=self._transferring if phase in _TRANSFERS else self._exchanging,
                ) as response:
                    body = await self._body(response, phase, limit_bytes)
                    return Reply(response.status, body, response.headers)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise CallFailed(trouble_of(phase, error)) from error

    async def _body(self, response: aiohttp.ClientResponse, phase: str, limit_bytes: int) -> bytes:
        """Read the whole body; raise `CallFailed` as soon as it exceeds the limit.

        The beginning of an error's body is enough, because its status decides. An error of a result is read in full: it
        belongs to the job, and its body names it.
        """
        is_error = not 200 <= response.status < 300 and phase != "result"
        limit_bytes = min(limit_bytes, ERROR_LIMIT_BYTES) if is_error else limit_bytes
        length = response.content_length
        if length is not None and length <= min(limit_bytes, LARGE_BODY_BYTES):
            return await response.read()  # the common case
        if (length or 0) > limit_bytes and not is_error:
            raise _oversize(phase, limit_bytes)
        async with contextlib.AsyncExitStack() as stack:
            parts: list[bytes] = []
            size = 0
            async for part in response.content.iter_any():
                if size <= LARGE_BODY_BYTES < size + len(part):
                    await stack.enter_async_context(self._large)
                if size <= JSON_LIMIT_BYTES < size + len(part):
                    await stack.enter_async_context(self._huge)
                size += len(part)
                parts.append(part)
                if size > limit_bytes:
                    if is_error:
                        break
                    raise _oversize(phase, limit_bytes)
            return b"".join(parts)[:limit_bytes]


_TRANSFERS = frozenset({"upload", "download"})
_LONG_ANSWERS = frozenset({"result", "listing", "billing"})


def _answer(reply: Reply) -> Answer:
    """Return the answer in a 2xx result.

    Raises:
        CallFailed: it has no image; the error carries the answer, which may be paid for.
    """
    units, engine = _float(reply.headers.get(protocol.BILLABLE_UNITS)), reply.headers.get(protocol.ENGINE)
    try:
        output = protocol.read_output(reply.body)
    except Malformed as error:
        came = Answer({}, units, engine, reply.body)
        raise CallFailed(Trouble("result", "malformed", detail=str(error), answer=came)) from error
    answer = Answer(output, units, engine, reply.body)
    if has_images(output):
        return answer
    if says_no_images(output):
        raise CallFailed(Trouble("result", "no images", detail="the answer has no images", answer=answer))
    detail = f"the answer names no image: {reply.body[:80]!r}"
    raise CallFailed(Trouble("result", "malformed", detail=detail, answer=answer))


def _oversize(phase: str, limit_bytes: int) -> CallFailed:
    raised = "; raise it with limits.max_download_bytes" if phase in {"result", "download"} else ""
    return CallFailed(Trouble(phase, "oversize", detail=f"the answer exceeds the limit of {limit_bytes} bytes{raised}"))


def _payload(body: bytes) -> bytes | io.BytesIO | None:
    """Wrap a large body in a stream: aiohttp writes bytes in one piece and warns about large ones."""
    return io.BytesIO(body) if len(body) > 2**20 else body or None


def _successful(phase: str, reply: Reply) -> Reply:
    if 200 <= reply.status < 300:
        return reply
    raise CallFailed(Trouble(phase, reply=_shortened(reply), detail=f"HTTP {reply.status}"))


def _shortened(reply: Reply) -> Reply:
    """Shorten an error that quotes the input: it may be kept in memory until the next try."""
    if len(reply.body) <= ERROR_LIMIT_BYTES:
        return reply
    parsed = protocol.error_body_of(reply)
    body = {"detail": parsed.message, "error_type": parsed.type} if parsed.is_fal else {}
    return Reply(reply.status, orjson.dumps(body), reply.headers)


class _reading:  # noqa: N801 - used as a with statement: reads as a phrase
    """Turns a body that breaks the protocol into a `CallFailed` of its phase."""

    def __init__(self, phase: str) -> None:
        self._phase = phase

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Malformed):
            raise CallFailed(Trouble(self._phase, "malformed", detail=str(error))) from error


def _decode_data_uri(url: str) -> bytes:
    _, _, payload = url.partition(",")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise CallFailed(Trouble("download", "malformed", detail="invalid base64 in the result's data URI")) from error


def _float(text: str | None) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        return None
    return value if value is not None and 0 <= value < float("inf") else None


# --- aiohttp's exceptions as values -----------------------------------------------------------------------

# Most specific first. `sent` is False only where no byte of the request can have left this machine.
_TRANSLATION: tuple[tuple[type[BaseException], str, bool], ...] = (
    (aiohttp.ClientConnectorDNSError, "dns", False),
    (aiohttp.ClientConnectorCertificateError, "tls", False),
    (aiohttp.ClientConnectorSSLError, "tls", False),
    (aiohttp.ClientProxyConnectionError, "connect", False),
    (aiohttp.ClientConnectorError, "connect", False),
    (aiohttp.ClientHttpProxyError, "proxy", False),
    (aiohttp.ConnectionTimeoutError, "connect timeout", False),
    (aiohttp.InvalidURL, "bad url", False),
    (aiohttp.NonHttpUrlClientError, "bad url", False),
    (aiohttp.SocketTimeoutError, "timeout", True),
    (aiohttp.ServerTimeoutError, "timeout", True),
    (aiohttp.ServerDisconnectedError, "disconnected", True),
    (aiohttp.ClientOSError, "reset", True),
    (aiohttp.ClientConnectionResetError, "reset", True),
    (aiohttp.ClientPayloadError, "broken body", True),
    (aiohttp.ClientResponseError, "bad answer", True),
    (aiohttp.ClientError, "client error", True),
    (TimeoutError, "timeout", True),
    (OSError, "reset", True),
    (ValueError, "bad answer", True),
)


def trouble_of(phase: str, error: BaseException) -> Trouble:
    """Translate an exception of aiohttp. The detail names the kind of error and the host, never headers.

    A missing descriptor prevents the connection, so nothing was sent.
    """
    if lacks_descriptor(error):
        return Trouble(phase, "descriptors", sent=False, detail="too many open files; raise `ulimit -n`")
    for kind, name, sent in _TRANSLATION:
        if isinstance(error, kind):
            return Trouble(phase, name, sent=sent, detail=f"{name}: {_detail(error)}")
    raise AssertionError(f"{error!r} is not an exception of aiohttp") from error


def _detail(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):  # the only one of its family without `os_error`
        return f"{error.host}:{error.port} ({error.certificate_error})"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"{error.host}:{error.port} ({error.os_error.strerror or type(error).__name__})"
    if isinstance(error, aiohttp.ClientResponseError):
        wants = "; the proxy requires a user and a password" if error.status == 407 else ""
        return f"HTTP {error.status}, {type(error).__name__}{wants}"
    return type(error).__name__
