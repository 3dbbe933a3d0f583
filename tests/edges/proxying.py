"""A real HTTP proxy on loopback: it tunnels CONNECT, forwards plain requests and records the targets."""

from __future__ import annotations

import base64
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

__all__ = ["Proxy", "proxy"]


@dataclass
class Proxy:
    """A running proxy."""

    url: str
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Method and target of each request as received; the target is an authority (CONNECT) or a full URL."""

    def with_user(self, user: str) -> str:
        """Return the proxy URL with credentials; `user` is `name:password`."""
        return self.url.replace("http://", f"http://{user}@")


@contextmanager
def proxy(port: int, user: str | None = None) -> Iterator[Proxy]:
    """Run a proxy for the duration of the block.

    Args:
        port: local port to which the proxy connects for every target host and port.
        user: required credentials, `name:password`.
    """

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            head, rest = _head_of(self.request)
            if not head:
                return
            method, target, _ = head.split("\r\n", 1)[0].split(" ", 2)
            running.asked.append((method, target))
            if user is not None and f"Basic {base64.b64encode(user.encode()).decode()}" not in head:
                self.request.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nconnection: close\r\n\r\n")
                return
            with socket.create_connection(("127.0.0.1", port)) as upstream:
                if method == "CONNECT":
                    self.request.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                else:
                    path = "/" + target.split("/", 3)[3]
                    lines = [line for line in head.split("\r\n")[1:] if not line.lower().startswith("proxy-")]
                    upstream.sendall("\r\n".join([f"{method} {path} HTTP/1.1", "connection: close", *lines]).encode())
                upstream.sendall(rest)
                back = threading.Thread(target=_copy, args=(upstream, self.request), daemon=True)
                back.start()
                _copy(self.request, upstream)
                back.join()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 128
        block_on_close = False

        def handle_error(self, *_: object) -> None:
            """Ignore clients that disconnect."""

    with Server(("127.0.0.1", 0), Handler) as server:
        running = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield running
        finally:
            server.shutdown()
            thread.join()


def _head_of(connection: socket.socket) -> tuple[str, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        if not (chunk := connection.recv(65536)):
            return "", b""
        data += chunk
    head, _, rest = data.partition(b"\r\n\r\n")
    return head.decode() + "\r\n\r\n", rest


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while chunk := source.recv(65536):
            target.sendall(chunk)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
