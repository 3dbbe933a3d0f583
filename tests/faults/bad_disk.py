"""Run `restyle ...` in a process whose disk refuses one kind of call on some files, from the n-th such call on.

    python -m tests.faults.bad_disk CALL PATTERN ERRNO N restyle-arguments...

CALL is `open` (for writing), `write`, `fsync`, `replace` or `mkdir`; PATTERN is matched with `fnmatch` against the full
path. Affects only calls made by Python; `strace` handles SQLite's calls, which bypass it.
"""

from __future__ import annotations

import errno
import fnmatch
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from batch.cli.main import main


class Disk:
    """Counts the matching calls and refuses them from the n-th on."""

    def __init__(self, call: str, pattern: str, number: int, first: int) -> None:
        self._call, self._pattern, self._number, self._left = call, pattern, number, first

    def touch(self, call: str, path: object) -> None:
        """Raise if this call must fail."""
        if call != self._call or not fnmatch.fnmatch(os.fsdecode(path), self._pattern):  # type: ignore[arg-type]
            return
        self._left -= 1
        if self._left <= 0:
            raise OSError(self._number, os.strerror(self._number), os.fsdecode(path))  # type: ignore[arg-type]

    def watch(self) -> None:
        """Route every call that Python makes through `touch`."""
        real_open, real_os_open, real_fdopen = io.open, os.open, os.fdopen

        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            path = _path_of(file)
            if not set(mode) & set("wax+"):
                return real_open(file, mode, *arguments, **options)
            if not isinstance(file, int):
                self.touch("open", path)
            return _Watched(real_open(file, mode, *arguments, **options), self, path)

        def os_opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR):
                self.touch("open", path)
            return real_os_open(path, flags, *arguments, **options)

        io.open = opened
        __builtins__.open = opened  # type: ignore[attr-defined]
        os.open = os_opened
        os.fdopen = lambda fd, mode="r", *a, **o: _Watched(real_fdopen(fd, mode, *a, **o), self, _path_of(fd))
        os.fsync = self._before("fsync", os.fsync, 0)
        os.replace = self._before("replace", os.replace, 1)
        os.mkdir = self._before("mkdir", os.mkdir, 0)

    def _before(self, name: str, real: Callable[..., Any], place: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.touch(name, _path_of(arguments[place]))
            return real(*arguments, **options)

        return call


class _Watched:
    """A file whose writes may fail."""

    def __init__(self, real: Any, disk: Disk, path: str) -> None:
        self._real, self._disk, self._path = real, disk, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def write(self, data: Any) -> int:
        self._disk.touch("write", self._path)
        return self._real.write(data)

    def __enter__(self) -> Any:
        self._real.__enter__()
        return self

    def __exit__(self, *details: object) -> Any:
        return self._real.__exit__(*details)

    def __iter__(self) -> Any:
        return iter(self._real)


def _path_of(file: object) -> str:
    if isinstance(file, int):
        return os.readlink(f"/proc/self/fd/{file}") if os.path.isdir("/proc/self/fd") else str(file)  # noqa: PTH112, PTH115
    return os.fsdecode(os.path.abspath(file))  # type: ignore[type-var,arg-type]  # noqa: PTH100


if __name__ == "__main__":
    call, pattern, name, first = sys.argv[1:5]
    Disk(call, pattern, getattr(errno, name), int(first)).watch()
    sys.exit(main(sys.argv[5:]))
