"""Kill -9 at any moment: the same command then completes, and the endpoint has accepted every job exactly once.

Tests eight moments; `SOAK_MOMENTS=50 pytest tests/acceptance/test_crash.py` tests 50 of each kind.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.acceptance.command import (
    accepted,
    children,
    finish,
    jobs_in,
    log,
    restyle,
    results,
    start,
    wait_for,
    write_manifest,
)

ROWS = 500
MOMENTS = int(os.environ.get("SOAK_MOMENTS", "0"))


def moments(count: int) -> list[int]:
    """Return evenly spread progress counts from the first acceptance almost to the last."""
    count = MOMENTS or count
    return [1 + round(n * (ROWS - 10) / max(1, count - 1)) for n in range(count)]


def begin(tmp_path: Path) -> tuple[Path, tuple[object, ...]]:
    manifest, directory = write_manifest(tmp_path / "m.csv", range(ROWS)), tmp_path / "run"
    return directory, ("run", manifest, "-o", directory, "--engine", "echo")


def kill(*pids: int) -> None:
    """Kill all processes with -9; the first is stopped first, so that it cannot react to the others' death."""
    os.kill(pids[0], signal.SIGSTOP)
    for pid in reversed(pids):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def reached(directory: Path, process: subprocess.Popen[str], count: int, *states: str) -> None:
    wait_for(lambda: jobs_in(directory, *states) >= count or process.poll() is not None, f"{count} jobs")
    assert process.poll() is None, finish(process).text


def complete(directory: Path, command: tuple[object, ...]) -> None:
    """Repeat the command: every job is done and was accepted once, and every image is complete."""
    again = restyle(*command)
    assert again.code == 0, again.text
    rows = results(directory).to_pylist()
    assert [row["row"] for row in rows] == list(range(ROWS))
    assert {row["status"] for row in rows} == {"done"}
    assert accepted(directory) == ROWS
    assert len({row["request_id"] for row in rows}) == ROWS
    for row in rows:
        (image,) = row["images"]
        assert (directory / image["path"]).stat().st_size == image["file_size"]
    assert not [path for path in directory.rglob("*.part*") if path.is_file()], "a partial file is left"


@pytest.mark.parametrize("count", moments(4))
def test_a_killed_run_goes_on_and_pays_for_nothing_twice(tmp_path, count):
    """Kill the runner with -9 when this many jobs are in its journal; the endpoint ends with it and loses nothing."""
    directory, command = begin(tmp_path)
    with start(*command) as process:
        reached(directory, process, count)
        kill(process.pid)
        process.communicate()
    complete(directory, command)


@pytest.mark.parametrize("count", moments(4))
def test_runner_and_endpoint_killed_together(tmp_path, count):
    """As in a power cut, when this many jobs are done: neither process can clean up."""
    directory, command = begin(tmp_path)
    with start(*command, "--service-time", "0.02s") as process:
        reached(directory, process, count, "done")
        kill(process.pid, *children(process.pid))
        process.communicate()
    complete(directory, command)


def test_a_run_killed_again_and_again_completes(tmp_path):
    """Each session makes some progress; restarting costs nothing."""
    directory, command = begin(tmp_path)
    for count in (60, 150, 240, 330, 420):
        with start(*command) as process:
            reached(directory, process, count, "done")
            kill(process.pid, *children(process.pid))
            process.communicate()
    complete(directory, command)


@pytest.mark.parametrize("count", moments(2))
def test_a_run_outlives_its_endpoint(tmp_path, count):
    """Only the embedded endpoint is killed: it is restarted, and the run completes."""
    directory, command = begin(tmp_path)
    with start(*command, "--service-time", "0.02s") as process:
        reached(directory, process, count, "done")
        (endpoint,) = children(process.pid)
        os.kill(endpoint, signal.SIGKILL)
        ended = finish(process)
    assert ended.code == 0, ended.text
    assert "Traceback" not in ended.text
    assert accepted(directory) == jobs_in(directory, "done") == ROWS
    assert [line["action"] for line in log(directory)].count("session") == 1


def test_nothing_is_left_running(tmp_path):
    """The endpoint of a killed run ends by itself."""
    directory, command = begin(tmp_path)
    with start(*command, "--service-time", "0.02s") as process:
        reached(directory, process, 10, "done")
        (endpoint,) = children(process.pid)
        kill(process.pid)
        process.communicate()
    wait_for(lambda: not _alive(endpoint), "the endpoint's end", timeout=15)


def _alive(pid: int) -> bool:
    said = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(said.strip()) and not said.strip().startswith("Z")
