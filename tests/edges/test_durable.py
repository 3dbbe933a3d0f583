"""Durable writes: the order of the system calls, and the state after one of them fails."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from batch.system.durable import NameSync, make_folders, replacing, write_file


@pytest.fixture
def calls(monkeypatch):
    """The calls of fsync and replace in order, with the names of their files and folders."""
    recorded = []

    def recording(real, path_of):
        def call(*arguments):
            recorded.append((real.__name__, path_of(arguments)))
            return real(*arguments)

        return call

    opened = lambda arguments: Path(os.readlink(f"/proc/self/fd/{arguments[0]}")).name  # noqa: E731, PTH115
    monkeypatch.setattr(os, "fsync", recording(os.fsync, opened))
    monkeypatch.setattr(os, "replace", recording(os.replace, lambda arguments: Path(arguments[1]).name))
    return recorded


def test_a_file_is_synced_then_renamed_then_its_folder_is_synced(tmp_path, calls):
    """With sync_name=False the last step is left to the caller."""
    write_file(tmp_path / "a", b"1")
    assert calls == [("fsync", ".a.part"), ("replace", "a"), ("fsync", tmp_path.name)]
    calls.clear()
    write_file(tmp_path / "a", b"2", tmp_path / "t", mode=0o600, sync_name=False)
    assert calls == [("fsync", "t"), ("replace", "a")]
    assert (tmp_path / "a").read_bytes() == b"2"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_leftover_part_file_does_not_affect_bytes_or_permissions(tmp_path):
    """A killed process may have left a longer, world-readable part file."""
    (tmp_path / ".a.part").write_bytes(b"a longer one")
    write_file(tmp_path / "a", b"1", mode=0o600)
    assert (tmp_path / "a").read_bytes() == b"1"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch, step):
    """The error comes from the disk or from the block inside `replacing`."""
    write_file(tmp_path / "a", b"old")

    def break_off():
        with replacing(tmp_path / "a") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()

    def refuse(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(OSError, match="Input/output"):
        write_file(tmp_path / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_folders_are_created_with_their_names_synced(tmp_path, calls):
    """Missing folders are created from the top; existing ones are not synced."""
    make_folders(tmp_path / "a" / "b")
    assert calls == [("fsync", tmp_path.name), ("fsync", "a")]
    make_folders(tmp_path / "a" / "b")
    assert len(calls) == 2


def test_parent_folders_are_synced_once(tmp_path, calls):
    """The folder itself is synced each time."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    names = NameSync(tmp_path)
    names.sync(tmp_path / "a" / "b")
    names.sync(tmp_path / "a" / "b")
    assert [name for _, name in calls] == ["b", "a", tmp_path.name, "b"]
