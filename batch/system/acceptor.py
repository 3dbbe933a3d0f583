"""Accept connections within the limit of open files. Owns a listening socket's queue, not the socket.

The server of an event loop accepts every connection. Without a free descriptor asyncio then logs a stack trace each
second, and uvloop accepts connections and closes them, so a client cannot know whether its submit arrived. Here at most
`limit` connections are open, further ones wait in the kernel's queue. Near the limit, answers close their connection,
and idle connections are closed in favour of waiting ones.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from aiohttp import web

from batch.system.descriptors import lacks_descriptor

__all__ = ["Acceptor", "bound"]

_log = logging.getLogger(__name__)

BACKLOG = 2048
_CROWDED = 0.75
"""Share of the limit from which an answer closes its connection."""
IDLE_SECONDS = 1.0
"""Minimum idle time before a connection is closed: a request may be on its way."""
_LOOK_SECONDS = 0.02
"""Between two checks for room."""
_PAUSE_SECONDS = 0.1
"""After a connection could not be accepted."""
_WARN_EVERY = 60.0
"""Seconds between two log lines about the limit."""
_RECOUNT = 64
"""Minimum accepted connections between two counts: a count visits all of them."""
_HANDSHAKE_SECONDS = 20.0
_END_SECONDS = 1.0
"""Time for pending handshakes when the server stops."""
_NOT_LISTENING = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK})


def bound(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        OSError, TypeError: cannot listen at this address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


class Acceptor:
    """Hands connections to an aiohttp server. Use: `watch` its application, then `accepting`.

    Args:
    limit: maximum concurrent connections.
    tls: for https.
    clock: in seconds.
    """

    def __init__(
        self, limit: int, tls: ssl.SSLContext | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit, self._tls, self._clock = limit, tls, clock
        self._server: web.Server | None = None
        self._opening: set[asyncio.Task[None]] = set()
        self._idle: dict[web.RequestHandler, float] = {}
        """Connections without a current request, and since when. Some of them may be closed already."""
        self._counted = self._since = 0
        """Connections at the last count, and the number accepted since."""
        self._warned_at = float("-inf")

    def __repr__(self) -> str:
        return f"<Acceptor {self._counted + self._since} of {self._limit}>"

    @property
    def crowded(self) -> bool:
        """Whether connections should not be kept for later requests."""
        return self._counted + self._since >= _CROWDED * self._limit

    def watch(self, app: web.Application) -> None:
        """Track the idle connections of an application, and let it close connections near the limit."""

        @web.middleware
        async def noting(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            connection = request.protocol
            self._idle.pop(connection, None)
            try:
                return await handler(request)
            finally:
                self._idle[connection] = self._clock()

        async def sparing(_: web.Request, response: web.StreamResponse) -> None:
            if self.crowded:
                response.force_close()
                response.headers["connection"] = "close"  # the headers were built earlier

        app.middlewares.insert(0, noting)
        app.on_response_prepare.append(sparing)

    @asynccontextmanager
    async def accepting(self, listener: socket.socket, server: web.Server) -> AsyncIterator[None]:
        """Accept while the block lasts; connections open at its end stay open."""
        self._server = server
        task = asyncio.create_task(self._accept(listener))
        try:
            yield
        finally:
            task.cancel()
            opening = [task, *self._opening]
            await asyncio.wait(opening, timeout=_END_SECONDS)
            for one in opening:
                one.cancel()  # a slow handshake
            await asyncio.gather(*opening, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            await self._room(listener)
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, InterruptedError):
                await _readable(listener)
                continue
            except OSError as error:
                if error.errno in _NOT_LISTENING:
                    raise
                # Anything else is a missing descriptor, or a connection broken before it was accepted.
                if lacks_descriptor(error):
                    self._warn(f"no descriptor is free ({error.strerror})")
                    self._count()
                    self._close_idle()
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            connection.setblocking(False)
            self._since += 1
            task = asyncio.create_task(self._open(connection))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
            await asyncio.sleep(0)  # lets other tasks run during a flood of connections

    async def _open(self, connection: socket.socket) -> None:
        assert self._server is not None, "use `async with acceptor.accepting(...)`"
        loop = asyncio.get_running_loop()
        seconds = None if self._tls is None else _HANDSHAKE_SECONDS
        try:
            _, handler = await loop.connect_accepted_socket(
                self._server, connection, ssl=self._tls, ssl_handshake_timeout=seconds
            )
        except (OSError, TimeoutError):  # no TLS, or gone: the client's problem
            connection.close()
        else:
            self._idle[handler] = self._clock()

    async def _room(self, listener: socket.socket) -> None:
        """Wait until another connection may be open."""
        if self._since >= max(_RECOUNT, self._counted):
            self._count()
        while self._counted + self._since >= self._limit:
            self._count()
            if self._counted < self._limit:
                return
            await _readable(listener)  # close idle connections only if another one waits
            self._warn(f"all {self._limit:,} connections allowed by the limit of open files are in use")
            self._close_idle()
            await asyncio.sleep(_LOOK_SECONDS)

    def _count(self) -> None:
        assert self._server is not None, "use `async with acceptor.accepting(...)`"
        alive = set(self._server.connections)
        self._idle = {connection: since for connection, since in self._idle.items() if connection in alive}
        self._counted, self._since = len(alive) + len(self._opening), 0

    def _close_idle(self) -> None:
        """Close the connections with the longest idle time, a few at a time."""
        before = self._clock() - IDLE_SECONDS
        waiting = [(since, connection) for connection, since in self._idle.items() if since <= before]
        waiting.sort(key=lambda pair: pair[0])
        for _, connection in [pair for pair in waiting if _awaits_request(pair[1])][: max(1, self._limit // 8)]:
            connection.force_close()

    def _warn(self, what: str) -> None:
        now = self._clock()
        if now - self._warned_at >= _WARN_EVERY:
            self._warned_at = now
            _log.warning("%s: new ones wait until others are closed; raise `ulimit -n` to serve more at once", what)


async def _readable(listener: socket.socket) -> None:
    """Wait until there is a connection to accept."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(listener, ready.set)
    except NotImplementedError:  # on Windows
        await asyncio.sleep(_LOOK_SECONDS)
        return
    try:
        await ready.wait()
    finally:
        loop.remove_reader(listener)


def _awaits_request(connection: web.RequestHandler) -> bool:
    """Return whether all requests are answered completely. A handler returns before its file is sent."""
    with suppress(AttributeError):  # no public API; aiohttp's own keep-alive timer uses the same attribute
        waiter = connection._waiter  # noqa: SLF001
        return waiter is not None and not waiter.done()
    return False
