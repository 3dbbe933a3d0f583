"""The files of a run that would survive a power cut at any moment: a recording by `strace`, played back.

The simulated disk keeps the minimum that POSIX guarantees: a file's bytes up to its last fsync, and a name once its
folder was fsynced. Other writes are lost or survive in part.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.acceptance.command import environment

CALLS = (
    "openat,open,creat,write,pwrite64,writev,sendto,sendmsg,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,"
    "rmdir,mkdir,mkdirat,ftruncate"
)
_LINE = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)(?:<.*>)?(?: .*)?$", re.DOTALL)
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_FILE = re.compile(r"(?:\d+|AT_FDCWD)<((?:\\x[0-9a-f]{2})*)>")


class Step(NamedTuple):
    """One successful call."""

    call: str
    path: str
    """The path; for a rename the old name."""
    data: bytes = b""
    number: int = 0
    """An offset or a size."""
    other: str = ""
    """The new name of a rename."""


def record(base: Path, arguments: Sequence[object]) -> tuple[int, list[Step]]:
    """Run `restyle ...` under strace. Return its exit code and its calls on files below `base` and on sockets."""
    trace = base.parent / f"{base.name}.strace"
    command = ["strace", "-f", "-qq", "-xx", "-y", "-s", "10000000", "--seccomp-bpf", "-e", f"trace={CALLS}",
               "-o", trace, sys.executable, "-m", "batch", *arguments]  # fmt: skip
    ended = subprocess.run([*map(str, command)], env=environment(), capture_output=True, text=True, timeout=110)
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, list(_steps(trace.read_text(), str(base)))


def _steps(text: str, base: str) -> Iterator[Step]:
    for line in _whole_lines(text):
        found = _LINE.match(line)
        if found is None or int(found[4]) < 0:
            continue
        step = _step(found[2], found[3], int(found[4]))
        if step is not None and (step.path.startswith((base, "socket:", "TCP:")) or step.other.startswith(base)):
            yield step


def _whole_lines(text: str) -> Iterator[str]:
    """Join the parts of calls that strace recorded as interrupted by another thread; an fsync counts from its start."""
    begun: dict[str, str] = {}
    for line in text.splitlines():
        pid, _, rest = line.partition(" ")
        if rest.endswith("<unfinished ...>"):
            begun[pid] = rest.removesuffix("<unfinished ...>").strip()
        elif (resumed := re.match(r" *<\.\.\. \w+ resumed>(.*)$", rest)) and pid in begun:
            yield f"{pid} {begun.pop(pid)}{resumed[1]}"
        else:
            yield line


def _step(call: str, arguments: str, returned: int) -> Step | None:
    texts = [_decoded(text) for text in _TEXT.findall(arguments)]
    files = [_decoded(path).decode() for path in _FILE.findall(arguments)]
    names = [text.decode(errors="replace") for text in texts]
    match call:
        case "write" | "sendto" | "sendmsg" | "writev":
            return Step("write", files[0], b"".join(texts))
        case "pwrite64":
            return Step("pwrite", files[0], texts[0], int(arguments.rpartition(",")[2]))
        case "fsync" | "fdatasync":
            return Step("fsync", files[0])
        case "ftruncate":
            return Step("truncate", files[0], number=int(arguments.rpartition(",")[2]))
        case "rename" | "renameat" | "renameat2":
            places = files or ["/", "/"]
            return Step("rename", os.path.join(places[0], names[0]), other=os.path.join(places[-1], names[1]))  # noqa: PTH118
        case "unlink" | "rmdir":
            return Step("remove", names[0])
        case "unlinkat":
            return Step("remove", os.path.join(files[0], names[0]))  # noqa: PTH118
        case "mkdir" | "mkdirat":
            return Step("mkdir", os.path.join(*files[:1], names[0]))  # noqa: PTH118
        case "open" | "openat" | "creat" if "O_CREAT" in arguments or call == "creat":
            path = os.path.join(*files[:1], names[0])  # noqa: PTH118
            if "O_TMPFILE" in arguments:
                return None
            return Step("truncate" if "O_TRUNC" in arguments else "append" if "O_APPEND" in arguments else "open", path)
        case _:
            return None


def _decoded(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


# --- the disk ---------------------------------------------------------------------------------------------


@dataclass
class Inode:
    """One file."""

    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    unsynced: list[tuple[int, bytes]] = field(default_factory=list)
    at: int = 0


class Disk:
    """Files below an existing folder, as the running system sees them and as a power cut leaves them."""

    def __init__(self, base: Path) -> None:
        self._base = str(base)
        self._files: dict[str, Inode] = {}
        self._folders: set[str] = {self._base}
        self._kept_files: dict[str, Inode] = {}
        self._kept_folders: set[str] = {self._base}

    def play(self, step: Step) -> None:
        """Apply a step of the run."""
        match step.call:
            case "mkdir":
                self._folders.add(step.path)
            case "open" | "append" | "truncate":
                inode = self._files.setdefault(step.path, Inode())
                inode.at = len(inode.data) if step.call == "append" else 0
                if step.call == "truncate":
                    inode.data = inode.data[: step.number].ljust(step.number, b"\0")
                    inode.unsynced = [(-1, b"")]
            case "write" | "pwrite" if step.path in self._files:
                inode = self._files[step.path]
                at = step.number if step.call == "pwrite" else inode.at
                inode.data.extend(bytes(max(0, at - len(inode.data))))
                inode.data[at : at + len(step.data)] = step.data
                inode.unsynced.append((at, step.data))
                inode.at = at + len(step.data)
            case "fsync" if step.path in self._files:
                inode = self._files[step.path]
                inode.durable, inode.unsynced = bytes(inode.data), []
            case "fsync" if step.path in self._folders:
                self._keep_names(step.path)
            case "rename":
                self._files[step.other] = self._files.pop(step.path)
            case "remove":
                self._files.pop(step.path, None)
                self._folders.discard(step.path)

    def _keep_names(self, folder: str) -> None:
        def inside(path: str) -> bool:
            return os.path.dirname(path) == folder  # noqa: PTH120

        self._kept_files = {path: inode for path, inode in self._kept_files.items() if not inside(path)}
        self._kept_files |= {path: inode for path, inode in self._files.items() if inside(path)}
        self._kept_folders = {path for path in self._kept_folders if not inside(path)}
        self._kept_folders |= {path for path in self._folders if inside(path)}

    def survivors(self, rng: Random | None = None) -> dict[str, bytes]:
        """Return path and content of the files after a power cut.

        With `rng`, some of the writes without fsync reach the disk, in any order.
        """
        found: dict[str, bytes] = {}
        for path, inode in self._kept_files.items():
            parents = path.removeprefix(self._base).split("/")[1:-1]
            place = self._base
            for name in parents:
                place = f"{place}/{name}"
                if place not in self._kept_folders:
                    break
            else:
                found[path.removeprefix(self._base).lstrip("/")] = self._content(inode, rng)
        return found

    @staticmethod
    def _content(inode: Inode, rng: Random | None) -> bytes:
        if rng is None or not inode.unsynced or inode.unsynced[0][0] < 0:
            return inode.durable
        data = bytearray(inode.durable)
        for at, written in inode.unsynced:
            if rng.random() < 0.5:
                data.extend(bytes(max(0, at - len(data))))
                data[at : at + len(written)] = written
        return bytes(data)
