"""Status streams: the target reports the end of a request at once. One connection per job in flight.

Implements `batch.run.interfaces.CompletionHints`. An event is only a hint to read; its contents are not used. A stream
that is refused, breaks, falls silent or sends invalid data is not reopened: its job is then polled as if there were no
streams. Streams use their own connections, so no other exchange waits for one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import anyio
import anyio.abc
from pydantic import SecretStr

from batch.fal import protocol
from batch.fal.http import Http, within
from batch.fal.protocol import Malformed, Operation, Origins, Reply
from batch.system.descriptors import HINTS
from batch.types import AppId, QueueState, RequestId, Ticket, TicketStatus

__all__ = ["StatusStreams"]

SILENCE = 35.0
"""Seconds without data. fal sends a keep-alive every 15 s, our own server every 10 s: one or two may be lost."""
EVENT_LIMIT_BYTES = 2**18
"""Maximum size of one event. A status without logs is a few hundred bytes."""


class _JobStream:
    """One job's stream."""

    __slots__ = ("changed", "is_open", "is_over", "scope")

    def __init__(self, *, is_open: bool) -> None:
        self.is_open = is_open
        """Whether the stream is still open."""
        self.is_over = False
        """Whether it reported the end of the job, and no waiter has seen that yet."""
        self.changed = anyio.Event()
        """Set when `is_open` or `is_over` changes."""
        self.scope = anyio.CancelScope()


class StatusStreams:
    """Listens for the end of every awaited request; an async context manager."""

    def __init__(
        self, origins: Origins, app: AppId, key: SecretStr | None, *, user_agent: str = "restyle", most: int = HINTS
    ) -> None:
        """Open at most `most` streams at once; further jobs are only polled."""
        self._origins, self._app, self._key = origins, app, key
        self._most = most
        headers = {"accept": "text/event-stream"}
        self._http = Http(limit=most, timeout=within(None, SILENCE), user_agent=user_agent, headers=headers)
        self._lines: dict[RequestId, _JobStream] = {}
        self._open = 0
        self._stack = AsyncExitStack()
        self._tasks: anyio.abc.TaskGroup | None = None

    def __repr__(self) -> str:
        return f"<Streams {self._open} open, key={'set' if self._key else 'none'}>"

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._http)
        self._tasks = await self._stack.enter_async_context(anyio.create_task_group())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()
        await self._stack.__aexit__(None, None, None)

    async def wait(self, ticket: Ticket, usual: float, longest: float) -> bool:
        """See `CompletionHints`: waits up to `longest` with a stream, up to `usual` without."""
        line = self._lines.get(ticket.request_id) or self._listen_to(ticket)
        began = anyio.current_time()
        if line.is_open and not line.changed.is_set():
            with anyio.move_on_after(longest) as scope:
                await line.changed.wait()
            if scope.cancelled_caught:
                return False
        if line.is_over:
            line.is_over = False
            return True
        await anyio.sleep(max(0.0, usual - (anyio.current_time() - began)))
        return False

    def forget(self, ticket: Ticket) -> None:
        """Close the stream."""
        line = self._lines.pop(ticket.request_id, None)
        if line is not None:
            line.scope.cancel()

    def _listen_to(self, ticket: Ticket) -> _JobStream:
        assert self._tasks is not None, "use `async with Streams(...)`"
        line = self._lines[ticket.request_id] = _JobStream(is_open=self._open < self._most)
        if line.is_open:
            self._open += 1
            self._tasks.start_soon(self._listen, ticket, line)
        return line

    async def _listen(self, ticket: Ticket, line: _JobStream) -> None:
        """Read one stream until it ends for any reason."""
        try:
            with line.scope:
                async for status in self._events(ticket):
                    if status.state is QueueState.COMPLETED:
                        line.is_over = True
                    if status.state in {QueueState.COMPLETED, None}:  # an unknown word may mean an end
                        break
        except Exception:  # noqa: S110 - nothing depends on a stream: without it, the job is polled
            pass
        finally:
            self._open -= 1
            line.is_open = False
            line.changed.set()

    async def _events(self, ticket: Ticket) -> AsyncIterator[TicketStatus]:
        """Yield the statuses of one stream.

        Raises:
            Malformed: it is not a stream of statuses. aiohttp.ClientError, TimeoutError, OSError: it broke.
        """
        call = protocol.ticket_call(self._origins, self._app, ticket, Operation.STREAM)
        headers = {}
        if self._key is not None and self._origins.own(call.url):
            headers["authorization"] = f"Key {self._key.get_secret_value()}"
        async with self._http.request("GET", call.url, headers=headers) as response:
            if response.status != 200 or response.content_type != "text/event-stream":
                raise Malformed(f"HTTP {response.status}, {response.content_type}: not a stream")
            data = b""
            async for line in response.content:
                field, _, value = line.rstrip(b"\r\n").partition(b":")
                if field == b"data":
                    data += value
                    if len(data) > EVENT_LIMIT_BYTES:
                        raise Malformed(f"an event exceeds {EVENT_LIMIT_BYTES} bytes")
                elif not line.strip() and data:  # an empty line ends an event; comments keep the connection alive
                    yield protocol.read_status(Reply(200, data))
                    data = b""
