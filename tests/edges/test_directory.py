"""The run directory on a real disk: the lock and the check of the configuration."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import orjson
import pytest

from batch.config import Settings
from batch.directory import RunDirectory, config_of, write_whole
from batch.errors import RunDirectoryError, RunLocked, StorageError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.prepare()
    return directory


def settings(**sections) -> Settings:
    return Settings.model_validate(sections)


# --- preparing --------------------------------------------------------------------------------------------


def test_nothing_is_made_before_it_is_asked_for(tmp_path):
    """Constructing a `RunDirectory` creates nothing."""
    RunDirectory(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_is_made_with_its_parents(tmp_path):
    """A second call changes nothing."""
    directory = RunDirectory(tmp_path / "a" / "b")
    directory.prepare()
    directory.prepare()
    assert list(directory.root.iterdir()) == []


def test_a_file_in_its_place_is_refused(tmp_path):
    """`-o results.parquet` is a likely mistake."""
    (tmp_path / "results.parquet").write_text("")
    with pytest.raises(RunDirectoryError, match="is a file; name a folder with -o"):
        RunDirectory(tmp_path / "results.parquet").prepare()


def test_a_folder_of_something_else_is_refused(tmp_path):
    """`-o .` would mix a run into a user's own files."""
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        RunDirectory(tmp_path).prepare()


def test_a_place_where_nothing_can_be_made_is_refused():
    """Not even root can create a folder in /proc."""
    with pytest.raises(RunDirectoryError, match="cannot be written") as caught:
        RunDirectory(Path("/proc/restyle/run")).prepare()
    assert "-o" in str(caught.value)


def test_a_path_through_a_file_is_refused(tmp_path):
    """`-o manifest.csv/out`."""
    (tmp_path / "m.csv").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        RunDirectory(tmp_path / "m.csv" / "out").prepare()


def test_reading_needs_a_run(root):
    """An empty folder is not a run."""
    with pytest.raises(RunDirectoryError, match=r"there is no run in .*restyle run MANIFEST"):
        root.require()
    root.journal.touch()
    root.require()


# --- the lock ---------------------------------------------------------------------------------------------


HOLD = """
import sys
import tempfile
from pathlib import Path
from batch.directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).locked("2026-11-22T09:00:00+00:00"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(root):
    """A process that holds the lock of the directory."""
    command = [sys.executable, "-c", HOLD, str(root.root)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


def test_a_second_run_is_told_who_works_there(root, holder):
    """The message names process, host and start, and comes quickly."""
    with pytest.raises(RunLocked) as caught, root.locked("now"):
        pass
    words = str(caught.value)
    assert f"process {holder.pid} on {socket.gethostname()} since 2026-11-22T09:00:00+00:00" in words
    assert "wait for it or stop it" in words
    assert root.is_locked()


def test_a_killed_owner_holds_nothing(root, holder):
    """The kernel frees the lock; the owner file of a dead process is ignored."""
    holder.kill()
    holder.wait(10)
    assert not root.is_locked()
    with root.locked("now"):
        assert json.loads((root.root / ".owner.json").read_text())["pid"] == os.getpid()
    assert not (root.root / ".owner.json").exists()


def test_a_look_at_the_lock_does_not_turn_a_run_away(root):
    """`restyle status` holds the lock for a moment; a run that starts then waits for it."""
    import threading

    from filelock import FileLock

    look = FileLock(root.root / ".lock", thread_local=False)
    look.acquire()
    threading.Timer(0.1, look.release).start()
    with root.locked("now"):
        pass


def test_an_owner_that_says_nothing_is_no_fault(root, holder):
    """The owner may be writing the file at this moment."""
    (root.root / ".owner.json").write_text("{")
    with pytest.raises(RunLocked, match="owner unknown"), root.locked("now"):
        pass


def test_an_error_inside_frees_the_lock(root):
    """For any exception."""
    with pytest.raises(KeyError), root.locked("now"):
        raise KeyError
    assert not root.is_locked()


# --- what the run waits for -------------------------------------------------------------------------------


def test_a_note_is_read_back_and_ends_with_the_run(root):
    """The note is replaced atomically; the next run starts without the note of a killed one."""
    root.note_waits({"at": 1.0})
    with root.locked("now"):
        assert root.read_waits() is None
        root.note_waits({"at": 2.0, "in_queue": {"jobs": 1}})
        root.note_waits({"at": 3.0})
        assert root.read_waits() == {"at": 3.0}
        root.note_waits(None)
        assert root.read_waits() is None
        root.note_waits({"at": 4.0})
    assert {path.name for path in root.root.iterdir()} <= {".lock"}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7"])
def test_a_note_that_cannot_be_read_is_none(root, text):
    """It is for display only."""
    (root.root / ".waits.json").write_text(text)
    assert root.read_waits() is None


def test_a_note_that_cannot_be_written_is_no_fault(tmp_path):
    """The journal reports a full disk."""
    gone = RunDirectory(tmp_path / "gone")
    gone.note_waits({"at": 1.0})
    gone.note_waits(None)
    assert gone.read_waits() is None


# --- the same command? ------------------------------------------------------------------------------------


def made_with(root: RunDirectory, **sections) -> None:
    root.write_run({"config": config_of(settings(**sections))})


def test_the_first_run_may_have_any_config(root):
    """There is no earlier configuration to compare."""
    root.check_config(settings(), accept=False)


@pytest.mark.parametrize(
    "now",
    [
        {"limits": {"max_in_flight": 3, "budget_usd": 5.0, "deadline": 60.0}},
        {"output": {"download": False}},
        {"target": {"slots": 9, "service_time": 2.0}},
        {"price": {"usd_per_megapixel": 0.1}},
    ],
)
def test_how_it_is_run_may_change(root, now):
    """Limits, pacing and downloads do not change the jobs."""
    made_with(root)
    root.check_config(settings(**now), accept=False)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"input": {"strength": 0.5}}, "input.strength was None, is 0.5"),
        ({"sweep": {"seed": [1, 2]}}, "sweep.seed was None, is [1, 2]"),
        ({"manifest": {"image": "image"}}, "manifest.image was 'image_url', is 'image'"),
        ({"run_seed": 7}, "run_seed was 0, is 7"),
        ({"target": {"engine": "echo"}}, "target.engine was 'preview', is 'echo'"),
    ],
)
def test_what_is_run_may_change_only_when_that_is_said(root, now, words):
    """A configuration with other jobs is named and refused, and `--new-config` accepts it."""
    made_with(root)
    with pytest.raises(RunDirectoryError) as caught:
        root.check_config(settings(**now), accept=False)
    assert words in str(caught.value)
    assert "--new-config" in str(caught.value)
    root.check_config(settings(**now), accept=True)


@pytest.mark.parametrize("now", [{"name": "fal"}, {"name": "http://gpu:1"}, {"app": "fal-ai/other/app"}])
@pytest.mark.parametrize("accept", [False, True])
def test_another_service_is_never_accepted(root, now, accept):
    """Results of different services do not belong into one table."""
    made_with(root)
    with pytest.raises(RunDirectoryError, match="name another folder with -o"):
        root.check_config(settings(target=now), accept=accept)


def test_a_run_that_named_fals_host_by_its_url_goes_on_as_fals(root):
    """Version 0.1 treated it as a self-hosted server; its paid requests are collected with `--target fal`."""
    root.write_run(
        {
            "config": {
                **config_of(settings()),
                "target": {**config_of(settings())["target"], "name": "https://queue.fal.run"},
            }
        }
    )
    root.check_config(settings(target={"name": "fal"}), accept=False)
    with pytest.raises(RunDirectoryError, match="name another folder with -o"):
        root.check_config(settings(target={"name": "http://gpu:1"}), accept=False)


def test_a_server_may_move(root):
    """All URLs are the same kind of target: a port changes from run to run."""
    made_with(root, target={"name": "http://gpu:1"})
    root.check_config(settings(target={"name": "http://gpu:2"}), accept=False)


# --- small files ------------------------------------------------------------------------------------------


def test_run_json_comes_back_as_it_was_written(root):
    """JSON, replaced atomically."""
    assert root.read_run() is None
    root.write_run({"a": 1})
    root.write_run({"b": [None, "é"]})
    assert root.read_run() == {"b": [None, "é"]}
    assert [path.name for path in root.root.iterdir()] == ["run.json"]


@pytest.mark.parametrize("data", [b"", b"{", b"\xff"])
def test_a_damaged_run_json_is_said(root, data):
    """It is not ignored: it contains the configuration of the journal."""
    root.run_file.write_bytes(data)
    with pytest.raises(RunDirectoryError, match=r"run\.json cannot be read"):
        root.read_run()


def test_the_summary_is_one_line(root):
    """For `tail -1` and `jq`."""
    root.write_summary({"a": {"b": 1}})
    assert root.summary_file.read_bytes() == b'{"a":{"b":1}}\n'


def test_a_refused_write_leaves_the_old_file(root):
    """A folder with the temporary name simulates a disk error."""
    path = root.root / "x.json"
    write_whole(path, b"old")
    (root.root / ".x.json.part").mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"


def test_the_config_that_is_kept_has_no_secret(monkeypatch):
    """The API key is not a setting."""
    monkeypatch.setenv("FAL_KEY", "marker-key")
    assert b"marker-key" not in orjson.dumps(config_of(settings(target={"name": "fal"})))


def test_a_run_that_cannot_be_written_is_not_to_be_made_elsewhere(tmp_path, monkeypatch):
    """In another folder every job would be submitted and paid for again."""
    (tmp_path / "journal.db").touch()

    def refuse(**options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(RunDirectoryError, match="make it writable") as caught:
        RunDirectory(tmp_path).prepare()
    assert "another folder" not in str(caught.value)
