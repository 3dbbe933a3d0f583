"""The key is sent to the target only, in one header."""

from __future__ import annotations

import io
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from batch.fal.endpoint import APP_ID
from tests.acceptance.command import REPOSITORY, restyle, results, write_manifest

SECRET = "marker-secret-5f3a9c"
KEY = f"marker-id-77:{SECRET}"


@dataclass
class Server:
    """A loopback server and the requests that it received: (method, path, Authorization)."""

    url: str
    received: list[tuple[str, str, str | None]] = field(default_factory=list)

    def keys(self) -> set[str | None]:
        return {key for _, _, key in self.received}


Answer = Callable[[str, str], tuple[int, dict[str, str], bytes]]


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    """`answer` returns (status, headers, body) for a method and a path."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            server.received.append((self.command, self.path, self.headers.get("authorization")))
            status, headers, body = answer(self.command, self.path)
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = _handle  # noqa: N815 - the base class's names

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server = Server(f"http://127.0.0.1:{http.server_port}")
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


def image_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
    return buffer.getvalue()


def store(method: str, path: str) -> tuple[int, dict[str, str], bytes]:
    """A third party's server: it receives and serves images, and must not get a key."""
    return 200, {"content-type": "image/png"}, image_bytes() if method == "GET" else b""


def target(elsewhere: str, **special: tuple[int, dict[str, str], bytes]) -> Answer:
    """The minimum of the queue protocol; all of its URLs point elsewhere."""

    def said(value: object) -> tuple[int, dict[str, str], bytes]:
        return 200, {"content-type": "application/json"}, json.dumps(value).encode()

    def answer(method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        if path == "/health":
            return 404, {}, b""
        if "initiate" in path:
            return said({"upload_url": f"{elsewhere}/upload", "file_url": f"{elsewhere}/source.png"})
        if method == "POST":
            urls = {name: f"{elsewhere}/{name}" for name in ("status_url", "response_url", "cancel_url")}
            return special.get("submit") or said({"request_id": str(uuid.uuid4()), "status": "IN_QUEUE", **urls})
        if path.endswith("/status"):
            return special.get("status") or said({"status": "COMPLETED"})
        images = [{"url": f"{elsewhere}/result.png", "content_type": "image/png"}]
        return special.get("result") or said({"images": images, "seed": 1, "prompt": "a"})

    return answer


def run(tmp_path, server: Server, *options: str, local_image: bool = False):
    manifest = write_manifest(tmp_path / "m.csv", range(2))
    if local_image:
        cat = REPOSITORY / "manifests" / "images" / "cat.jpg"
        manifest.write_text(f"image_url,prompt\n{cat},a cat\n{cat},a dog\n")
    return restyle("run", manifest, "-o", tmp_path / "run", "--target", server.url, *options, env={"FAL_KEY": KEY})


def nothing_kept(tmp_path, ended) -> None:
    """Check that the key is neither in a file of the run directory nor on the terminal."""
    assert SECRET not in ended.text
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"journal.db", "log.jsonl", "run.json"} <= {path.name for path in files}
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path


def test_the_key_goes_to_the_target_only_and_is_written_nowhere(tmp_path):
    """Submit, status, result and the start of an upload have it; foreign URLs in the responses do not."""
    with serving(store) as elsewhere, serving(target(elsewhere.url)) as own:
        ended = run(tmp_path, own, local_image=True)
        assert ended.code == 0, ended.text
    assert results(tmp_path / "run")["status"].to_pylist() == ["done", "done"]
    assert own.keys() - {None} == {f"Key {KEY}"}
    assert [path for _, path, key in own.received if key is None] == ["/health"]
    assert sum(method == "POST" and path == f"/{APP_ID}" for method, path, _ in own.received) == 2
    assert [path for _, path, _ in elsewhere.received] == ["/upload", "/result.png", "/result.png"]
    assert elsewhere.keys() == {None}
    nothing_kept(tmp_path, ended)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"results.parquet", "summary.json"} <= names


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_stops_the_run_and_is_not_repeated(tmp_path, status):
    """Exit 6 after one submit, with the service's message, even if it contains the key."""
    body = json.dumps({"detail": f"Cannot access application: key {KEY} is not authorized"}).encode()
    refusal = (status, {"content-type": "application/json"}, body)
    with serving(store) as elsewhere, serving(target(elsewhere.url, submit=refusal)) as own:
        ended = run(tmp_path, own, "--max-in-flight", "1")
    assert ended.code == 6, ended.text
    assert "account refused" in ended.out
    assert "is not authorized" in ended.out
    assert sum(method == "POST" for method, _, _ in own.received) == 1
    assert results(tmp_path / "run")["status"].to_pylist() == ["pending", "pending"]
    nothing_kept(tmp_path, ended)


def test_an_error_of_the_job_that_echoes_the_key_is_kept_without_it(tmp_path):
    """A careless service must not put the key into our journal."""
    body = json.dumps({"detail": [{"loc": ["header"], "msg": f"Authorization: Key {KEY}", "type": "odd"}]}).encode()
    with (
        serving(store) as elsewhere,
        serving(target(elsewhere.url, result=(422, {"content-type": "application/json"}, body))) as own,
    ):
        ended = run(tmp_path, own)
    assert ended.code == 3, ended.text
    assert results(tmp_path / "run")["error_type"].to_pylist() == ["odd", "odd"]
    nothing_kept(tmp_path, ended)


@pytest.mark.parametrize("phase", ["submit", "status", "result"])
def test_a_redirect_to_another_origin_gets_no_key(tmp_path, phase):
    """It is not followed: a response from elsewhere says nothing about the job."""
    with serving(store) as elsewhere:
        redirect = (302, {"location": f"{elsewhere.url}/catch"}, b"")
        with serving(target(elsewhere.url, **{phase: redirect})) as own:
            ended = run(tmp_path, own, "--deadline", "1s")
    assert ended.code == 4, ended.text
    assert elsewhere.received == []
    statuses = results(tmp_path / "run")["status"].to_pylist()
    assert statuses == (["unknown", "unknown"] if phase == "submit" else ["pending", "pending"])
    nothing_kept(tmp_path, ended)


def test_without_a_key_none_is_sent(tmp_path):
    """A self-hosted server needs no key."""
    with serving(store) as elsewhere, serving(target(elsewhere.url)) as own:
        ended = restyle(
            "run", write_manifest(tmp_path / "m.csv", range(2)), "-o", tmp_path / "run", "--target", own.url
        )
    assert ended.code == 0, ended.text
    assert own.keys() == elsewhere.keys() == {None}


def test_the_embedded_endpoint_is_never_given_the_key(tmp_path):
    """It needs no key, and its log and files do not contain one."""
    manifest = write_manifest(tmp_path / "m.csv", range(2))
    ended = restyle("run", manifest, "-o", tmp_path / "run", "--engine", "echo", env={"FAL_KEY": KEY})
    assert ended.code == 0, ended.text
    nothing_kept(tmp_path, ended)
