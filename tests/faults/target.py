"""A small target on loopback: real HTTP, responses defined by the test, and a record of all requests.

Unlike our server it has no idempotency keys, so that a lost response is really lost, and it can be as hostile as a test
needs. It runs in a thread; the run is another process.
"""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeAlias
from uuid import UUID

import orjson
from aiohttp import web
from PIL import Image

APP = "fal-ai/flux/dev/image-to-image"
Handler: TypeAlias = Callable[["Target", web.Request, "Asked"], Awaitable[web.StreamResponse]]


@dataclass
class Asked:
    """An accepted request."""

    id: str
    body: dict
    at: float


@dataclass
class Target:
    """A target that behaves well unless a test provides a handler.

    Handlers are per phase: `submit`, `status`, `result`, `file`, `listing`, `billing`, `initiate`, `put`, `health`,
    `cancel` (which has no default). A handler may raise `Lost` to close the connection without a response.
    """

    handlers: dict[str, Handler] = field(default_factory=dict)
    url: str = ""
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    """Method, path with query, headers and body of every request."""
    requests: dict[str, Asked] = field(default_factory=dict)

    def posts(self) -> int:
        """Number of received submits."""
        return sum(method == "POST" and path == f"/{APP}" for method, path, _, _ in self.seen)

    def keys_shown(self) -> list[str]:
        """Requests that contained a key."""
        return [path for _, path, headers, _ in self.seen if "authorization" in headers]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.seen.append((request.method, request.raw_path, headers, body))
        parts = request.path.strip("/").split("/")
        phase, asked = "other", Asked("", {}, 0.0)
        if request.method == "POST" and request.path == f"/{APP}":
            phase, asked = "submit", self._accept(orjson.loads(body))
        elif request.path.startswith("/fal-ai/flux/requests/"):
            phase = parts[-1] if parts[-1] in {"status", "cancel"} else "result"
            asked = self.requests.get(parts[3], asked)
        elif parts[0] in {"file", "put", "health"}:
            phase, asked = parts[0], self.requests.get(parts[-1].partition(".")[0], asked)
        elif request.path.startswith("/v1/models/requests"):
            phase = "listing"
        elif request.path.startswith("/v1/models/billing-events"):
            phase = "billing"
        elif request.path.startswith("/storage/upload/initiate"):
            phase = "initiate"
        handler = self.handlers.get(phase) or DEFAULTS.get(phase)
        if handler is None:
            return answer({"detail": "Not found"}, 404)
        try:
            return await handler(self, request, asked)
        except Lost:
            assert request.transport is not None
            request.transport.close()
            return web.Response()

    def _accept(self, body: dict) -> Asked:
        now = time.time()
        number = UUID(int=int(now * 1000) << 80 | 7 << 76 | 2 << 62 | len(self.requests) + 1)
        asked = self.requests[str(number)] = Asked(str(number), body, now)
        return asked


class Lost(Exception):
    """The response is lost: the connection is closed instead."""


def answer(value: object, status: int = 200, **headers: str) -> web.Response:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json", headers=named)


def raw(text: bytes, status: int = 200) -> web.Response:
    return web.Response(status=status, body=text, content_type="application/json")


def image_bytes(colour: int = 7, size: tuple[int, int] = (16, 8), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour % 256, 80, 120)).save(buffer, kind)
    return buffer.getvalue()


def output(target: Target, asked: Asked, **changed: object) -> dict:
    """Return the output of a well-behaved result."""
    image = {"url": f"{target.url}/file/{asked.id}.png", "width": 16, "height": 8, "content_type": "image/png"}
    return {"images": [image], "seed": asked.body["seed"], "prompt": asked.body["prompt"], "timings": {}} | changed


async def submit(target: Target, request: web.Request, asked: Asked) -> web.StreamResponse:
    return answer({"request_id": asked.id, "status": "IN_QUEUE", "queue_position": 0})


async def status(target: Target, request: web.Request, asked: Asked) -> web.StreamResponse:
    if not asked.id:
        return answer({"status": "NOT_FOUND"}, 404)
    return answer({"request_id": asked.id, "status": "COMPLETED", "logs": [], "metrics": {"inference_time": 0.1}})


async def result(target: Target, request: web.Request, asked: Asked) -> web.StreamResponse:
    return answer(output(target, asked), x_fal_billable_units="1")


async def file(target: Target, request: web.Request, asked: Asked) -> web.StreamResponse:
    return web.Response(body=image_bytes(int(asked.body["seed"])), content_type="image/png")


async def initiate(target: Target, request: web.Request, asked: Asked) -> web.StreamResponse:
    return answer({"upload_url": f"{target.url}/put/1", "file_url": f"{target.url}/source/1.png"})


async def put(target: Target, request: web.Request, asked: Asked) -> web.StreamResponse:
    return web.Response()


async def listing(target: Target, request: web.Request, asked: Asked) -> web.StreamResponse:
    """Return all requests of the time window, page by page, like the platform API."""
    size, number = int(request.query["limit"]), int(request.query.get("cursor", 0))
    start, end = (datetime.fromisoformat(request.query[name]).timestamp() for name in ("start", "end"))
    found = [asked for asked in target.requests.values() if start <= asked.at < end]
    page = [listed(asked) for asked in found[number * size : (number + 1) * size]]
    more = len(found) > (number + 1) * size
    return answer({"items": page, "has_more": more, "next_cursor": str(number + 1) if more else None})


async def billing(target: Target, request: web.Request, asked: Asked) -> web.StreamResponse:
    """Return an empty page: billing lags at fal, too. An audit repeats requests that get anything else."""
    return answer({"billing_events": [], "has_more": False, "next_cursor": None})


def listed(asked: Asked) -> dict:
    """Return one request of the listing, with defaults."""
    at = datetime.fromtimestamp(asked.at, UTC).isoformat()
    shown = {"sync_mode": False, **asked.body}
    return {"request_id": asked.id, "endpoint_id": APP, "sent_at": at, "started_at": at, "json_input": shown}


DEFAULTS: dict[str, Handler] = {
    "submit": submit, "status": status, "result": result, "file": file, "initiate": initiate, "put": put,
    "listing": listing, "billing": billing,
}  # fmt: skip


@contextmanager
def serving(**handlers: Handler) -> Iterator[Target]:
    """Run a target during the block."""
    target, ready, loop = Target(handlers), threading.Event(), asyncio.new_event_loop()
    stop: list[asyncio.Event] = []

    async def main() -> None:
        app = web.Application(client_max_size=2**28)
        app.router.add_route("*", "/{path:.*}", target.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        target.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        stop.append(asyncio.Event())
        ready.set()
        await stop[0].wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), name="target")
    thread.start()
    assert ready.wait(20)
    try:
        yield target
    finally:
        loop.call_soon_threadsafe(stop[0].set)
        thread.join(20)
        with suppress(RuntimeError):
            loop.close()
