"""A reader of a command's output may close it, and a redirection's disk may be full: the run continues."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.acceptance.command import Ended, environment, jobs_in, restyle, write_manifest

ROWS = 8


def gone() -> int:
    """Return the writing end of a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full() -> int:
    """Return a file on a full disk."""
    return os.open("/dev/full", os.O_WRONLY)


def told(command: tuple[object, ...], out: int, err: int = subprocess.PIPE) -> Ended:
    """Run the command with its standard output (and error) redirected there."""
    with closing(os.fdopen(out, "wb")):
        ended = subprocess.run(
            [sys.executable, "-m", "batch", *map(str, command)],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            text=True,
            timeout=90,
            check=False,
        )
    return Ended(ended.returncode, "", ended.stderr or "")


@pytest.fixture
def command(tmp_path: Path) -> tuple[object, ...]:
    return ("run", write_manifest(tmp_path / "m.csv", range(ROWS)), "-o", tmp_path / "run", "--engine", "echo")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("where", [gone, full])
@pytest.mark.parametrize("flags", [(), ("--quiet",), ("--log-format", "json")])
@pytest.mark.parametrize("both", [False, True])
def test_a_run_whose_words_are_lost_does_its_work(tmp_path, command, where, flags, both):
    """`restyle run | head -1`: before the first submit, halfway and at the end, only its text is lost."""
    ended = told((*command, *flags), where(), subprocess.STDOUT if both else subprocess.PIPE)
    assert (ended.code, jobs_in(tmp_path / "run", "done")) == (0, ROWS), ended.err
    assert "defect" not in ended.err


def test_the_exit_code_is_the_runs_own(tmp_path):
    """The message about a failed row is lost; the exit code still reports it."""
    manifest = tmp_path / "m.csv"
    manifest.write_text("image_url,prompt\nhttps://images.example/1.jpg,one\nnothing.jpg,two\n")
    assert told(("run", manifest, "-o", tmp_path / "run", "--engine", "echo"), gone()).code == 3


@pytest.mark.parametrize("closed", [">&- 2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_streams(tmp_path, command, closed):
    """Some supervisors start their processes with closed streams."""
    shell = ("sh", "-c", f'exec "$@" {closed}', "sh")
    assert restyle(*command, through=shell).code == 0
    assert jobs_in(tmp_path / "run", "done") == ROWS


def test_a_terminal_that_knows_few_characters(tmp_path):
    """Characters that it cannot show are escaped; such a file name must not fail the run."""
    manifest = write_manifest(tmp_path / "ü日.csv", range(ROWS))
    ended = restyle("run", manifest, "-o", tmp_path / "öut", "--engine", "echo", env={"PYTHONIOENCODING": "ascii"})
    assert ended.code == 0, ended.text
    assert r"\xf6ut" in ended.out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("name", ["plan", "status", "audit"])
def test_a_command_that_only_tells_says_that_it_could_not(tmp_path, command, name):
    """A truncated plan must not look complete; a closed pipe is not an error."""
    assert restyle(*command).code == 0
    asked = (name, command[1] if name == "plan" else tmp_path / "run")
    ended = told(asked, full())
    assert ended.code == 4
    assert ended.err.startswith("restyle: cannot write to standard output (No space left on device)")
    ended = told(asked, gone())
    assert (ended.code, ended.err) == (0, "")
