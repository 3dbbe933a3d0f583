"""A service with the queue protocol over real HTTP and with odd responses as needed. Runs in a thread."""

from __future__ import annotations

import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from batch.fal.endpoint import APP_ID

Sent = tuple[int, bytes, dict[str, str]]
"""Status, body and headers of a response."""


def answer(body: Any, status: int = 200, **headers: str) -> Sent:
    """Return a response with a JSON body; bytes are sent unchanged."""
    return status, body if isinstance(body, bytes) else json.dumps(body).encode(), headers


def jpeg(seed: int) -> bytes:
    """Return a complete image whose pixels depend on a number."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (seed % 256, seed * 7 % 256, 40)).save(buffer, "JPEG")
    return buffer.getvalue()


@dataclass
class OddService:
    """Replace a member with a function to make the service odd; `counts` has the received requests."""

    url: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Requests by id."""
    name: Callable[[int], str] = lambda n: f"request-{n}"
    """Returns the id of the n-th submit, from 1."""
    change: dict[str, Any] = field(default_factory=dict)
    """Replaced fields of the output; `...` removes one."""
    output: Callable[[str], Any] | None = None
    """Returns the whole output of a request."""
    status: Callable[[str, int], Sent] = lambda _, __: answer({"status": "COMPLETED"})
    """Returns the response to the n-th status read of a request."""
    result: Callable[[str, int], Sent | None] = lambda _, __: None
    """Returns the response to the n-th result read of a request; None: its output."""
    image: Callable[[str, int], Sent | None] = lambda _, __: None
    """Returns the response to the n-th read of a request's image; None: the image."""
    submit: Callable[[int], Sent | None] = lambda _: None
    """Returns the response to the n-th submit; None: accepted."""

    @property
    def posts(self) -> int:
        return self.counts["submit"]

    def ok(self, request: str) -> dict[str, Any]:
        """Return the regular output with the changes."""
        given = self.inputs[request]
        whole = {
            "images": [
                {"url": f"{self.url}/files/{request}.jpg", "width": 64, "height": 48, "content_type": "image/jpeg"}
            ],
            "seed": given["seed"],
            "has_nsfw_concepts": [False],
            "timings": {"inference": 0.5},
            "prompt": given["prompt"],
        }
        return {name: value for name, value in (whole | self.change).items() if value is not ...}

    def reply(self, method: str, path: str, body: bytes) -> Sent:
        """Return the response to a request."""
        path = path.partition("?")[0]
        if method == "POST" and path == f"/{APP_ID}":
            self.counts["submit"] += 1
            odd = self.submit(self.counts["submit"])
            if odd is not None:
                return odd
            request = self.name(self.counts["submit"])
            self.inputs[request] = json.loads(body)
            return answer({"request_id": request, "status": "IN_QUEUE"})
        if path.startswith("/files/"):
            request = path.removeprefix("/files/").removesuffix(".jpg")
            n = self._count("image", request)
            return self.image(request, n) or (200, jpeg(self.inputs[request]["seed"]), {"content-type": "image/jpeg"})
        if path.startswith("/v1/models/billing-events"):
            return answer({"billing_events": [], "has_more": False, "next_cursor": None})  # none yet
        _, _, rest = path.partition("/requests/")
        request, _, tail = rest.partition("/")
        if request not in self.inputs:
            return answer({"detail": "not found"}, 404)
        if tail == "status":
            return self.status(request, self._count("status", request))
        output = self.output or self.ok
        return self.result(request, self._count("result", request)) or answer(output(request))

    def _count(self, what: str, request: str) -> int:
        self.counts[what] += 1
        self.counts[f"{what} {request}"] += 1
        return self.counts[f"{what} {request}"]


@contextmanager
def odd_service(**odd: Any) -> Iterator[OddService]:
    """Serve during the block."""
    service, lock = OddService(**odd), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            with lock:
                status, content, headers = service.reply(self.command, self.path, body)
            self.send_response(status)
            for name, value in ({"content-type": "application/json", "content-length": len(content)} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _reply  # noqa: N815 - the names that http.server calls

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
