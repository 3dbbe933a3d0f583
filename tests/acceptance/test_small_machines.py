"""Few open files: a run and a server still complete, only later, also after a time without a free descriptor."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from tests.acceptance.command import (
    children,
    finish,
    jobs_in,
    log,
    restyle,
    results,
    start,
    summary,
    wait_for,
    write_manifest,
)
from tests.acceptance.endpoint import APP, INPUT, endpoint

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no such limit on Windows")
ECHO = ("--engine", "echo", "--slots", 300)


def limited(soft: int, hard: int | None = None) -> dict:
    """Return the command that starts a process with this limit of open files."""
    limits = (soft, soft if hard is None else hard)
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits)}


def said_of_files(out: Path) -> dict:
    (line,) = [line for line in log(out) if line["action"] == "open_files"]
    return line


def check_log(out: Path) -> None:
    """Check the endpoint's log: no stack trace, and one line about the limit."""
    text = (out / "endpoint" / "server.log").read_text()
    assert "Traceback" not in text
    assert "unexpected error" not in text
    assert len(re.findall(r"open files: [\d,]+ allowed", text)) == 1


@pytest.mark.parametrize(
    ("limit", "updates"), [(256, "poll"), (128, "poll"), (128, "stream"), (128, "webhook"), (64, "poll")]
)
def test_four_hundred_jobs_with_few_open_files(tmp_path, limit, updates):
    """Three hundred in flight with the default limit of macOS, and with less: each is done at the first attempt."""
    manifest, out = write_manifest(tmp_path / "m.csv", range(400)), tmp_path / "out"
    command = (
        "run",
        manifest,
        "-o",
        out,
        *ECHO,
        "--max-in-flight",
        300,
        "--service-time",
        "500ms",
        "--updates",
        updates,
    )
    ended = restyle(*command, timeout=60, **limited(limit))
    assert ended.code == 0, ended.text
    table = results(out)
    assert set(table["status"].to_pylist()) == {"done"}
    assert set(table["attempts"].to_pylist()) == {1}
    said = said_of_files(out)
    assert said["allowed"] == limit
    assert 0 < said["connections"] < limit
    assert ended.err.count(said["reason"]) == 1
    check_log(out)


def test_the_soft_limit_is_raised(tmp_path):
    """To the hard limit, for the run and its endpoint; then nothing is restricted and nothing is printed."""
    manifest, out = write_manifest(tmp_path / "m.csv", range(20)), tmp_path / "out"
    ended = restyle("run", manifest, "-o", out, *ECHO, **limited(64, 4096))
    assert ended.code == 0, ended.text
    assert said_of_files(out)["reason"] == "open files: 4,096 allowed (raised from 64); at most 256 connections at once"
    assert "open files" not in ended.text
    assert "open files: 4,096 allowed" in (out / "endpoint" / "server.log").read_text()


def test_images_and_workers_with_few_open_files(tmp_path):
    """Local images are read, uploaded, restyled by worker processes and stored."""
    manifest, out = tmp_path / "m.csv", tmp_path / "out"
    for number in range(8):
        Image.new("RGB", (64, 64), (20 * number, 90, 60)).save(tmp_path / f"{number}.png")
    manifest.write_text("image_url,prompt\n" + "".join(f"{n}.png,image {n}\n" for n in range(8)))
    ended = restyle("run", manifest, "-o", out, "--slots", 12, "--max-in-flight", 64, timeout=60, **limited(72))
    assert ended.code == 0, ended.text
    assert results(out)["status"].to_pylist() == ["done"] * 8
    check_log(out)
    assert re.search(r"[2-5] of 12 worker processes", (out / "endpoint" / "server.log").read_text())


@pytest.mark.parametrize(("command", "limit"), [("run", 40), ("run", 24), ("run", 8), ("serve", 40), ("serve", 8)])
def test_too_few_open_files_are_a_sentence(tmp_path, command, limit):
    """The message has the limit and how to raise it; nothing starts."""
    manifest = write_manifest(tmp_path / "m.csv", range(3))
    arguments = {
        "run": ("run", manifest, "-o", tmp_path / "out", *ECHO),
        "serve": ("serve", "--port", 0, "--data-dir", tmp_path / "data"),
    }[command]
    ended = restyle(*arguments, **limited(limit))
    assert ended.code == 2, ended.text
    assert re.search(rf"open files: {limit} are allowed and \d+ are in use, \d+ more are needed", ended.err)
    assert "ulimit -n" in ended.err


# --- a time without free descriptors ------------------------------------------------------------------------


def allow(pid: int, files: int) -> None:
    """Change another process's limit of open files; open ones stay open."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (files, hard))


@contextmanager
def without_files(*pids: int):
    """During the block none of the processes can open a file."""
    for pid in pids:
        allow(pid, 1)
    try:
        yield
    finally:
        for pid in pids:
            allow(pid, 4096)


needs_prlimit = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux only")


@needs_prlimit
@pytest.mark.parametrize("who", ["run", "endpoint", "both"])
def test_a_run_outlives_a_time_without_a_free_descriptor(tmp_path, who):
    """In the run, its endpoint, or the machine: submits, reads, images and the journal wait. No job fails."""
    manifest, out = write_manifest(tmp_path / "m.csv", range(400)), tmp_path / "out"
    command = ("run", manifest, "-o", out, *ECHO, "--service-time", "200ms", "--max-in-flight", 40)
    with start(*command, **limited(4096)) as process:
        wait_for(lambda: jobs_in(out, "done") >= 20, "twenty jobs")
        (server,) = children(process.pid)
        pids = {"run": [process.pid], "endpoint": [server], "both": [process.pid, server]}[who]
        with without_files(*pids):
            time.sleep(1.5)
        ended = finish(process)
    assert ended.code == 0, ended.text
    assert "Traceback" not in ended.text
    table = results(out)
    assert set(table["status"].to_pylist()) == {"done"}
    assert set(table["attempts"].to_pylist()) == {1}
    assert summary(out)["errors"] == {}
    assert "Traceback" not in (out / "endpoint" / "server.log").read_text()


def asked(url: str, body: object = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=8) as answer:
        return json.load(answer)


def completed(url: str, request_id: str) -> bool:
    return asked(f"{url}/fal-ai/flux/requests/{request_id}/status")["status"] == "COMPLETED"


def test_a_server_serves_beyond_its_descriptors(tmp_path):
    """Three times as many connections as it may have, all idle: it answers, and logs it once."""
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (128, 128))
    with endpoint(tmp_path, "--engine", "echo", keyed=False, preexec_fn=limit) as server, ExitStack() as stack:
        host, port = server.url.removeprefix("http://").split(":")
        for _ in range(3 * 128):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=8))
        time.sleep(1.0)
        request_id = asked(f"{server.url}/{APP}", INPUT)["request_id"]
        wait_for(lambda: completed(server.url, request_id), "the request", 8)
        assert asked(f"{server.url}/health")["accepted"] == 1
    text = (tmp_path / "server.log").read_text()
    assert text.count("new ones wait until others are closed") == 1
    assert "ERROR" not in text


@needs_prlimit
def test_a_server_outlives_a_time_without_a_free_descriptor(tmp_path):
    """Clients wait in the kernel's queue and are answered afterwards; the log has a line or two and no stack trace."""
    with endpoint(tmp_path, "--engine", "echo", "--service-time", "300ms", keyed=False) as server:
        request_id = asked(f"{server.url}/{APP}", INPUT)["request_id"]
        with without_files(server.process.pid):
            host, port = server.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), timeout=8) as caller:
                caller.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                caller.settimeout(1.0)
                with pytest.raises(TimeoutError):
                    caller.recv(1)
                allow(server.process.pid, 4096)
                caller.settimeout(8)
                assert caller.recv(12) == b"HTTP/1.1 200"
        wait_for(lambda: completed(server.url, request_id), "the request", 8)
    text = (tmp_path / "server.log").read_text()
    assert text.count("no descriptor is free") == 1
    assert "out of system resource" not in text
