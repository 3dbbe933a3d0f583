"""Callbacks: whoever asked for it with `?fal_webhook=` is told of a request's end, at least once.

Owns the sending: bodies, signatures, the pace of retries. What is owed lies in the store, written down together with
the ending itself, so that it survives kill -9; here in memory is only what is under way. The queue does not wait for
any of it. A callback stops being owed when it is acknowledged, when it cannot work, after 31 retries, or when the
request's result has expired.
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
"""How long the receiver may take at the first try, and at any later one. Precedent: fal's webhook page, autumn 2026."""
LATER_SECONDS = 120.0
RETRIES = 31
"""After the first try. Precedent as above."""
BACKOFF_SECONDS = 5.0
BACKOFF_LIMIT_SECONDS = 4 * 3600.0
PAYLOAD_LIMIT_BYTES = 4 * 2**20
"""Of a larger result (images as data URIs) the receiver is only told where it is."""
PARALLEL = 16
PARALLEL_PER_HOST = 4
"""A receiver that does not answer holds up itself, not the others."""
_PAUSE_SECONDS = 0.02
"""Requests that end together are looked up together."""
_DISK_SECONDS = 1.0
"""Between two tries at a disk that refuses."""

_Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


class DeliveryVerdict(Enum):
    """What an answer to a callback means."""

    ACKNOWLEDGED = "acknowledged"
    AGAIN = "to be tried again"
    NEVER = "cannot work"


def verdict_on(status: int) -> DeliveryVerdict:
    """Any 2xx acknowledges; a redirect is a mistake in the URL that no retry heals; everything else may pass."""
    if 200 <= status < 300:
        return DeliveryVerdict.ACKNOWLEDGED
    return DeliveryVerdict.NEVER if 300 <= status < 400 else DeliveryVerdict.AGAIN


def next_try(tries: int, now: float, chance: float) -> float | None:
    """When to try again.

    The longest wait is 5 s after the first try and doubles up to 4 h; of it a random part is waited (full jitter), so
    that callbacks that failed together do not come back together.

    Args:
        tries: made so far, from 1.
        now: Unix seconds.
        chance: from 0 to 1.

    Returns:
        Unix seconds, or None after `RETRIES` retries.
    """
    if tries > RETRIES:
        return None
    return now + chance * min(BACKOFF_SECONDS * 2.0 ** (tries - 1), BACKOFF_LIMIT_SECONDS)


def callback_body(ending: CompletedRequest, payload: bytes) -> bytes:
    """What is sent. `payload` is the body that the result URL answers with."""
    body: dict[str, object] = {"request_id": ending.request_id, "gateway_request_id": ending.request_id}
    if ending.status >= 400:
        body |= {"status": "ERROR", "error": f"Invalid status code: {ending.status}"}
    else:
        body["status"] = "OK"
    if len(payload) > PAYLOAD_LIMIT_BYTES:
        reason = f"The result is larger than {PAYLOAD_LIMIT_BYTES // 2**20} MiB; fetch it from the result URL"
        body |= {"payload": None, "payload_error": reason}
    else:
        body["payload"] = orjson.Fragment(payload)
    return orjson.dumps(body)


def webhook_of(url: str, base: str, permitted: AddressRule) -> Webhook:
    """A callback as it was asked for. What its host resolves to is judged when it is sent.

    Args:
        url: the value of `fal_webhook`.
        base: origin of the server as the caller sees it.
        permitted: which addresses may be asked.

    Raises:
        Refused: it can never work.
    """
    target = check_url(url, permitted)
    return Webhook(url, target.raw_host or "", base)


def signing_key(path: Path) -> Ed25519PrivateKey:
    """The key pair of this data dir; made once, for its user's eyes only (mode 0600).

    Raises:
        InputError: what lies there is no such key.
    """
    if not path.exists():
        pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_file(path, pem, path.with_suffix(".new"), mode=0o600)
    with suppress(ValueError, TypeError):
        key = load_pem_private_key(path.read_bytes(), None)
        if isinstance(key, Ed25519PrivateKey):
            return key
    raise InputError(f"{path} is no Ed25519 private key; put the right file back, or remove it and a new one is made")


def routes(key: Ed25519PrivateKey) -> list[tuple[str, str, _Handler]]:
    """Method, path and handler of each route: receivers fetch the public key here."""
    body = orjson.dumps(jwks_of([key.public_key()]))

    async def jwks(_: web.Request) -> web.Response:
        headers = {"content-type": protocol.CONTENT_JSON, "cache-control": "public, max-age=3600"}
        return web.Response(body=body, headers=headers)

    return [(method, "/.well-known/jwks.json", jwks) for method in ("GET", "HEAD")]


class Webhooks:
    """Sends what is owed. Made by `sending`.

    Args:
        service: says when requests end, and completes results.
        store: knows what is owed.
        guard: makes the calls.
        key: signs.
        clock: Unix seconds.
        chance: a number from 0 to 1, for the pace of retries.
        disk_seconds: time between two tries at a disk that refuses.
    """

    def __init__(
        self,
        service: QueueService,
        store: Store,
        guard: SafeHttpClient,
        key: Ed25519PrivateKey,
        clock: Callable[[], float],
        chance: Callable[[], float],
        *,
        disk_seconds: float = _DISK_SECONDS,
    ) -> None:
        self._service = service
        self._store = store
        self._guard = guard
        self._key = key
        self._clock = clock
        self._chance = chance
        self._disk_seconds = disk_seconds
        self._under_way: dict[RequestId, str] = {}
        """With their hosts."""

    async def run(self) -> None:
        """Send until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    await self._round(tasks)
                except StorageError as error:
                    _log.error("webhooks wait for the disk: %s", error)
                    await asyncio.sleep(self._disk_seconds)
                except Exception:  # the boundary between the callbacks and the server
                    _log.exception("webhooks failed in a way that nobody foresaw")
                    await asyncio.sleep(self._disk_seconds)

    async def _round(self, tasks: asyncio.TaskGroup) -> None:
        """Start what is due, then wait for something to change."""
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
        """One try, and what it left. One for which no descriptor was free is none."""
        try:
            settlement = await self._tried(delivery)
        except Exception:  # the boundary between one callback and the others
            _log.exception("the webhook of request %s failed in a way that nobody foresaw", delivery.request_id)
            settlement = self._again(delivery)
        while True:
            try:
                await self._store.settle(settlement)
                break
            except StorageError as error:
                _log.error("the webhook of request %s cannot be noted: %s", delivery.request_id, error)
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
        if stored is None or stored.ending is None:
            return DeliveryOutcome(request_id, None)  # its result has expired this very moment
        body = await self._body(stored.ending, webhook.base)
        headers = sign(
            self._key,
            request_id=request_id,
            user_id=stored.owner or "local",
            timestamp=int(self._clock()),
            body=body,
        ) | {"content-type": protocol.CONTENT_JSON}
        seconds = LATER_SECONDS if tries else FIRST_SECONDS
        try:
            status = await self._guard.post(webhook.url, body, headers, seconds)
            verdict, reason = verdict_on(status), f"its server answered {status}"
        except AddressRefused as refusal:
            verdict, reason = DeliveryVerdict.NEVER, str(refusal)
        except Unreachable as failure:
            verdict, reason = DeliveryVerdict.AGAIN, str(failure)
        if verdict is DeliveryVerdict.ACKNOWLEDGED:
            return DeliveryOutcome(request_id, None)
        settlement = self._again(delivery) if verdict is DeliveryVerdict.AGAIN else DeliveryOutcome(request_id, None)
        # The URL's path and query may hold the receiver's secrets: only its host is logged.
        outcome = "given up" if settlement.due_at is None else "tried again later"
        _log.warning("webhook of request %s to %s: %s; %s", request_id, webhook.host, reason, outcome)
        return settlement

    def _again(self, delivery: Delivery) -> DeliveryOutcome:
        return DeliveryOutcome(delivery.request_id, next_try(delivery.tries + 1, self._clock(), self._chance()))

    async def _body(self, ending: CompletedRequest, base: str) -> bytes:
        inlined = await self._service.inlined(ending) if ending.inline else None
        reply = answers.result_reply(base, ending, inlined)
        return callback_body(ending, reply.body)


@asynccontextmanager
async def sending(webhooks: Webhooks) -> AsyncIterator[None]:
    """Callbacks are sent while the block lasts; what is under way at its end is tried again by the next server."""
    task = asyncio.create_task(webhooks.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
