"""Shared by the acceptance tests: a small finished run, and images on a loopback web server."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.acceptance.command import restyle, write_manifest


class FinishedRun(NamedTuple):
    """Forty finished rows of the echo engine; tests only read this run."""

    manifest: Path
    directory: Path


class ImageServer(NamedTuple):
    """A folder on a web server; each request serves its current content."""

    url: str
    folder: Path
    requests: list[str]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("finished")
    manifest, directory = write_manifest(folder / "forty.csv", range(40)), folder / "run"
    ended = restyle("run", manifest, "-o", directory, "--engine", "echo")
    assert ended.code == 0, ended.text
    return FinishedRun(manifest, directory)


@pytest.fixture
def image_server(tmp_path) -> Iterator[ImageServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    requests: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield ImageServer(f"http://127.0.0.1:{server.server_port}", folder, requests)
        finally:
            server.shutdown()
            thread.join()
