"""Five runs that pass every row of the state machine, and the required results of each, wherever it is killed.

A scenario is a manifest, a config and a faults file; a `Rig` is a scenario in a folder. The same command is repeated
until everything is done, as cron would, with `--retry-failed` if the scenario fails jobs on purpose.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from batch import api
from tests.acceptance.command import REPOSITORY, Ended, environment, finish
from tests.faults.evidence import Evidence, examine, what_matters

ROUNDS = 15
"""Maximum number of commands until a run is complete."""
COMMAND_SECONDS = 110.0
_LOCAL = 8
"""Rows with a local image, in the scenario with uploads; the last image is truncated."""

_PRICE_USD = 0.025
"""Per megapixel. Nothing is charged, but the audit adds it up."""

_PLAIN = """
[[fault]]
at = "submit"
do = "answer"
status = 429
every = 20
retry_after = 0.05
[[fault]]
at = "result"
do = "odd-fields"
every = 3
[[fault]]
at = "file"
do = "refuse"
status = 403
reads = 2
every = 9
"""
_FAILING = """
seed = 5
[[fault]]
at = "submit"
do = "answer"
status = 422
every = 23
times = 2
[[fault]]
at = "submit"
do = "answer"
status = 429
every = 31
retry_after = 0.05
[[fault]]
at = "execute"
do = "fail"
status = 503
retryable = true
every = 11
times = 8
[[fault]]
at = "execute"
do = "fail"
status = 500
retryable = false
every = 17
times = 3
[[fault]]
at = "execute"
do = "content-policy"
every = 29
times = 2
[[fault]]
at = "file"
do = "answer"
status = 404
after = 10
first = 10
[[fault]]
at = "file"
do = "refuse"
status = 451
reads = 2
every = 13
[[fault]]
at = "file"
do = "answer"
status = 451
share = 0.3
times = 20
"""
_DOUBTFUL = """
idempotency = false
[[fault]]
at = "submit"
do = "drop-after-accept"
every = 7
[[fault]]
at = "submit"
do = "drop"
every = 9
times = 6
[[fault]]
at = "submit"
do = "answer-after-accept"
status = 502
every = 16
"""


_COLLECTING = """
seed = 3
[[fault]]
at = "result"
do = "no-images"
reads = 3
every = 11
times = 4
[[fault]]
at = "result"
do = "no-images"
reads = 6
every = 13
times = 4
[[fault]]
at = "result"
do = "odd-fields"
every = 5
[[fault]]
at = "file"
do = "refuse"
status = 451
reads = 2
every = 12
times = 4
[[fault]]
at = "file"
do = "refuse"
status = 451
reads = 4
every = 17
times = 4
"""
_LAPSING = """
[[fault]]
at = "file"
do = "refuse"
status = 451
reads = 4
every = 10
times = 5
"""


@dataclass(frozen=True)
class Scenario:
    """A kind of run."""

    name: str
    faults: str
    config: str = ""
    served: bool = False
    """Whether the endpoint is a separate server, reached by its URL."""
    local: bool = False
    """Whether some images are local, one of them damaged."""
    collects: bool = False
    """Whether paid results are unreadable at first; later commands collect them without --retry-failed."""
    lapses: bool = False
    """Whether some of them expire, and are paid for again with --retry-failed."""

    @property
    def fails(self) -> bool:
        """Whether jobs fail on purpose and are paid for again."""
        return self.local or self.lapses


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("plain", _PLAIN),
        Scenario("failing", _FAILING, "[limits]\ncollect_for = 0\n", served=True, local=True),
        Scenario("doubtful", _DOUBTFUL, '[limits]\non_unknown = "resubmit-after=1s"\n', served=True),
        Scenario("collecting", _COLLECTING, served=True, collects=True),
        Scenario("lapsing", _LAPSING, '[limits]\ncollect_for = "1s"\n', served=True, lapses=True),
    )
}


class Kill(NamedTuple):
    """The point at which a process kills itself; see `crash_at`."""

    state: str
    happening: str
    when: str
    number: int

    def words(self) -> list[str]:
        """Return the arguments for `crash_at`."""
        return ["kill", self.state, self.happening, self.when, str(self.number)]


class Rig:
    """A scenario in a folder; created by `rigged`."""

    def __init__(self, scenario: Scenario, folder: Path, jobs: int, *, quick: bool = False) -> None:
        self.scenario, self.jobs, self.quick = scenario, jobs, quick
        self.run = folder / "run"
        self.server = folder / "server" if scenario.served else self.run / "endpoint"
        self.seconds = 0.0
        """Duration of the longest command so far, including process startup."""
        self._folder, self._arguments = folder, list[str]()

    def prepare(self) -> None:
        """Write manifest, config and faults; start the server if the scenario has one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        manifest, config, faults = (self._folder / name for name in ("manifest.csv", "config.toml", "faults.toml"))
        faults.write_text(self.scenario.faults)
        config.write_text(f"{self.scenario.config}[price]\nusd_per_megapixel = {_PRICE_USD}\n")
        _write_manifest(manifest, self.jobs, local=_LOCAL if self.scenario.local else 0)
        self._arguments = ["run", str(manifest), "-o", str(self.run), "-c", str(config), "--quiet"]
        if not self.scenario.served:
            self._arguments += ["--engine", "echo", "--faults", str(faults)]

    def reach(self, url: str) -> None:
        """URL of the server, if the scenario has one."""
        self._arguments += ["--target", url]

    def once(self, through: Sequence[str] = (), *, retry_failed: bool = False, seconds: float | None = None) -> Ended:
        """Run the command once, with `crash_at` if `through` is given; kill it with SIGKILL after `seconds`."""
        plain = "tests.quick_time" if self.quick else "batch"
        module = ["tests.faults.crash_at", *["quick"] * self.quick, *through] if through else [plain]
        command = [sys.executable, "-m", *module, *self._arguments, *["--retry-failed"] * retry_failed]
        began = time.monotonic()
        with subprocess.Popen(
            command,
            env=environment(),
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            if seconds is not None:
                try:
                    process.wait(seconds)
                except subprocess.TimeoutExpired:
                    process.kill()
            ended = finish(process, COMMAND_SECONDS)
        self.seconds = max(self.seconds, time.monotonic() - began)
        assert ended.code in {0, 3, 4, -signal.SIGKILL}, (ended.code, ended.text)
        assert "Traceback" not in ended.text, ended.text
        return ended

    def complete(self, through: Sequence[str] = (), *, recording: bool = False) -> bool:
        """Repeat the command until the run is complete, with `through` until it was killed; return whether it was."""
        killed, retry_failed = False, False
        for _ in range(ROUNDS):
            ended = self.once((() if killed else through), retry_failed=retry_failed)
            if ended.code == -signal.SIGKILL:
                killed = True
                continue
            if ended.code == 0 or (ended.code == 3 and self._only_the_hopeless_failed()):
                return killed
            assert ended.code == 4 or self.scenario.fails or self.scenario.collects, ended.text
            retry_failed = ended.code == 3 and not self.scenario.collects
        raise AssertionError(f"{self.scenario.name}: not complete after {ROUNDS} commands: {ended.text}")

    def _only_the_hopeless_failed(self) -> bool:
        failed = [row for row in what_matters(self.run).values() if row[0] != "done"]
        return self.scenario.local and len(failed) == 1

    def examine(self) -> Evidence:
        """Check the invariants at the end of this scenario."""
        found = examine(self.run, self.server)
        assert found.paid_twice == 0, found
        assert found.foreign == 0, found
        assert found.unknown == 0, found
        assert found.rows == self.jobs, found
        assert found.done == self.jobs - self.scenario.local, found
        books = api.audit_sync(self.run)
        assert books.add_up, books.render()
        if not self.scenario.fails:
            assert found.accepted == found.succeeded == self.jobs, found
        return found


@contextmanager
def rigged(scenario: Scenario, folder: Path, jobs: int, *, quick: bool = False) -> Iterator[Rig]:
    """Create a rig; its server ends with the block. With `quick`, commands run on the clock of `tests.quick_time`."""
    rig = Rig(scenario, folder, jobs, quick=quick)
    rig.prepare()
    if not scenario.served:
        yield rig
        return
    with serving(rig.server, folder / "faults.toml") as url:
        rig.reach(url)
        yield rig


@contextmanager
def serving(data: Path, faults: Path) -> Iterator[str]:
    """Start an echo endpoint in a separate process; yield its URL."""
    command = [sys.executable, "-m", "batch.server", "--data-dir", str(data), "--engine", "echo", "--with-parent"]
    with (
        data.with_name(f"{data.name}.log").open("w") as log,
        subprocess.Popen(
            [*command, "--faults", str(faults), "--price", str(_PRICE_USD)],
            env=environment(),
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


class Undisturbed(NamedTuple):
    """The results of a scenario without a kill."""

    rows: dict[tuple[str, str], int]
    """Count of each row of the table in the command with most of them."""
    results: dict[str, tuple]
    seconds: float
    """Duration of the longest command."""
    evidence: Evidence


def undisturbed(scenario: Scenario, folder: Path, jobs: int, *, quick: bool = False) -> Undisturbed:
    """Run the scenario and record its transitions."""
    notes = folder / "rows.jsonl"
    with rigged(scenario, folder, jobs, quick=quick) as rig:
        rig.complete(["record", str(notes)])
        evidence, found = rig.examine(), what_matters(rig.run)
        seconds = rig.seconds
    rows: dict[tuple[str, str], int] = {}
    for line in notes.read_text().splitlines():
        for state, happening, count in json.loads(line):
            rows[state, happening] = max(count, rows.get((state, happening), 0))
    return Undisturbed(rows, found, seconds, evidence)


def survive(
    kill: Kill, scenario: Scenario, folder: Path, jobs: int, expected: Undisturbed, *, quick: bool = False
) -> Evidence:
    """Kill the run at this point, complete it, and check that the results are identical."""
    with rigged(scenario, folder, jobs, quick=quick) as rig:
        assert rig.complete(kill.words()), f"{scenario.name}: {kill} was never reached"
        found = rig.examine()
        assert what_matters(rig.run) == expected.results
    return found


def survive_at(
    seconds: float, scenario: Scenario, folder: Path, jobs: int, expected: Undisturbed, *, quick: bool = False
) -> Evidence:
    """Kill the run after `seconds`, complete it, and check that the results are identical."""
    with rigged(scenario, folder, jobs, quick=quick) as rig:
        rig.once(seconds=seconds)
        rig.complete()
        found = rig.examine()
        assert what_matters(rig.run) == expected.results
    return found


def _write_manifest(path: Path, jobs: int, local: int) -> None:
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["image_url", "prompt"])
        for number in range(jobs):
            url = f"https://images.example/{number}.jpg"
            if number < local:
                url = f"{number}.png"
                _write_image(path.with_name(url), number, cut_off=number == local - 1)
            lines.writerow([url, f"image {number} as a watercolor"])


def _write_image(path: Path, number: int, *, cut_off: bool = False) -> None:
    noise = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    if cut_off:
        os.truncate(path, path.stat().st_size // 2)


def moments(count: int, seconds: float, seed: int) -> list[float]:
    """Return random moments of a command of this duration."""
    rng = random.Random(seed)
    return [rng.uniform(0.0, seconds) for _ in range(count)]
