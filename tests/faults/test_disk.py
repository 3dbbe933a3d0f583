"""A full, failing or powerless disk: the run stops with a message, loses nothing, and resumes.

The target (`target`) counts accepted submits, to compare with the files that survive. These are a few moments of each
kind; `SOAK_MOMENTS=50 pytest tests/faults/test_disk.py` runs 50.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest

from tests.acceptance.command import Ended, accepted, environment, finish, jobs_in, restyle, results, write_manifest
from tests.faults.power_cut import Disk, record
from tests.faults.target import Target, image_bytes, serving

ROWS = 12
MOMENTS = int(os.environ.get("SOAK_MOMENTS", "0"))
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def can_mount() -> bool:
    """Whether this test can mount a small file system, as root or in a user namespace."""
    probe = ["unshare", "--mount", "--map-root-user", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="cannot mount a file system here")


def run(*command: object) -> Ended:
    """Run a command other than plain `restyle`."""
    started = subprocess.Popen(
        [*map(str, command)], env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with started as process:
        ended = finish(process)
    assert "Traceback" not in ended.text, ended.text
    return ended


def stopped_with_a_sentence(ended: Ended) -> None:
    assert ended.code == 4, ended.text
    sentence = ended.err.strip().splitlines()[-1]
    assert sentence.startswith("restyle: ")
    assert "/run" in sentence, "the message has the path"
    assert len(sentence) < 500


def complete(target: Target, directory: Path, ended: Ended) -> None:
    """Check that every job is done and was accepted once, every image is complete, and no partial file is left."""
    assert ended.code == 0, ended.text
    rows = results(directory).to_pylist()
    assert [row["status"] for row in rows] == ["done"] * ROWS
    prompts = [asked.body["prompt"] for asked in target.requests.values()]
    assert sorted(prompts) == sorted({row["prompt"] for row in rows}), "a prompt was accepted twice"
    for row in rows:
        (image,) = row["images"]
        data = (directory / image["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == image["sha256"]
        assert data == image_bytes(int(row["seed"]))
    assert not [path for path in directory.rglob("*.part*") if path.is_file()]


def gone_on_with(target: Target, directory: Path, command: tuple[object, ...]) -> Ended:
    """Repeat the command. Unknown submits were never accepted, so `on_unknown` may submit them again."""
    ended = restyle(*command)
    if ended.code == 4:  # its intent was durable, and the run ended before the submit
        held = {row["prompt"] for row in results(directory).to_pylist() if row["status"] == "unknown"}
        assert held
        assert held.isdisjoint(asked.body["prompt"] for asked in target.requests.values())
        ended = restyle(*command, env={"RESTYLE_LIMITS__ON_UNKNOWN": "resubmit-after=0.1s"})
    return ended


# --- a slow disk ------------------------------------------------------------------------------------------


def test_a_second_stop_waits_for_what_was_handed_in(tmp_path):
    """Four transactions are pending when the callers are gone: table, summary and exit code include them."""
    jobs, directory = 2000, tmp_path / "run"
    manifest = write_manifest(tmp_path / "m.csv", range(jobs))
    command = ("run", manifest, "-o", directory, "--engine", "echo", "--no-download", "--slots", jobs)
    command += ("--max-in-flight", jobs, "--service-time", "3s")
    ended = run(sys.executable, "-m", "tests.faults.slow_disk", jobs, 0.15, *command)
    assert (ended.code, jobs_in(directory, "done")) == (4, jobs), ended.text
    assert sum(row["status"] == "done" for row in results(directory).to_pylist()) == jobs
    assert f"{jobs:,} done" in ended.out
    again = restyle(*command)
    assert (again.code, "0 jobs to do" in again.out) == (0, True), again.text


def test_a_table_that_is_behind_its_journal_is_made_again(tmp_path):
    """The note of the table's content has the number of jobs per state, so that an outdated table is detected."""
    directory = tmp_path / "run"
    command = ("run", write_manifest(tmp_path / "m.csv", range(4)), "-o", directory, "--engine", "echo")
    assert restyle(*command).code == 0
    with sqlite3.connect(directory / "journal.db") as journal:
        ((name, value),) = journal.execute("select * from meta where name = 'projected'")
        assert '"done":4' in value
        journal.execute("update meta set value = replace(value, '\"done\":4', '\"done\":3') where name = ?", [name])
    (directory / "results.parquet").write_bytes(b"older")
    assert restyle(*command).code == 0
    assert len(results(directory).to_pylist()) == 4


# --- failing calls ----------------------------------------------------------------------------------------

REFUSED = {
    "the folder, its lock and its description": [
        ("mkdir", "*/run", 1),
        ("open", "*/run/.lock", 1),
        ("open", "*/run/*owner.json*", 1),
        ("fsync", "*/run/*owner.json*", 1),
        ("open", "*/run/.run.json*", 1),
        ("write", "*/run/.run.json*", 1),
        ("fsync", "*/run/.run.json*", 1),
        ("replace", "*/run/run.json", 1),
        ("open", "*/run/log.jsonl", 1),
    ],
    "the images": [
        ("mkdir", "*/run/images", 1),
        ("mkdir", "*/run/images/??", 2),
        ("open", "*/run/images/.part/*", 2),
        ("write", "*/run/images/.part/*", 2),
        ("fsync", "*/run/images/.part/*", 2),
        ("replace", "*/run/images/*", 2),
        ("fsync", "*/run/images/??", 1),
    ],
    "the results and the summary": [
        ("open", "*/run/.results*", 1),
        ("write", "*/run/.results*", 1),
        ("write", "*/run/.results*", 3),
        ("fsync", "*/run/.results*", 1),
        ("replace", "*/run/results.parquet", 1),
        ("open", "*/run/.summary.json*", 1),
        ("write", "*/run/.summary.json*", 1),
        ("replace", "*/run/summary.json", 1),
    ],
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_call_stops_the_run_and_loses_nothing(tmp_path, what):
    """EIO or ENOSPC at each call, one by one in the same folder: exit 4 with a message; a good disk completes."""
    manifest, directory = write_manifest(tmp_path / "m.csv", range(ROWS)), tmp_path / "run"
    with serving() as target:
        command = ("run", manifest, "-o", directory, "--target", target.url)
        for call, pattern, first in REFUSED[what]:
            error = "EIO" if call == "fsync" else "ENOSPC"
            bad = run(sys.executable, "-m", "tests.faults.bad_disk", call, pattern, error, first, *command)
            stopped_with_a_sentence(bad)
        complete(target, directory, restyle(*command))


def test_the_log_is_no_promise(tmp_path):
    """An unwritable log costs only the log: the run completes."""
    manifest, directory = write_manifest(tmp_path / "m.csv", range(ROWS)), tmp_path / "run"
    with serving() as target:
        command = ("run", manifest, "-o", directory, "--target", target.url)
        ended = run(sys.executable, "-m", "tests.faults.bad_disk", "write", "*/log.jsonl", "ENOSPC", 1, *command)
        complete(target, directory, ended)


@needs_strace
@pytest.mark.parametrize(
    ("call", "error", "file", "first"),
    [
        ("pwrite64", "ENOSPC", "journal.db-wal", 1),
        ("pwrite64", "EIO", "journal.db-wal", 30),
        ("fdatasync", "EIO", "journal.db-wal", 2),
        ("fdatasync", "EIO", "journal.db-wal", 6),
        ("pwrite64", "EIO", "journal.db", 1),
    ],
    ids=str,
)
def test_a_journal_that_cannot_be_written_stops_the_run(tmp_path, call, error, file, first):
    """SQLite's own calls fail, from the first or from one halfway: accepted submits are found again."""
    manifest, directory = write_manifest(tmp_path / "m.csv", range(ROWS)), tmp_path / "run"
    with serving() as target:
        command = ("run", manifest, "-o", directory, "--target", target.url)
        bad = run("strace", "-f", "-qq", "-o", tmp_path / "trace", "-P", directory / file, "-e", f"trace={call}",
                  "-e", f"inject={call}:error={error}:when={first}+",
                  sys.executable, "-m", "batch", *command)  # fmt: skip
        stopped_with_a_sentence(bad)
        assert "journal.db" in bad.err
        complete(target, directory, gone_on_with(target, directory, command))


# --- a full disk ------------------------------------------------------------------------------------------


@contextmanager
def tiny_disk(place: Path, kib: int):
    """Mount a file system of this many KiB; yield a function that enlarges it."""
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"only root can mount a persistent file system: {mounted.stderr.strip()}")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=256m", str(place)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def sizes() -> list[int]:
    """Sizes in KiB, from too small for a journal to almost enough."""
    count = MOMENTS or 4
    return [16 + round(n * 400 / max(1, count - 1)) for n in range(count)]


@needs_mount
@pytest.mark.parametrize("kib", sizes())
def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(tmp_path, kib):
    """Exit 4 with a message, or complete, whatever fills the disk; with free space the rest completes, paid once."""
    manifest = write_manifest(tmp_path / "m.csv", range(ROWS))
    with tiny_disk(tmp_path / "disk", kib) as make_room, serving() as target:
        directory = tmp_path / "disk" / "run"
        command = ("run", manifest, "-o", directory, "--target", target.url)
        ended = restyle(*command)
        if ended.code != 0:
            stopped_with_a_sentence(ended)
        make_room()
        complete(target, directory, gone_on_with(target, directory, command))


@needs_mount
@pytest.mark.parametrize("kib", [260])
def test_the_embedded_endpoint_shares_a_full_disk(tmp_path, kib):
    """Its queue and images are on the same disk: the run still ends, and nothing is accepted twice."""
    manifest = write_manifest(tmp_path / "m.csv", range(ROWS))
    with tiny_disk(tmp_path / "disk", kib) as make_room:
        directory = tmp_path / "disk" / "run"
        command = ("run", manifest, "-o", directory, "--engine", "echo", "--deadline", "20s")
        ended = restyle(*command)
        assert ended.code in {0, 1, 4}, ended.text
        make_room()
        ended = restyle(*command)
        assert ended.code == 0, ended.text
        assert accepted(directory) == ROWS
        assert [row["status"] for row in results(directory).to_pylist()] == ["done"] * ROWS


@pytest.mark.parametrize("kib", [8, 64])
def test_a_file_size_limit_is_a_full_disk(tmp_path, kib):
    """`ulimit -f` limits SQLite and Python to this many KiB per file (EFBIG); needs no privileges."""
    manifest, directory = write_manifest(tmp_path / "m.csv", range(ROWS)), tmp_path / "run"
    with serving() as target:
        command = ("run", manifest, "-o", directory, "--target", target.url)
        limit = (kib * 1024, resource.RLIM_INFINITY)
        ended = restyle(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
        stopped_with_a_sentence(ended)
        complete(target, directory, gone_on_with(target, directory, command))


# --- a power cut ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Record one run, call by call, and its target."""
    base = tmp_path_factory.mktemp("power") / "base"
    base.mkdir()
    manifest = write_manifest(base.parent / "m.csv", range(ROWS))
    with serving() as target:
        code, steps = record(base, ["run", manifest, "-o", base / "run", "--target", target.url])
        assert code == 0
        yield base, manifest, target, steps


@needs_strace
def test_nothing_gets_its_name_before_its_bytes_are_on_the_disk(recorded):
    """Results and images are written, fsynced and renamed, and the folder is fsynced, in this order."""
    _base, _, _, steps = recorded
    written, synced, renamed = set(), set(), 0
    waiting: set[str] = set()
    for step in steps:
        if step.call in {"write", "pwrite"}:
            written.add(step.path)
            synced.discard(step.path)
        elif step.call == "fsync":
            synced.add(step.path)
            waiting -= {name for name in waiting if os.path.dirname(name) == step.path}  # noqa: PTH120
        elif (step.call == "rename" and "/images/" in step.other + step.path) or "results" in step.other:
            assert step.path in written & synced, step
            waiting.add(step.other)
            renamed += 1
        elif step.call == "mkdir" and "/images" in step.path:
            waiting.add(step.path)
    assert renamed == ROWS + 1
    assert {name for name in waiting if ".part" not in name} == set()


@needs_strace
def test_nothing_is_sent_before_its_intent_is_on_the_disk(recorded):
    """Before a POST, the journal was fsynced after its last write, and so was its folder."""
    base, _, _, steps = recorded
    disk, posts = Disk(base), 0
    for step in steps:
        disk.play(step)
        if step.path.startswith(("socket:", "TCP:")) and b"POST /fal-ai" in step.data:
            posts += 1
            prompt = step.data.partition(b'"prompt":"')[2].partition(b'"')[0]
            kept = disk.survivors()
            assert prompt in kept["run/journal.db-wal"] + kept["run/journal.db"]
    assert posts == ROWS


def cuts() -> list[float]:
    """Fractions of the recording at which the power fails."""
    count = MOMENTS or 5
    return [(n + 0.5) / count for n in range(count)]


@needs_strace
@pytest.mark.parametrize("at", cuts())
def test_a_power_cut_costs_nothing(recorded, tmp_path, at):
    """With only the fsynced data, or with a part of the rest, the same command completes and pays once."""
    base, manifest, target, steps = recorded
    rng = Random(at) if cuts().index(at) % 2 else None
    disk, sent = Disk(base), set()
    for step in steps[: round(at * len(steps))]:
        disk.play(step)
        if step.path.startswith(("socket:", "TCP:")) and b"POST /fal-ai" in step.data:
            sent.add(step.data.partition(b'"prompt":"')[2].partition(b'"')[0].decode())
    for name, data in disk.survivors(rng).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    everything = dict(target.requests)
    target.requests = {name: asked for name, asked in everything.items() if asked.body["prompt"] in sent}
    try:
        command = ("run", manifest, "-o", tmp_path / "run", "--target", target.url)
        complete(target, tmp_path / "run", gone_on_with(target, tmp_path / "run", command))
        assert pq.read_table(tmp_path / "run" / "results.parquet").num_rows == ROWS
    finally:
        target.requests = everything
