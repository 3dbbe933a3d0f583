"""Files that survive a power cut: written under a temporary name, synced, renamed, and the name synced. Edge: disk.

A rename may reach the disk before the bytes of its file, so the bytes are synced first; a name lasts only once its
folder is synced too. Every function raises the `OSError` of the disk: only the caller knows which advice helps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["NameSync", "make_folders", "replacing", "sync", "write_file"]


@contextmanager
def replacing(
    path: Path, temporary: Path | None = None, *, mode: int = 0o666, sync_name: bool = True
) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends, with all its bytes on disk.

    If the block or the disk fails, the temporary file is removed and `path` stays as it is.

    Args:
        path: the file to replace or to create; its folder exists.
        temporary: the name until then, in the same file system; None: `.NAME.part` next to `path`. A file that a
            killed process left there is removed.
        mode: permissions of the file, before the umask.
        sync_name: whether to sync the folder of `path`. Without it a power cut can bring the old file back.
    """
    temporary = temporary or path.with_name(f".{path.name}.part")
    temporary.unlink(missing_ok=True)
    try:
        file = open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115 - closed below
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):  # closing flushes the buffer, which may fail again
                file.close()
            raise
        file.close()
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # must not hide the error that is being raised
            temporary.unlink(missing_ok=True)
        raise
    if sync_name:
        sync(path.parent)


def write_file(
    path: Path, data: bytes, temporary: Path | None = None, *, mode: int = 0o666, sync_name: bool = True
) -> None:
    """Replace or create a file with these bytes; see `replacing`."""
    with replacing(path, temporary, mode=mode, sync_name=sync_name) as file:
        file.write(data)


def sync(path: Path) -> None:
    """Fsync a file or a folder."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder, and syncs names itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class NameSync:
    """Syncs folders below `root`; the parents of each folder only once. Thread-safe.

    Each new file needs its own sync of its folder, because an earlier sync may not have covered its name. The parent
    folders are never removed, so one sync per process covers them, even if a killed process created them unsynced.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: set[Path] = set()

    def sync(self, folder: Path) -> None:
        """Sync `folder`, which is below `root`."""
        sync(folder)
        if folder in self._known:
            return
        for parent in folder.parents:
            sync(parent)
            if parent == self._root:
                break
        self._known.add(folder)


def make_folders(folder: Path) -> None:
    """Create a folder and its missing parents, and sync their names."""
    if folder.is_dir():
        return
    parent = folder.absolute().parent
    make_folders(parent)
    folder.mkdir(exist_ok=True)
    sync(parent)
