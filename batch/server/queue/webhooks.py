"""Webhooks: deliver the result of a request to its `?fal_webhook=` URL, at least once.

Builds and signs the bodies and schedules the retries. Pending callbacks are in the store, written in the transaction of
the result, so that they survive kill -9; memory holds only those in flight. The queue never waits for a callback. A
callback ends when it is acknowledged, when it can never succeed, after 31 retries, or when the result expires.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import TypeAlias

import orjson
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from batch.errors import InputError, StorageError
from batch.fal import protocol
from batch.fal.signing import jwks_of, sign
from batch.server.egress.http_client import SafeHttpClient, Unreachable
from batch.server.egress.ssrf import AddressRefused, AddressRule, check_url
from batch.server.queue import responses as answers
from batch.server.queue.records import CompletedRequest, Delivery, DeliveryOutcome, Webhook
from batch.server.queue.service import QueueService
from batch.server.queue.store import Store
from batch.system.descriptors import lacks_descriptor
from batch.system.durable import write_file
from batch.types import RequestId

__all__ = [
    "RETRIES",
    "DeliveryVerdict",
    "Webhooks",
    "callback_body",
    "next_try",
    "routes",
    "sending",
    "signing_key",
    "verdict_on",
    "webhook_of",
]

_log = logging.getLogger(__name__)

FIRST_SECONDS = 15.0
"""Timeout of the first attempt; later ones have `LATER_SECONDS`. Source: fal's webhook page, autumn 2026."""
LATER_SECONDS = 120.0
RETRIES = 31
"""Retries after the first attempt. Same source."""
BACKOFF_SECONDS = 5.0
BACKOFF_LIMIT_SECONDS = 4 * 3600.0
PAYLOAD_LIMIT_BYTES = 4 * 2**20
"""For a larger result (images as data URIs) the callback only says to fetch it from the result URL."""
PARALLEL = 16
PARALLEL_PER_HOST = 4
"""An unresponsive receiver must not block the others."""
_PAUSE_SECONDS = 0.02
"""Requests that end within this time are handled in one round."""
_DISK_SECONDS = 1.0
"""Delay before a failed read or write of the store is retried."""

_Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


class DeliveryVerdict(Enum):
    """The meaning of a receiver's response."""

    ACKNOWLEDGED = "acknowledged"
    AGAIN = "to be tried again"
    NEVER = "cannot work"


def verdict_on(status: int) -> DeliveryVerdict:
    """Return the meaning of a status: 2xx acknowledges, 3xx never succeeds (a wrong URL), the rest is retried."""
    if 200 <= status < 300:
        return DeliveryVerdict.ACKNOWLEDGED
    return DeliveryVerdict.NEVER if 300 <= status < 400 else DeliveryVerdict.AGAIN


def next_try(tries: int, now: float, chance: float) -> float | None:
    """Return the time of the next attempt.

    Exponential backoff with full jitter: the maximum delay is 5 s after the first attempt and doubles up to 4 h.

    Args:
        tries: attempts made so far, >= 1.
        now: Unix seconds.
        chance: random number from 0 to 1.

    Returns:
        Unix seconds, or None after `RETRIES` retries.
    """
    if tries > RETRIES:
        return None
    return now + chance * min(BACKOFF_SECONDS * 2.0 ** (tries - 1), BACKOFF_LIMIT_SECONDS)


def callback_body(completed: CompletedRequest, payload: bytes) -> bytes:
    """Return the body of a callback. `payload`: the body that the result URL returns."""
    body: dict[str, object] = {"request_id": completed.request_id, "gateway_request_id": completed.request_id}
    if completed.status >= 400:
        body |= {"status": "ERROR", "error": f"Invalid status code: {completed.status}"}
    else:
        body["status"] = "OK"
    if len(payload) > PAYLOAD_LIMIT_BYTES:
        reason = f"The result is larger than {PAYLOAD_LIMIT_BYTES // 2**20} MiB; fetch it from the result URL"
        body |= {"payload": None, "payload_error": reason}
    else:
        body["payload"] = orjson.Fragment(payload)
    return orjson.dumps(body)


def webhook_of(url: str, base: str, permitted: AddressRule) -> Webhook:
    """Check a webhook URL. The address of its host is checked when the callback is sent.

    Args:
        url: the value of `fal_webhook`.
        base: origin of the server as the caller uses it.
        permitted: the rule for addresses.

    Raises:
        AddressRefused: the URL is invalid or not permitted.
    """
    target = check_url(url, permitted)
    return Webhook(url, target.raw_host or "", base)


def signing_key(path: Path) -> Ed25519PrivateKey:
    """Read the data dir's signing key, or create it (mode 0600).

    Raises:
        InputError: the file is not an Ed25519 private key.
    """
    if not path.exists():
        pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_file(path, pem, path.with_suffix(".new"), mode=0o600)
    with suppress(ValueError, TypeError):
        key = load_pem_private_key(path.read_bytes(), None)
        if isinstance(key, Ed25519PrivateKey):
            return key
    raise InputError(f"{path} is not an Ed25519 private key; restore the file, or delete it to create a new key")


def routes(key: Ed25519PrivateKey) -> list[tuple[str, str, _Handler]]:
    """Return method, path and handler of each route. Receivers fetch the public key here."""
    body = orjson.dumps(jwks_of([key.public_key()]))

    async def jwks(_: web.Request) -> web.Response:
        headers = {"content-type": protocol.CONTENT_JSON, "cache-control": "public, max-age=3600"}
        return web.Response(body=body, headers=headers)

    return [(method, "/.well-known/jwks.json", jwks) for method in ("GET", "HEAD")]


class Webhooks:
    """Sends pending callbacks; run it with `sending`.

    Args:
        service: reports when requests end, and inlines images.
        store: the pending callbacks.
        client: makes the requests.
        key: signs the bodies.
        clock: Unix seconds.
        chance: returns a random number from 0 to 1, for the jitter.
        disk_seconds: seconds between two attempts to write to the disk.
    """

    def __init__(
        self,
        service: QueueService,
        store: Store,
        client: SafeHttpClient,
        key: Ed25519PrivateKey,
        clock: Callable[[], float],
        chance: Callable[[], float],
        *,
        disk_seconds: float = _DISK_SECONDS,
    ) -> None:
        self._service = service
        self._store = store
        self._client = client
        self._key = key
        self._clock = clock
        self._chance = chance
        self._disk_seconds = disk_seconds
        self._under_way: dict[RequestId, str] = {}
        """Host by request, of the callbacks in flight."""

    async def run(self) -> None:
        """Send until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    await self._round(tasks)
                except StorageError as error:
                    _log.error("webhooks: cannot read the request database, retrying: %s", error)
                    await asyncio.sleep(self._disk_seconds)
                except Exception:  # a failure must not stop the server
                    _log.exception("webhooks: unexpected error")
                    await asyncio.sleep(self._disk_seconds)

    async def _round(self, tasks: asyncio.TaskGroup) -> None:
        """Start the due callbacks, then wait for the next due time or the end of a request."""
        self._service.ended.clear()
        now = self._clock()
        while self._store.webhooks and (room := PARALLEL - len(self._under_way)) > 0:
            hosts = Counter(self._under_way.values())
            busy = [host for host, count in hosts.items() if count >= PARALLEL_PER_HOST]
            due = await self._store.webhooks_due(now, room, busy_hosts=busy, under_way=list(self._under_way))
            for delivery in due:
                host = delivery.webhook.host
                if hosts[host] < PARALLEL_PER_HOST:
                    hosts[host] += 1
                    self._under_way[delivery.request_id] = host
                    tasks.create_task(self._deliver(delivery))
            if len(due) < room:
                break
        upcoming = await self._store.webhook_next(now) if self._store.webhooks else None
        with suppress(TimeoutError):
            async with asyncio.timeout(None if upcoming is None else max(0.0, upcoming - self._clock())):
                await self._service.ended.wait()
        await asyncio.sleep(_PAUSE_SECONDS)

    async def _deliver(self, delivery: Delivery) -> None:
        """Make one attempt and store its outcome. An attempt without a free descriptor does not count."""
        try:
            outcome = await self._tried(delivery)
        except Exception:  # one callback's failure must not stop the others
            _log.exception("webhook of request %s: unexpected error", delivery.request_id)
            outcome = self._again(delivery)
        while True:
            try:
                await self._store.settle(outcome)
                break
            except StorageError as error:
                _log.error("webhook of request %s: cannot store the outcome, retrying: %s", delivery.request_id, error)
                await asyncio.sleep(self._disk_seconds)
        del self._under_way[delivery.request_id]
        self._service.ended.set()

    async def _tried(self, delivery: Delivery) -> DeliveryOutcome:
        while True:
            try:
                return await self._try(delivery)
            except Exception as error:
                if not lacks_descriptor(error):
                    raise
                self._service.lacked_descriptor(error)
            await asyncio.sleep(self._disk_seconds)

    async def _try(self, delivery: Delivery) -> DeliveryOutcome:
        request_id, webhook, tries = delivery
        stored = await self._store.find(request_id)
        if stored is None or stored.completed is None:
            return DeliveryOutcome(request_id, None)  # the result has just expired
        body = await self._body(stored.completed, webhook.base)
        headers = sign(
            self._key,
            request_id=request_id,
            user_id=stored.owner or "local",
            timestamp=int(self._clock()),
            body=body,
        ) | {"content-type": protocol.CONTENT_JSON}
        seconds = LATER_SECONDS if tries else FIRST_SECONDS
        try:
            status = await self._client.post(webhook.url, body, headers, seconds)
            verdict, reason = verdict_on(status), f"its server returned status {status}"
        except AddressRefused as refusal:
            verdict, reason = DeliveryVerdict.NEVER, str(refusal)
        except Unreachable as failure:
            verdict, reason = DeliveryVerdict.AGAIN, str(failure)
        if verdict is DeliveryVerdict.ACKNOWLEDGED:
            return DeliveryOutcome(request_id, None)
        outcome = self._again(delivery) if verdict is DeliveryVerdict.AGAIN else DeliveryOutcome(request_id, None)
        # The URL's path and query may hold the receiver's secrets: only its host is logged.
        consequence = "giving up" if outcome.due_at is None else "retrying later"
        _log.warning("webhook of request %s to %s: %s; %s", request_id, webhook.host, reason, consequence)
        return outcome

    def _again(self, delivery: Delivery) -> DeliveryOutcome:
        return DeliveryOutcome(delivery.request_id, next_try(delivery.tries + 1, self._clock(), self._chance()))

    async def _body(self, completed: CompletedRequest, base: str) -> bytes:
        inlined = await self._service.inlined(completed) if completed.inline else None
        reply = answers.result_reply(base, completed, inlined)
        return callback_body(completed, reply.body)


@asynccontextmanager
async def sending(webhooks: Webhooks) -> AsyncIterator[None]:
    """Send callbacks inside the `async with` block. Those in flight at its end are retried by the next server."""
    task = asyncio.create_task(webhooks.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
