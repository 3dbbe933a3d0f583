"""Runs behind a proxy: all requests to other hosts use it, none to this machine."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from PIL import Image

from tests.acceptance.command import jobs_in, log, restyle, results, write_manifest
from tests.acceptance.endpoint import endpoint
from tests.certificate import certificate
from tests.edges.proxying import proxy

FAR = "far.test"
"""A host name that only the proxy resolves."""


def local_images(folder: Path) -> Path:
    """Write a manifest with two images to upload."""
    for number in range(2):
        Image.new("RGB", (64, 64), (90 * number, 90, 60)).save(folder / f"{number}.png")
    path = folder / "m.csv"
    path.write_text("image_url,prompt\n0.png,a cat\n1.png,a dog\n")
    return path


def kinds(asked: list[tuple[str, str]]) -> set[str]:
    """Return the purposes of the requests."""
    known = {
        r"POST http://\S+/fal-ai/flux/dev/image-to-image": "submit",
        r"GET http://\S+/requests/[^/]+/status(\?\S*)?": "status",
        r"GET http://\S+/requests/[^/]+/status/stream": "stream",
        r"GET http://\S+/requests/[^/]+": "result",
        r"POST http://\S+/storage/upload/initiate\S*": "initiate",
        r"PUT http://\S+/storage/upload/\S+": "upload",
        r"GET http://\S+/files/\S+": "download",
        r"GET http://\S+/v1/models/pricing\S*": "price",
        r"GET http://\S+/health": "health",
    }
    lines = [f"{method} {target}" for method, target in asked]
    return {next((name for form, name in known.items() if re.fullmatch(form, line)), line) for line in lines}


def test_every_call_to_another_host_goes_through_the_proxy(tmp_path):
    """Submit, status, stream, result, upload, download, price, and the check for idempotency keys."""
    with (
        endpoint(tmp_path, "--engine", "echo", "--service-time", "700ms", "--price", 0.03) as server,
        proxy(int(server.url.rpartition(":")[2]), "me:pass-word") as between,
    ):
        target, out = f"http://{FAR}:8787", tmp_path / "out"
        env = {"FAL_KEY": server.key, "HTTP_PROXY": between.with_user("me:pass-word"), "NO_PROXY": "other.test"}
        manifest = local_images(tmp_path)
        ended = restyle("run", manifest, "-o", out, "--target", target, "--updates", "stream", env=env)
        assert ended.code == 0, ended.text
        assert results(out)["status"].to_pylist() == ["done", "done"]
        planned = restyle("plan", manifest, "--target", target, "--live-price", env=env)
        assert planned.code == 0, planned.text
    assert all(f"http://{FAR}:8787/" in asked for _, asked in between.asked)
    needed = {"submit", "stream", "result", "initiate", "upload", "download", "price", "health"}
    assert needed <= kinds(between.asked) <= needed | {"status"}
    written = "".join(path.read_text() for path in (out / "log.jsonl", out / "summary.json", out / "run.json"))
    assert "pass-word" not in ended.text + planned.text + written


def test_a_tunnel_is_used_for_https(tmp_path):
    """CONNECT, with the target's certificate verified inside the tunnel: the proxy sees no key."""
    cert, key = certificate(tmp_path, FAR)
    with (
        endpoint(tmp_path, "--engine", "echo", "--tls-cert", cert, "--tls-key", key) as server,
        proxy(int(server.url.rpartition(":")[2])) as between,
    ):
        env = {"FAL_KEY": server.key, "HTTPS_PROXY": between.url, "SSL_CERT_FILE": str(cert)}
        out = tmp_path / "out"
        ended = restyle("run", local_images(tmp_path), "-o", out, "--target", f"https://{FAR}:8443", env=env)
        assert ended.code == 0, ended.text
        assert results(out)["status"].to_pylist() == ["done", "done"]
    assert set(between.asked) == {("CONNECT", f"{FAR}:8443")}


def test_nothing_for_this_machine_goes_through_the_proxy(tmp_path):
    """The embedded endpoint and a server at localhost, and the images that they fetch."""
    manifest = write_manifest(tmp_path / "m.csv", range(2))
    with (
        endpoint(tmp_path, "--engine", "echo", keyed=False) as server,
        proxy(int(server.url.rpartition(":")[2])) as between,
    ):
        env = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy"), between.url)
        near = server.url.replace("127.0.0.1", "localhost")
        for out, target in (("embedded", ("--engine", "echo")), ("served", ("--target", near))):
            ended = restyle("run", manifest, "-o", tmp_path / out, *target, env=env)
            assert ended.code == 0, ended.text
    assert between.asked == []


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_refuses_the_user_leaves_submits_unsent(tmp_path, scheme):
    """The request was not forwarded, so no job is unknown. The message has the reason, not the password."""
    manifest, out = write_manifest(tmp_path / "m.csv", range(2)), tmp_path / "out"
    with proxy(1, "me:right") as between:
        env = {"FAL_KEY": "id:key-secret", f"{scheme.upper()}_PROXY": between.with_user("me:wrong-word")}
        command = ("run", manifest, "-o", out, "--target", f"{scheme}://{FAR}", "--deadline", "2s")
        ended = restyle(*command, env=env)
    assert ended.code == 4, ended.text
    assert jobs_in(out, "unknown") == 0
    assert "the proxy requires a user and a password" in ended.err
    text = ended.text + (out / "log.jsonl").read_text()
    assert "wrong-word" not in text
    assert "key-secret" not in text


def test_a_proxy_that_is_not_there_is_said_without_its_password(tmp_path):
    """Its port is closed: submits wait, and the message has only host and port."""
    manifest, out = write_manifest(tmp_path / "m.csv", range(2)), tmp_path / "out"
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        env = {"FAL_KEY": "id:key-secret", "HTTP_PROXY": f"http://me:pass-word@127.0.0.1:{port}"}
        ended = restyle("run", manifest, "-o", out, "--target", f"http://{FAR}", "--deadline", "2s", env=env)
    assert ended.code == 4, ended.text
    assert jobs_in(out, "unknown") == 0
    assert f"127.0.0.1:{port}" in ended.err
    assert "pass-word" not in ended.text + "".join(map(str, log(out)))


def test_a_socks_proxy_stops_the_run_before_anything_is_sent(tmp_path):
    """It is not bypassed silently; a run on this machine needs no proxy."""
    manifest, env = write_manifest(tmp_path / "m.csv", range(2)), {"ALL_PROXY": "socks5://me:pass-word@127.0.0.1:1"}
    ended = restyle("run", manifest, "-o", tmp_path / "out", "--target", f"http://{FAR}", env=env)
    assert ended.code == 2, ended.text
    assert "ALL_PROXY names a SOCKS proxy" in ended.err
    assert "pass-word" not in ended.text
    assert restyle("run", manifest, "-o", tmp_path / "here", "--engine", "echo", env=env).code == 0
