"""Runs the real command in a separate process and reads its results, journal and endpoint."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

REPOSITORY = Path(__file__).parents[2]
_FROM_OUTSIDE = ("FAL_", "RESTYLE_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "PYTEST_")


@dataclass(frozen=True)
class Ended:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment without the variables that the command reads."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(_FROM_OUTSIDE)}
    return kept | {"PYTHONPATH": str(REPOSITORY)} | (extra or {})


def start(
    *arguments: object,
    env: dict[str, str] | None = None,
    through: tuple[str, ...] = (),
    quick: bool = False,
    **options: object,
) -> subprocess.Popen[str]:
    """Start `restyle ...`; the caller ends it.

    `through` is a wrapper command, for example a shell with a limit. With `quick` its pauses are short: see
    `tests.quick_time`.
    """
    return subprocess.Popen(
        [*through, sys.executable, "-m", "tests.quick_time" if quick else "batch", *map(str, arguments)],
        env=environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def restyle(*arguments: object, env: dict[str, str] | None = None, timeout: float = 90, **options: object) -> Ended:
    """Run `restyle ...` to its end. No command may print a stack trace."""
    with start(*arguments, env=env, **options) as process:
        ended = finish(process, timeout)
    assert "Traceback" not in ended.text, ended.text
    return ended


def finish(process: subprocess.Popen[str], timeout: float = 90) -> Ended:
    """Wait for a started command to end."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"not over after {timeout} s: {out}{err}") from None
    return Ended(process.returncode, out, err)


@contextmanager
def started(
    *arguments: object, env: dict[str, str] | None = None, **options: object
) -> Iterator[subprocess.Popen[str]]:
    """Start a command for a block and kill it at the end if it still runs."""
    with start(*arguments, env=env, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()


def wait_for(condition: Callable[[], object], what: str, timeout: float = 60) -> None:
    """Poll until a condition about another process holds: there is no event to wait for."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {timeout} s"
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    """Return the process ids of the direct children."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = (line.split() for line in listed.splitlines())
    return [int(child) for child, parent in pairs if int(parent) == pid]


# --- inputs -----------------------------------------------------------------------------------------------


def write_manifest(path: Path, rows: Iterable[int]) -> Path:
    """Write a CSV with image URLs that are never requested: the echo engine fetches nothing."""
    lines = [f"{n},https://images.example/{n}.jpg,image {n} as a watercolor" for n in rows]
    path.write_text("\n".join(["name,image_url,prompt", *lines]) + "\n")
    return path


# --- outputs ----------------------------------------------------------------------------------------------


def results(run_directory: Path) -> pa.Table:
    return pq.read_table(run_directory / "results.parquet")


def summary(run_directory: Path) -> dict:
    text = (run_directory / "summary.json").read_text()
    assert text.count("\n") == 1, "summary.json has one line"
    return json.loads(text)


def log(run_directory: Path) -> list[dict]:
    return [json.loads(line) for line in (run_directory / "log.jsonl").read_text().splitlines()]


def accepted(run_directory: Path) -> int:
    """Return the number of requests that the embedded endpoint has ever accepted, by its durable counter."""
    return _query(run_directory / "endpoint" / "server.db", "SELECT value FROM counter WHERE name = 'accepted'") or 0


def jobs_in(run_directory: Path, *states: str) -> int:
    """Return the number of jobs in these states; without a state, of all jobs."""
    where = f"WHERE state IN ({', '.join(map(repr, states))})" if states else ""
    return _query(run_directory / "journal.db", f"SELECT count(*) FROM jobs {where}") or 0


def _query(path: Path, statement: str) -> int | None:
    if not path.exists():
        return None
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)
    try:
        row = connection.execute(statement).fetchone()
    except sqlite3.OperationalError:  # its tables do not exist yet
        return None
    finally:
        connection.close()
    return None if row is None else row[0]
