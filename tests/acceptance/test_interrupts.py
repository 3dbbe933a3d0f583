"""Stopped by a signal at any moment, even before the run has started: a documented exit code and a message."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.acceptance.command import environment, finish, jobs_in, start, summary, wait_for, write_manifest


def heeds_signals(pid: int) -> bool:
    """Whether a process has a SIGTERM handler yet; before its first line the signal ends it."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [0.0, 0.2, 0.5, 1.1])
@pytest.mark.parametrize("command", ["plan", "run"])
def test_an_early_stop_is_told(tmp_path, number, after, command):
    """While modules load and while the manifest is read: exit 4 and one message, no stack trace."""
    manifest = write_manifest(tmp_path / "m.csv", range(200_000))
    where = ("-o", tmp_path / "run", "--engine", "echo", "--quiet") if command == "run" else ()
    with start(command, manifest, *where) as process:
        wait_for(lambda: heeds_signals(process.pid), "our first line")
        time.sleep(after)
        process.send_signal(number)
        ended = finish(process)
    assert ended.code == 4, ended.text
    assert "interrupted" in ended.err or "stopped_early" in ended.out, ended.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_the_endpoint_starts_is_not_forgotten(tmp_path, number):
    """Between the plan and the first submit: the run ends without a submit, or collects the few that were sent."""
    manifest = write_manifest(tmp_path / "m.csv", range(200))
    where = ("-o", tmp_path / "run", "--engine", "echo", "--service-time", "1s", "--max-in-flight", "4")
    with start("run", manifest, *where) as process:
        assert process.stdout is not None
        assert any("jobs to do" in line for line in process.stdout)
        process.send_signal(number)
        ended = finish(process)
    assert ended.code == 4, ended.text
    assert "Traceback" not in ended.text
    assert jobs_in(tmp_path / "run", "done") <= 8
    if (tmp_path / "run" / "summary.json").exists():
        assert summary(tmp_path / "run")["reason"] == signal.Signals(number).name


@pytest.mark.parametrize("answer", [signal.SIGINT, signal.SIGTERM, b"\x04", b"n\n"])
def test_a_question_is_left_in_any_way(tmp_path, answer):
    """Ctrl-C, SIGTERM, Ctrl-D and "no" at "Go on?": exit 4, and nothing was sent."""
    manifest = write_manifest(tmp_path / "m.csv", range(3))
    terminal, stdin = pty.openpty()
    command = [sys.executable, "-m", "batch", "run", str(manifest), "-o", str(tmp_path / "run"), "--target", "fal"]
    with subprocess.Popen(
        command, env=environment({"FAL_KEY": "id:secret"}), stdin=stdin, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        shown = ""
        while "[y/N]" not in shown:
            more = process.stdout.read(1)
            assert more, shown
            shown += more
        if isinstance(answer, bytes):
            os.write(terminal, answer)
        else:
            process.send_signal(answer)
        ended = finish(process)
    os.close(terminal)
    os.close(stdin)
    assert (ended.code, jobs_in(tmp_path / "run", "intended", "accepted", "done")) == (4, 0), ended.text
    assert "Traceback" not in ended.text
    assert "defect" not in ended.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_with_nothing_in_flight_ends_at_once(tmp_path, number):
    """The target is unreachable and the images are not uploaded yet: there is nothing to collect."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        Image.new("RGB", (64, 64)).save(tmp_path / "local.png")
        manifest, directory = tmp_path / "m.csv", tmp_path / "run"
        manifest.write_text("image_url,prompt\nlocal.png,one\n")
        with start("run", manifest, "-o", directory, "--target", url) as process:
            assert process.stderr is not None
            line = process.stderr.readline()
            process.send_signal(number)
            began = time.monotonic()
            ended = finish(process)
    assert time.monotonic() - began < 10
    assert (ended.code, jobs_in(directory, "pending", "intended", "accepted")) == (4, 0), ended.text
    assert line.startswith("unreachable: upload of a source image: connect: 127.0.0.1:")
    assert line.endswith("; retrying\n")
    name = signal.Signals(number).name
    assert f"stopping: {name}: collecting jobs in flight; repeat to stop at once" in ended.err
    assert f"stopped early (signal): {name}; run the same command to resume" in ended.out
    assert summary(directory)["reason"] == name
