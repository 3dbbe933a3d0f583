"""Shared parts of the scenarios: the stand-in server, processes measured by the kernel, rounds and tables."""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
PYTHON = sys.executable


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of one finished process."""

    wall: float
    """Seconds from start to end, including the interpreter's start."""
    cpu: float
    """User and system seconds of the process and of the children that it waited for."""
    peak_mb: float
    """Largest resident set of the process."""


class Standin:
    """A running stand-in server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def counts(self) -> dict[str, Any]:
        """Return the counts of requests since the start, and the delays until completions were noticed."""
        with urllib.request.urlopen(f"{self.url}/counts", timeout=60) as answer:
            return json.load(answer)


@contextmanager
def standin(*options: str) -> Iterator[Standin]:
    """Run a new stand-in server, without state of earlier rounds."""
    command = [PYTHON, "-m", "tests.benchmarks.standin", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield Standin(json.loads(server.stdout.readline())["url"])
        finally:
            server.stdin.close()
            server.wait(30)


def measured(*command: str, may_fail: bool = False, **variables: str) -> Measured:
    """Run a command and measure it.

    Raises:
        RuntimeError: the command failed, unless `may_fail`.
    """
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, env={**os.environ, **variables}) as child:
        _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode and not may_fail:
        raise RuntimeError(f"{' '.join(command)} exited with status {child.returncode}")
    return Measured(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def restyle(*arguments: str) -> Measured:
    """Measure one complete `restyle` command."""
    return measured(PYTHON, "-m", "batch", *arguments)


def run_of(server: Standin, manifest: Path, out: Path, *options: str) -> Measured:
    """Measure `restyle run` against the stand-in, including journal, results and log."""
    return restyle("run", str(manifest), "-o", str(out), "--target", server.url, "--quiet", *options)


def in_turn(rounds: int, **contestants: Callable[[], Measured]) -> dict[str, list[Measured]]:
    """Measure in the order A B A B, so that other load on the machine affects all contestants equally."""
    found: dict[str, list[Measured]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, carry_out in contestants.items():
            found[name].append(carry_out())
    return found


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def write_manifest(path: Path, rows: int) -> Path:
    """Write a manifest with `rows` distinct rows."""
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["image_url", "prompt"])
        lines.writerows([f"https://images.example/{number}.jpg", f"{number} as a watercolor"] for number in range(rows))
    return path


def table(*rows: Sequence[str]) -> str:
    """Format a Markdown table. The first row is the header; all columns except the first are numbers."""
    head, *rest = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rest))


def bar(what: str, value: float, limit: float, unit: str, *, at_most: bool = False) -> list[str]:
    """Return a row: figure, value, limit, and whether the value keeps the limit."""
    is_kept = value <= limit if at_most else value >= limit
    words = f"{'at most' if at_most else 'at least'} {limit:g}{unit}"
    return [what, f"{value:.2f}{unit}", words, "kept" if is_kept else "**missed**"]
