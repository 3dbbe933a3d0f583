"""Whoever reads what a command prints may leave, and a disk behind a redirection may be full: the run goes on."""

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
    """The writing end of a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full() -> int:
    """A disk without room."""
    return os.open("/dev/full", os.O_WRONLY)


def told(command: tuple[object, ...], out: int, err: int = subprocess.PIPE) -> Ended:
    """The command's end, with its standard output (and error) going there."""
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
    """`restyle run | head -1`: before the first submit, in the middle and at the end, its text is all that is lost."""
    ended = told((*command, *flags), where(), subprocess.STDOUT if both else subprocess.PIPE)
    assert (ended.code, jobs_in(tmp_path / "run", "done")) == (0, ROWS), ended.err
    assert "defect" not in ended.err


def test_the_exit_code_is_the_runs_own(tmp_path):
    """Nobody hears that a row failed; the exit code still says so."""
    manifest = tmp_path / "m.csv"
    manifest.write_text("image_url,prompt\nhttps://images.example/1.jpg,one\nnothing.jpg,two\n")
    assert told(("run", manifest, "-o", tmp_path / "run", "--engine", "echo"), gone()).code == 3


@pytest.mark.parametrize("closed", [">&- 2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_streams(tmp_path, command, closed):
    """Some supervisors start their processes so."""
    shell = ("sh", "-c", f'exec "$@" {closed}', "sh")
    assert restyle(*command, through=shell).code == 0
    assert jobs_in(tmp_path / "run", "done") == ROWS


def test_a_terminal_that_knows_few_characters(tmp_path):
    """What it cannot show is escaped; that a file is called so is no reason to fail."""
    manifest = write_manifest(tmp_path / "ü日.csv", range(ROWS))
    ended = restyle("run", manifest, "-o", tmp_path / "öut", "--engine", "echo", env={"PYTHONIOENCODING": "ascii"})
    assert ended.code == 0, ended.text
    assert r"\xf6ut" in ended.out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("name", ["plan", "status", "audit"])
def test_a_command_that_only_tells_says_that_it_could_not(tmp_path, command, name):
    """A file with half a plan in it must not look like a whole one; a reader that has left has all it wants."""
    assert restyle(*command).code == 0
    asked = (name, command[1] if name == "plan" else tmp_path / "run")
    ended = told(asked, full())
    assert ended.code == 4
    assert ended.err.startswith("restyle: cannot write to standard output (No space left on device)")
    ended = told(asked, gone())
    assert (ended.code, ended.err) == (0, "")
