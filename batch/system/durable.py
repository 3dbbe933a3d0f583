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
        temporary: the name until then, in the same file system; None: `.NAME.part` beside `path`. A file that a
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
            with suppress(OSError):  # closing writes what is still buffered, which the disk may refuse once more
                file.close()
            raise
        file.close()
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # the error that is being raised matters more
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
    """Put the bytes of a file, or the names in a folder, on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder, and keeps names without being asked
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class NameSync:
    """Syncs the names of files in folders below `root`; the folders that lead to one of them only the first time.

    Files that appear in one folder at the same time need a sync each: none of them knows which names an earlier sync
    has covered. Folders stay, so one sync of theirs is enough, even if an earlier process created them and was killed
    before it came to that. Threads may share it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: set[Path] = set()

    def sync(self, folder: Path) -> None:
        """Put the names in `folder`, which is below the root, on the disk."""
        sync(folder)
        if folder in self._known:
            return
        for parent in folder.parents:
            sync(parent)
            if parent == self._root:
                break
        self._known.add(folder)


def make_folders(folder: Path) -> None:
    """Create a folder and those above it that are missing, and sync their names."""
    if folder.is_dir():
        return
    parent = folder.absolute().parent
    make_folders(parent)
    folder.mkdir(exist_ok=True)
    sync(parent)
