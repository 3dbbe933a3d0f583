"""List the files below a folder in order, without hidden files and run directories. Edge."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from batch.errors import ManifestError

__all__ = ["files_below", "is_run_directory"]

_SKIPPED = frozenset({"__MACOSX"})
_RUN_FILES = ("journal.db", ".lock")


def is_run_directory(folder: Path) -> bool:
    """Return whether a folder is a run directory: as a manifest, its results would be restyled and paid for again."""
    return (folder / _RUN_FILES[0]).exists() and (folder / "run.json").exists()


def files_below(root: Path, skipped: Callable[[str], object] = lambda _: None) -> Iterator[str]:
    """Yield paths relative to `root`, with slashes, sorted part by part. Symlinked folders are not entered.

    Memory holds the names of one folder per level.

    Args:
        root: the folder to list.
        skipped: called with a description of each run directory and each symlinked folder that is left out.

    Raises:
        ManifestError: a folder cannot be read.
    """
    levels = [_entries(root, "", skipped)]
    while levels:
        entry = next(levels[-1], None)
        if entry is None:
            levels.pop()
        elif entry.endswith("/"):
            levels.append(_entries(root, entry, skipped))
        else:
            yield entry


def _entries(root: Path, prefix: str, skipped: Callable[[str], object]) -> Iterator[str]:
    """Yield the files of one folder, and its subfolders with a trailing slash."""
    folder = root / prefix
    if prefix and is_run_directory(folder):
        skipped(f"the run directory {prefix[:-1]}")
        return
    names: list[str] = []
    folders: set[str] = set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in _SKIPPED:
                    continue
                if entry.is_dir():
                    if entry.is_symlink():
                        skipped(f"the linked folder {prefix}{entry.name}")
                        continue
                    folders.add(entry.name)
                names.append(entry.name)
    except OSError as error:
        raise ManifestError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
    names.sort(reverse=True)
    while names:
        name = names.pop()
        yield f"{prefix}{name}/" if name in folders else prefix + name
