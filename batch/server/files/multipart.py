"""Multipart uploads: parts arrive in any order, in parallel and repeatedly.

Owns `data_dir/parts`: one folder per unfinished upload, one file per part, named by part number and hash. Unfinished
uploads survive a restart and use a bounded amount of disk space. The storage decides where the joined file goes.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from batch.errors import StorageError
from batch.server.limits import ServerLimits
from batch.system.descriptors import patiently
from batch.system.durable import make_folders, sync

__all__ = [
    "PARTS",
    "BadParts",
    "Part",
    "Parts",
    "Spooled",
    "UploadTooLarge",
    "spool",
]

PARTS = 1000
"""The highest part number."""
_PART = re.compile(r"(\d{4})-([0-9a-f]{32})")


class BadParts(ValueError):
    """The listed parts are not those that were received. The message names the first one."""


class Part(NamedTuple):
    """A part as listed by the client when it completes the upload."""

    number: int
    tag: str
    """The ETag from the response to the part's upload."""


class Parts:
    """Unfinished uploads below `root`, by name."""

    def __init__(self, root: Path, limits: ServerLimits) -> None:
        make_folders(root)
        self._root = root
        self._limits = limits
        for leftover in root.glob("*/*.new"):
            leftover.unlink()
        self._held_bytes = sum(part.stat().st_size for part in root.glob("*/*"))
        self.joining = asyncio.Lock()
        """Held while parts are joined, so that concurrent completions join them once."""
        self._naming = asyncio.Lock()
        """Held while a part is put in place, so that the sizes of its file's parts stay constant during the check."""

    async def put(self, name: str, number: int, chunks: AsyncIterator[bytes], announced: int | None) -> str:
        """Store one part and return its tag; durable on return.

        Args:
            name: the name of the upload.
            number: the part number, from 1 to `PARTS`.
            chunks: the bytes.
            announced: the size in bytes, if the client sent it.

        Raises:
            UploadTooLarge: a part or a file exceeds its limit.
            StorageError: the write failed, or the unfinished uploads exceed their total limit.
        """
        # Space is reserved before the bytes arrive, so that concurrent uploads cannot exceed the limits.
        room = self._limits.part_bytes if announced is None else announced
        if room > self._limits.part_bytes:
            raise UploadTooLarge(f"a part is limited to {self._limits.part_bytes // 2**20} MiB")
        if self._held_bytes + room > self._limits.unfinished_bytes:
            raise StorageError("too many unfinished uploads; complete some, or wait a day until they are removed")
        self._held_bytes += room
        used = 0
        folder = self._root / name
        temporary = folder / f"{secrets.token_hex(8)}.new"
        try:
            await asyncio.to_thread(folder.mkdir, exist_ok=True)
            spooled = await spool(chunks, temporary, room)
            tag = spooled.sha256.hex()[:32]
            await asyncio.to_thread(patiently, partial(sync, temporary), time.sleep)
            keep = partial(_keep, temporary, folder, f"{number:04}-{tag}", spooled.size_bytes, self._limits.file_bytes)
            async with self._naming:
                used = await asyncio.to_thread(patiently, keep, time.sleep)
            for named in (folder, self._root):
                await asyncio.to_thread(patiently, partial(sync, named), time.sleep)
        except ConnectionError:  # from the client, not from the disk
            raise
        except OSError as error:
            raise _unwritable(folder, error) from error
        finally:
            with suppress(OSError):
                temporary.unlink()
            self._held_bytes += used - room
        return tag

    def started(self, name: str) -> bool:
        """Whether this upload has parts."""
        return (self._root / name).exists()

    async def join(self, name: str, parts: Sequence[Part], target: Path) -> None:
        """Copy the parts into one file, in the order of their numbers, without syncing it.

        Raises:
            BadParts: the list is empty, repeats a part, or names one that was not received with that tag.
            StorageError: the write failed.
        """
        folder = self._root / name
        wanted = sorted(parts)
        if not wanted or len({part.number for part in wanted}) < len(wanted):
            raise BadParts("list every part exactly once")
        files = [folder / f"{part.number:04}-{part.tag}" for part in wanted]
        found = [_PART.fullmatch(file.name) is not None and file.is_file() for file in files]
        missing = [part.number for part, here in zip(wanted, found, strict=True) if not here]
        if missing:
            raise BadParts(f"part {missing[0]} was not received with this etag; upload it again")
        await asyncio.to_thread(patiently, partial(_join, files, target), time.sleep)

    async def drop(self, name: str) -> None:
        """Remove all parts of an upload."""
        self._held_bytes -= await asyncio.to_thread(_drop, self._root / name)

    async def remove_abandoned(self, before: float) -> int:
        """Remove uploads without a new part since `before` (Unix seconds); return their number."""
        found = [folder for folder in self._root.iterdir() if folder.stat().st_mtime < before]
        for folder in found:
            self._held_bytes -= await asyncio.to_thread(_drop, folder)
        return len(found)


def _keep(temporary: Path, folder: Path, name: str, size: int, limit: int) -> int:
    """Move a part into its folder and remove the one it replaces; return the folder's growth in bytes."""
    sizes = {part.name: part.stat().st_size for part in folder.iterdir() if _PART.fullmatch(part.name)}
    earlier = {part: sizes[part] for part in sizes if part[:5] == name[:5]}
    grown = size - sum(earlier.values())
    if sum(sizes.values()) + grown > limit:
        raise UploadTooLarge(f"a file is limited to {limit // 2**20} MiB")
    temporary.replace(folder / name)
    for part in earlier.keys() - {name}:
        (folder / part).unlink(missing_ok=True)
    return grown


def _unwritable(place: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {place}: {error}; free disk space or check the permissions")


def _join(files: Sequence[Path], target: Path) -> None:
    try:
        with target.open("wb") as whole:
            for file in files:
                with file.open("rb") as part:
                    shutil.copyfileobj(part, whole, 1 << 20)
    except OSError as error:
        raise _unwritable(target, error) from error


def _drop(folder: Path) -> int:
    size = sum(part.stat().st_size for part in folder.iterdir() if _PART.fullmatch(part.name))
    shutil.rmtree(folder, ignore_errors=True)
    return size


_CHUNK = 1 << 20


class UploadTooLarge(ValueError):
    """More bytes than the limit."""


class Spooled(NamedTuple):
    """Hash and size of a written file."""

    sha256: bytes
    size_bytes: int


async def spool(chunks: AsyncIterator[bytes], place: Path, limit: int) -> Spooled:
    """Append a stream of at most `limit` bytes to a file, without syncing it.

    Raises:
        UploadTooLarge: the stream is longer; the caller removes the partial file.
        OSError: the write failed.
    """
    digest, size, buffer = hashlib.sha256(), 0, bytearray()
    async for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise UploadTooLarge(f"more than {limit} bytes")
        digest.update(chunk)
        buffer += chunk
        if len(buffer) >= _CHUNK:
            await asyncio.to_thread(_append, place, buffer)
            buffer = bytearray()
    await asyncio.to_thread(_append, place, buffer)
    return Spooled(digest.digest(), size)


def _append(place: Path, data: bytearray) -> None:
    with patiently(lambda: place.open("ab"), time.sleep) as file:
        file.write(data)
