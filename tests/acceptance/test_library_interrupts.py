"""Ctrl-C and cancellation of a run in a program: no further submit, what is in flight is collected for a bounded time,
journal and results are whole, and the same call goes on. In a script, a notebook, a thread and an event loop.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from batch import api
from batch.errors import ExitCode, RunLocked
from batch.run.ports import Observer
from tests.acceptance.command import environment, finish, log, results, summary, wait_for, write_manifest
from tests.faults import target as targets

ROWS = 40
AT_ONCE = 2
SERVICE = 0.3


def slow(seconds: float):
    """A status that says for so long that the request is worked on."""

    async def status(target, request, asked):
        if time.time() < asked.at + seconds:
            return targets.answer({"request_id": asked.id, "status": "IN_PROGRESS", "logs": []}, 202)
        return await targets.status(target, request, asked)

    return status


@pytest.fixture
def manifest(tmp_path):
    return write_manifest(tmp_path / "m.csv", range(ROWS))


@pytest.fixture
def service():
    """A target that counts; jobs take `SERVICE` seconds until a test changes that."""
    with targets.serving(status=slow(SERVICE)) as target:
        yield target


def settings_for(target, **limits):
    return {"target": {"name": target.url}, "limits": {"max_in_flight": AT_ONCE, **limits}}


def whole(directory: Path, service, *, reason: str | None = None, stopped: str = "signal") -> None:
    """Journal and results of a stopped run agree, and say why it stopped."""
    told = summary(directory)
    table = results(directory)
    assert table.num_rows == told["rows"] == ROWS
    words = table["status"].to_pylist()
    assert [words.count(word) for word in ("done", "pending", "unknown")] == [
        told["done"], told["pending"], told["unknown"],
    ]  # fmt: skip
    assert (told["stopped"], told["exit_code"]) == (stopped, ExitCode.STOPPED_EARLY)
    assert reason is None or told["reason"] == reason
    books = api.audit_sync(directory)
    assert books.add_up or told["unknown"] or told["pending"] < ROWS - told["done"], books
    assert service.posts() < ROWS


def completes(manifest: Path, directory: Path, service) -> None:
    """The same call does the rest, fast: each job was submitted exactly once over both."""
    service.handlers["status"] = targets.status
    ended = api.run_sync(manifest, directory, settings=settings_for(service, max_in_flight=16))
    assert (ended.exit_code, ended.done) == (ExitCode.COMPLETE, ROWS)
    assert service.posts() == len(service.requests) == ROWS
    assert api.audit_sync(directory).add_up


def late(service, since: float) -> list[float]:
    """Submits that arrived later than it takes to stop."""
    return [asked.at - since for asked in service.requests.values() if asked.at > since + 0.5]


@contextmanager
def interrupting(service, *, after: int = 4, times: int = 1, pause: float = 0.3, send=None):
    """Send this process SIGINT when so many submits came; the moment of the first."""
    moments: list[float] = []

    def work():
        wait_for(lambda: len(service.requests) >= after, "the submits", timeout=20)
        for _ in range(times):
            moments.append(time.time())
            (send or (lambda: os.kill(os.getpid(), signal.SIGINT)))()
            time.sleep(pause)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield moments
    finally:
        thread.join()


# --- a script ---------------------------------------------------------------------------------------------


SCRIPT = """
from batch.api import run_sync
run_sync({manifest!r}, {out!r}, settings={settings!r})
print("went on")
"""


def script(text: str, **values) -> subprocess.Popen[str]:
    """Python text in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text).format(**values)],
        env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def interrupted_script(text, service, manifest, out, *, times=1, pause=0.3, **limits):
    """How it ended, when the first signal was sent, and how long it took from then."""
    with script(
        text, manifest=str(manifest), out=str(out), settings=settings_for(service, **limits)
    ) as process:
        wait_for(lambda: len(service.requests) >= 4 or process.poll() is not None, "the submits")
        began = time.time()
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(pause)
        ended = finish(process)
    return ended, began, time.time() - began


def test_ctrl_c_in_a_script(tmp_path, manifest, service):
    """In flight is collected, then KeyboardInterrupt: a script that catches nothing ends as Ctrl-C ends any."""
    out = tmp_path / "run"
    ended, began, _ = interrupted_script(SCRIPT, service, manifest, out)
    assert ended.code == -signal.SIGINT, ended.text
    assert "went on" not in ended.out
    assert ended.err.rstrip().splitlines()[-1].startswith("KeyboardInterrupt: ")
    assert "SIGINT: collecting what is in flight; interrupt once more to stop at once" in ended.err
    assert late(service, began) == []
    assert summary(out)["done"] == service.posts(), "what was in flight was collected"
    whole(out, service, reason="SIGINT")
    completes(manifest, out, service)


def test_a_second_ctrl_c_in_a_script(tmp_path, manifest, service):
    """The drain is given up at once; journal and results are whole."""
    service.handlers["status"] = slow(600)
    out = tmp_path / "run"
    ended, _, seconds = interrupted_script(SCRIPT, service, manifest, out, times=2, max_in_flight=4)
    assert (ended.code, "went on" in ended.out) == (-signal.SIGINT, False), ended.text
    assert seconds < 5
    assert (service.posts(), summary(out)["done"]) == (4, 0)
    whole(out, service, reason="SIGINT")
    completes(manifest, out, service)
