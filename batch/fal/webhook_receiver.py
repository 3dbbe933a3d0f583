"""Callbacks: a small server that the target calls when a request has ended.

Implements `batch.run.interfaces.CompletionHints`. A callback is trusted only if its signature matches one of the
target's published keys and its time is recent; even then it only causes a read, and its payload is never used. A
callback for an unknown request is acknowledged and remembered for a while, because it may arrive before the answer to
the submit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import aiohttp
import anyio
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from batch.errors import ConfigError
from batch.fal import protocol
from batch.fal.http import Http, within
from batch.fal.protocol import Malformed
from batch.fal.signing import BadSignature, keys_in, verify
from batch.system.acceptor import Acceptor, bound
from batch.system.descriptors import HINTS
from batch.types import Ticket

__all__ = ["WebhookReceiver"]

KEYS_PATH = "/.well-known/jwks.json"
KEYS_SECONDS = 3600.0
"""Lifetime of the cached keys; fal allows a day."""
KEYS_AGAIN = 60.0
"""Minimum age of the cached keys before an unmatched signature causes another fetch."""
KEYS_TIMEOUT = 10.0
BODY_LIMIT_BYTES = 8 * 2**20
"""Maximum size of a callback. A result is a few hundred bytes; one with embedded images is polled anyway."""
KEYS_LIMIT_BYTES = 2**18
EARLY = 4096
"""Maximum remembered callbacks without a waiting job."""


class WebhookReceiver:
    """Receives callbacks at `url`; an async context manager."""

    def __init__(
        self,
        bind: str,
        public_url: str | None,
        target_url: str,
        now: Callable[[], float] = time.time,
        *,
        most: int = HINTS,
        user_agent: str = "restyle",
        early: int = EARLY,
        body_limit: int = BODY_LIMIT_BYTES,
    ) -> None:
        """Create the receiver; it does not listen yet.

        Args:
            bind: `address:port`; port 0: any free port.
            public_url: URL under which the target reaches it; None: as it is bound.
            target_url: the origin that publishes the keys.
            now: clock, in Unix seconds.
            most: maximum concurrent connections; further ones wait.
            user_agent: sent when the keys are fetched.
            early: maximum number of stored callbacks for unknown requests.
            body_limit: maximum bytes of a callback.
        """
        self._acceptor = Acceptor(most)
        self._http = Http(limit=1, timeout=within(KEYS_TIMEOUT), user_agent=user_agent)
        self._bind, self._public_url, self._now = bind, public_url, now
        self._keys_url = target_url.rstrip("/") + KEYS_PATH
        self._keys: list[Ed25519PublicKey] = []
        self._keys_at = float("-inf")
        self._early_limit, self._body_limit = early, body_limit
        self._fetching = anyio.Lock()  # concurrent callbacks fetch the keys once
        self._waiting: dict[str, anyio.Event] = {}
        self._early: dict[str, None] = {}
        self._stack = AsyncExitStack()
        self.url = ""
        """URL that the target calls; empty before the start."""
        self.believed = self.refused = 0
        """Number of trusted and refused callbacks."""

    def __repr__(self) -> str:
        return f"<Callbacks at {self.url or self._bind}: {self.believed} believed, {self.refused} refused>"

    async def __aenter__(self) -> Self:
        host, _, port = self._bind.rpartition(":")
        app = web.Application(client_max_size=self._body_limit)
        app.router.add_route("*", "/{path:.*}", self._receive)
        self._acceptor.watch(app)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        self._stack.push_async_callback(runner.cleanup)
        await runner.setup()
        try:
            listener = self._stack.enter_context(bound(host.strip("[]"), int(port)))
        except (OSError, OverflowError) as error:
            await self._stack.aclose()
            raise ConfigError(f"cannot listen on webhook.bind = {self._bind!r}: {error}") from error
        assert runner.server is not None, "it is set up"
        await self._stack.enter_async_context(self._acceptor.accepting(listener, runner.server))
        await self._stack.enter_async_context(self._http)
        self.url = self._public_url or f"http://{host}:{listener.getsockname()[1]}/"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def wait(self, ticket: Ticket, usual: float, longest: float) -> bool:
        """See `CompletionHints`: waits up to `longest` for the callback; after it, `usual`."""
        called = self._waiting.get(ticket.request_id)
        if called is None:
            called = self._waiting[ticket.request_id] = anyio.Event()
            if ticket.request_id in self._early:
                del self._early[ticket.request_id]
                called.set()
                return True
        elif called.is_set():
            await anyio.sleep(usual)
            return False
        with anyio.move_on_after(longest):
            await called.wait()
        return called.is_set()

    def forget(self, ticket: Ticket) -> None:
        """Stop waiting for this request."""
        self._waiting.pop(ticket.request_id, None)

    async def _receive(self, request: web.Request) -> web.Response:
        if request.method != "POST":
            return web.Response(status=405, text="use POST for callbacks")
        body = await request.read()
        try:
            request_id = await self._verified(request, body)
        except BadSignature as error:
            self.refused += 1
            return web.Response(status=401, text=str(error))
        except (aiohttp.ClientError, TimeoutError, OSError, Malformed):
            return web.Response(status=503, text="cannot read the keys; try again")  # not the sender's fault
        self.believed += 1
        called = self._waiting.get(request_id)
        if called is not None:
            called.set()
        else:
            self._early[request_id] = None
            while len(self._early) > self._early_limit:
                del self._early[next(iter(self._early))]
        return web.Response()

    async def _verified(self, request: web.Request, body: bytes) -> str:
        keys = await self._keys_of_target(KEYS_SECONDS)
        try:
            return verify(request.headers, body, keys, now=self._now())
        except BadSignature:
            fresh = await self._keys_of_target(KEYS_AGAIN)  # the keys may have changed since
            if fresh is keys:
                raise
        return verify(request.headers, body, fresh, now=self._now())

    async def _keys_of_target(self, at_most: float) -> list[Ed25519PublicKey]:
        """Return the target's published keys, at most `at_most` seconds old."""
        async with self._fetching:
            if self._now() - self._keys_at > at_most:
                async with self._http.request("GET", self._keys_url) as response:
                    body = await response.content.read(KEYS_LIMIT_BYTES)
                if response.status != 200:
                    raise Malformed(f"HTTP {response.status} instead of keys")
                self._keys, self._keys_at = keys_in(protocol.read_object(body)), self._now()
            return self._keys
