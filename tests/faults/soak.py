"""Full version of the tests in this folder: `python -m tests.faults.soak [crash random faults bulk]`.

Without arguments, all parts. Each printed line is a checked run. A failure is printed with the command that repeats it,
the rest continues, and the exit code is 1. Passed runs are noted in the folder, so that an interrupted soak resumes: to
start over, use another folder or remove it.

    --jobs N        jobs per run (300; for `bulk` 100,000)
    --moments N     random moments (200)
    --at-once N     concurrent processes (2)
    --only WORD     only runs whose name contains it
    --folder DIR    working folder (out/soak)
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import anyio

from batch.journal.states import TABLE
from batch.server.faults.plan import FaultPoint
from tests.acceptance.command import REPOSITORY, environment, write_manifest
from tests.faults import scenarios
from tests.faults.evidence import examine
from tests.faults.matrix import Case, carry_out, kinds, together
from tests.faults.scenarios import SCENARIOS, Kill, Undisturbed, moments, survive, survive_at, undisturbed

COMMAND_SECONDS = 600.0
"""Seconds; far more than a command takes on a busy machine."""
BULK_JOBS = 100_000
BULK_SHARE = 0.01
PARTS = ("crash", "random", "faults", "bulk")


class Trial(NamedTuple):
    """One checked run, or several with one name."""

    name: str
    carry_out: Callable[[Path], str]
    """Takes an empty folder and returns a summary; raises if an invariant is violated."""


# --- the parts --------------------------------------------------------------------------------------------


def calm(name: str, jobs: int, folder: Path) -> Undisturbed:
    """Return a scenario's results without a kill; cached in the folder."""
    kept = folder / f"calm-{name}-{jobs}.pickle"
    if not kept.exists():
        shutil.rmtree(folder / f"calm-{name}", ignore_errors=True)
        kept.write_bytes(pickle.dumps(undisturbed(SCENARIOS[name], folder / f"calm-{name}", jobs)))
    return pickle.loads(kept.read_bytes())


def crashes(jobs: int, folder: Path) -> Iterator[Trial]:
    """Yield each row of the table, before and after, early and halfway, in each scenario that has it."""
    found = {name: calm(name, jobs, folder) for name in SCENARIOS}
    rows = [(str(state), str(happening)) for state, happening in TABLE]
    assert {row for one in found.values() for row in one.rows} == set(rows), "a row without a scenario"
    for row, (name, expected), when in product(rows, found.items(), ("before", "after")):
        times = expected.rows.get(row, 0)
        for number in sorted({1, max(1, times // 2)} if times else ()):
            kill = Kill(*row, when, number)
            yield Trial(f"crash {name}: {' '.join(map(str, kill))}", partial(_crash, kill, name, jobs, expected))


def _crash(kill: Kill, name: str, jobs: int, expected: Undisturbed, folder: Path) -> str:
    found = survive(kill, SCENARIOS[name], folder, jobs, expected)
    return f"accepted {found.accepted}, done {found.done}"


def random_moments(jobs: int, count: int, folder: Path) -> Iterator[Trial]:
    """Yield kills at random moments of the plain run."""
    expected = calm("plain", jobs, folder)
    for number, seconds in enumerate(moments(count, expected.seconds, seed=1)):
        yield Trial(f"random {number}: after {seconds:.2f} s", partial(_random, seconds, jobs, expected))


def _random(seconds: float, jobs: int, expected: Undisturbed, folder: Path) -> str:
    found = survive_at(seconds, SCENARIOS["plain"], folder, jobs, expected)
    return f"accepted {found.accepted}, done {found.done}"


def fault_cases(jobs: int) -> Iterator[Trial]:
    """Yield each fault at 5% and at 50%, and all of them at 5%, with keys and without."""
    for keys in (False, True):
        cases = [Case((kind,), share, keys) for kind in kinds() for share in (0.05, 0.5)]
        for case in [*cases, together(0.05, keys=keys)]:
            if not (
                keys and len(case.faults) == 1 and case.faults[0].at is FaultPoint.LISTING
            ):  # no submit is looked up
                yield Trial(f"fault {case.name}", partial(_fault, case, jobs))


def _fault(case: Case, jobs: int, folder: Path) -> str:
    outcome = anyio.run(partial(carry_out, case, folder, jobs))
    found = outcome.evidence
    return (
        f"POSTs {outcome.posts}, accepted {found.accepted}, written off {found.written_off}, done {found.done},"
        f" exit codes {' '.join(map(str, outcome.codes))}"
    )


def bulk(jobs: int) -> Iterator[Trial]:
    """Yield a run with 1% of every fault on the embedded endpoint, repeated until all is done."""
    yield Trial(f"bulk {jobs:,} jobs, every fault at {BULK_SHARE:.0%}", partial(_bulk, jobs))


def _bulk(jobs: int, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    case = together(BULK_SHARE, keys=True)
    manifest, faults = write_manifest(folder / "manifest.csv", range(jobs)), folder / "faults.toml"
    faults.write_text(case.file())
    run, codes = folder / "run", list[int]()
    config = folder / "config.toml"
    config.write_text("[limits]\ncollect_for = 0\n")  # do not request expired results again
    began = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "batch",
        "run",
        str(manifest),
        "-o",
        str(run),
        "-c",
        str(config),
        "--quiet",
        "--engine",
        "echo",
    ]
    with (folder / "output.log").open("a") as log:
        while not codes or codes[-1]:
            assert len(codes) < 25, f"not complete after {codes}; see {log.name}"
            again = ["--faults", str(faults), *["--retry-failed"] * bool(codes)]
            codes.append(
                subprocess.run([*command, *again], env=environment(), cwd=REPOSITORY, stdout=log, stderr=log).returncode
            )
            assert codes[-1] in {0, 3, 4}, codes
            print(f"  command {len(codes)}: exit code {codes[-1]}, {time.monotonic() - began:.0f} s", flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    found = examine(run, run / "endpoint")
    assert found.done == found.rows == jobs, found
    assert found.paid_twice == found.foreign == found.unknown == 0, found
    return (
        f"accepted {found.accepted:,}, written off {found.written_off:,}, done {found.done:,}, exit codes {codes},"
        f" peak memory of a process {peak:.0f} MiB"
    )


# --- the soak ---------------------------------------------------------------------------------------------


def attempt(trial: Trial, folder: Path) -> tuple[bool, str, float]:
    """Run a trial in a separate process. Return whether it passed, a summary, and the seconds."""
    logging.disable(logging.CRITICAL)
    scenarios.COMMAND_SECONDS = COMMAND_SECONDS
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        words, held = trial.carry_out(folder), True
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException as error:
        words, held = f"{type(error).__name__}: {_first_of(error)}"[:1500], False
    return held, words, time.monotonic() - began


def _first_of(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def soak(trials: list[Trial], folder: Path, at_once: int) -> bool:
    """Run the trials that are not noted as passed. Return whether all passed."""
    notes = folder / "passed.txt"
    passed = set(notes.read_text().splitlines()) if notes.exists() else set()
    todo = [trial for trial in trials if trial.name not in passed]
    began, failures = time.monotonic(), list[str]()
    with ProcessPoolExecutor(at_once, mp_context=get_context("spawn")) as pool:
        running = {
            pool.submit(attempt, trial, folder / "runs" / str(number)): trial for number, trial in enumerate(todo)
        }
        for count, future in enumerate(as_completed(running), 1):
            name, (held, words, seconds) = running[future].name, future.result()
            print(
                f"{count:>4}/{len(todo)}  {'ok  ' if held else 'FAIL'}  {seconds:7.1f} s  {name}: {words}", flush=True
            )
            if held:
                with notes.open("a") as file:
                    file.write(f"{name}\n")
            else:
                failures.append(name)
    for name in failures:
        print(f"FAIL  python -m tests.faults.soak --only '{name}'")
    print(
        f"{len(trials)} trials: {len(trials) - len(todo)} passed before, {len(todo) - len(failures)} passed now,"
        f" {len(failures)} failed, in {time.monotonic() - began:.0f} s"
    )
    return not failures


def main() -> int:
    """Run the selected parts and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--only", default="")
    parser.add_argument("--folder", type=Path, default=Path("out/soak"))
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"unknown part: {', '.join(sorted(unknown))}")
    # A large number of jobs is for the bulk run only, not for the three hundred other runs.
    parts = given.parts or (["bulk"] if (given.jobs or 0) > 10_000 else PARTS)
    jobs, folder = given.jobs or 300, given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, Callable[[], Iterator[Trial]]] = {
        "crash": lambda: crashes(jobs, folder),
        "random": lambda: random_moments(jobs, given.moments, folder),
        "faults": lambda: fault_cases(jobs),
        "bulk": lambda: bulk(given.jobs or BULK_JOBS),
    }
    trials = [trial for part in parts for trial in made[part]() if given.only in trial.name]
    print(json.dumps({"trials": len(trials), "jobs": jobs, "folder": str(folder), "cores": os.cpu_count()}), flush=True)
    return 0 if soak(trials, folder, given.at_once) else 1


if __name__ == "__main__":
    sys.exit(main())
