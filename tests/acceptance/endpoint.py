"""`restyle serve` in a separate process with a key, and a receiver of its callbacks."""

from __future__ import annotations

import io
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from batch.fal.endpoint import APP_ID
from batch.fal.signing import keys_in, verify
from batch.server.http.auth import add_key
from tests.acceptance.command import environment

APP = str(APP_ID)
INPUT = {"image_url": "https://images.example/cat.png", "prompt": "a cat as a watercolor"}


@dataclass(frozen=True)
class Endpoint:
    """A running server."""

    url: str
    key: str
    """The key of its only caller; empty if it needs none."""
    process: subprocess.Popen[str]


@contextmanager
def endpoint(folder: Path, *options: object, keyed: bool = True, **process_options: object) -> Iterator[Endpoint]:
    """Run `restyle serve` in `folder` during the block. Without `keyed` it needs no key."""
    key, flags = "", [*map(str, options)]
    if keyed:
        keys = folder / "keys"
        key = add_key(keys, "tester", "secret of the tester")
        flags += ["--keys", str(keys)]
    command = [sys.executable, "-m", "batch", "serve", "--port", "0", "--data-dir", str(folder / "data"), *flags]
    log = folder / "server.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            **process_options,  # type: ignore[call-overload]
        ) as process,
    ):
        try:
            line = process.stdout.readline()
            found = re.search(r"https?://\S+", line)
            assert found, f"the server did not start: {line}{log.read_text()}"
            yield Endpoint(found[0], key, process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=20)
            finally:
                process.kill()
    assert "Traceback" not in log.read_text(), log.read_text()


def image_bytes(color: str = "orange") -> bytes:
    """Return a small PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", (320, 256), color).save(buffer, "PNG")
    return buffer.getvalue()


def large_file(path: Path, mebibytes: int) -> Path:
    """Write a file of this size, sparse except a few bytes per MiB, so that swapped parts are detected."""
    marks = random.Random(7)
    with path.open("wb") as file:
        for number in range(mebibytes):
            file.seek((number << 20) + 12_345)
            file.write(marks.randbytes(16))
        file.truncate(mebibytes << 20)
    return path


def is_same(url: str, path: Path) -> bool:
    """Whether a URL serves exactly this file; neither is loaded into memory."""
    with urllib.request.urlopen(url) as answer, path.open("rb") as file:
        while chunk := file.read(1 << 20):
            if answer.read(len(chunk)) != chunk:
                return False
        return answer.read(1) == b""


@dataclass
class Callbacks:
    """Received webhooks: headers and raw body of each call."""

    url: str
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    came: threading.Event = field(default_factory=threading.Event)

    def one(self) -> tuple[dict[str, str], bytes]:
        """Wait for the first call."""
        assert self.came.wait(20), "no callback arrived"
        return self.received[0]


@contextmanager
def callbacks() -> Iterator[Callbacks]:
    """Listen on loopback during the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            found.received.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(200)
            self.end_headers()
            found.came.set()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Callbacks(f"http://127.0.0.1:{server.server_port}/hook?job=7")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def tunnel(port: int) -> Iterator[tuple[str, list[str]]]:
    """Run a CONNECT proxy on loopback that maps every name to a local port; yield its URL and the requested names."""
    names: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_CONNECT(self):
            names.append(self.path)
            with socket.create_connection(("127.0.0.1", port)) as upstream:
                self.send_response(200)
                self.end_headers()
                self.close_connection = True
                back = threading.Thread(target=copy, args=(upstream, self.connection))
                back.start()
                copy(self.connection, upstream)
                back.join()

        def log_message(self, *_):
            pass

    def copy(source, target):
        with suppress(OSError):
            while chunk := source.recv(65536):
                target.sendall(chunk)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", names
        finally:
            server.shutdown()
            thread.join()


def believed(server: Endpoint, headers: dict[str, str], body: bytes) -> dict:
    """Return the callback after checking its signature with the keys that the server publishes."""
    with urllib.request.urlopen(server.url + "/.well-known/jwks.json") as answer:
        keys = keys_in(json.load(answer))
    said = json.loads(body)
    assert verify(headers, body, keys, now=time.time()) == said["request_id"]
    return said
