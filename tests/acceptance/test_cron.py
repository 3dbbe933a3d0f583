"""The cron line of configs/cron.toml, run by a shell like in cron: growing manifests, overlaps, dead owners."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.acceptance.command import REPOSITORY, accepted, environment, jobs_in, results, summary, wait_for

CONFIG = (REPOSITORY / "configs" / "cron.toml").read_text("utf-8")
QUICK = {"RESTYLE_TARGET__ENGINE": "echo"}
SLOW = {**QUICK, "RESTYLE_TARGET__SERVICE_TIME": "4s"}


def cron_line() -> str:
    """Return the command of the crontab line, without its five time fields."""
    (line,) = re.findall(r"^# +\d+ \* \* \* \* +(.+)$", CONFIG, re.MULTILINE)
    return line


def unit(name: str) -> configparser.ConfigParser:
    """Return a systemd unit from the comments."""
    text = CONFIG.partition(f"/etc/systemd/system/{name}:")[2]
    found = re.match(r"(?:\n#(?: {3}.*)?)+", text)
    assert found is not None
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # keys in a unit are case-sensitive
    parser.read_string(found[0].replace("\n#", "\n").replace("\n   ", "\n"))
    return parser


class Site:
    """Prepare a checkout in another folder than /srv/restyle, with the command at the path in the line."""

    def __init__(self, root: Path) -> None:
        self.root, self.directory, self.manifest = root, root / "out/cron", root / "manifests/demo.csv"
        for name in ("manifests", "configs"):
            shutil.copytree(REPOSITORY / name, root / name)
        command = root / ".venv/bin/restyle"
        command.parent.mkdir(parents=True)
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m batch "$@"\n')
        command.chmod(0o755)
        self.rows = 12

    def grow(self, count: int) -> None:
        """Append rows: new prompts for an existing image."""
        with self.manifest.open("a") as file:
            for number in range(self.rows, self.rows + count):
                file.write(f"cat-{number},images/cat.jpg,cat number {number},,\n")
        self.rows += count

    @contextmanager
    def started(self, env: dict[str, str], *more: str):
        line = cron_line().replace("/srv/restyle", str(self.root)).replace("/etc/restyle", str(self.root / "etc"))
        line = line.replace(" >>", " ".join(["", *more, ">>"]))
        with subprocess.Popen(["/bin/sh", "-c", line], env=environment(env)) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()

    def run(self, env: dict[str, str], *more: str) -> int:
        with self.started(env, *more) as process:
            return process.wait(90)

    def log(self) -> list[str]:
        return (self.root / "cron.log").read_text().splitlines()

    def owner(self) -> dict:
        return json.loads((self.directory / ".owner.json").read_bytes())


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path)


def test_three_runs_of_a_growing_manifest_one_with_an_overlap(site):
    """Each run processes the new rows; an overlapping one names the owner of the lock and changes nothing."""
    assert site.run(QUICK) == 0
    assert accepted(site.directory) == 12
    first = results(site.directory)

    site.grow(3)
    with site.started(SLOW) as second:
        wait_for(lambda: jobs_in(site.directory, "accepted") == 3, "the three new jobs in flight")
        owner = site.owner()
        before = (site.directory / "results.parquet").read_bytes()
        assert site.run(QUICK) == 5
        assert (site.directory / "results.parquet").read_bytes() == before
        assert site.owner() == owner
        assert second.wait(90) == 0
    assert (accepted(site.directory), summary(site.directory)["ended"]) == (15, 3)

    site.grow(2)
    assert site.run(QUICK) == 0
    table = results(site.directory)
    assert table["status"].to_pylist() == ["done"] * 17
    assert table.slice(0, 12).equals(first)
    assert accepted(site.directory) == jobs_in(site.directory) == 17
    said = summary(site.directory)
    assert (said["exit_code"], said["ended"], said["done"]) == (0, 2, 17)

    lines = site.log()
    assert [line.split(" in ")[0] for line in lines if line.startswith("complete")] == [
        "complete: 12 done", "complete: 15 done", "complete: 17 done",
    ]  # fmt: skip
    (refusal,) = (line for line in lines if not line.startswith("complete"))
    assert f"another run is active in out/cron (process {owner['pid']} on {socket.gethostname()} since 20" in refusal
    assert len(lines) == 4


def test_a_dead_owners_lock_is_taken_over(site):
    """Kill -9 leaves the owner's note; the next run ignores it and pays for nothing twice."""
    with site.started(SLOW) as first:
        wait_for(lambda: jobs_in(site.directory, "accepted") == 12, "all jobs in flight")
        dead = site.owner()["pid"]
        os.kill(dead, signal.SIGKILL)
        assert first.wait(30) != 0
    assert site.owner()["pid"] == dead
    assert site.run(QUICK) == 0
    assert not (site.directory / ".owner.json").exists()
    assert accepted(site.directory) == jobs_in(site.directory, "done") == 12


def test_lines_for_a_machine_are_json_each_of_them(site):
    """`--log-format json` in addition to the line's own flags: progress and summary, on both streams."""
    assert site.run(QUICK, "--log-format", "json") == 0
    lines = [json.loads(line) for line in site.log()]
    assert lines[0]["action"] == "plan"
    assert {**lines[-1], "ended_at": ""} == {**summary(site.directory), "ended_at": ""}


def test_the_key_file_is_read_where_there_is_one(site):
    """The shell exports the variables of the key file: the command sees an invalid setting in it."""
    (site.root / "etc").mkdir()
    (site.root / "etc/key").write_text("RESTYLE_LIMITS__BUDGET_USD=nonsense\n")
    assert site.run(QUICK) == 2
    assert "limits.budget_usd" in site.log()[0]


def test_cron_and_systemd_do_the_same():
    """Both use the same command; exit codes that the next run resolves are not failures of the unit."""
    service, timer = unit("restyle.service"), unit("restyle.timer")
    start = shlex.split(service["Service"]["ExecStart"])
    assert start[1:] == shlex.split(cron_line().partition(".venv/bin/restyle ")[2].partition(">>")[0])
    assert start[0] == f"{service['Service']['WorkingDirectory']}/.venv/bin/restyle"
    assert service["Service"]["Type"] == "oneshot"
    assert service["Service"]["SuccessExitStatus"].split() == ["3", "4", "5"]
    assert timer["Timer"]["OnCalendar"] == "hourly"
    assert timer["Install"]["WantedBy"] == "timers.target"
