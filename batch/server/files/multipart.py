"""Uploads that come in parts: in any order, several at once, each as often as its sender likes.

Owns `data_dir/parts`: a folder for each unfinished upload, a file for each part, named for its number and its bytes.
What is unfinished survives a restart and takes a bounded part of the disk. Where the whole file goes is the
storage's business.
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
"""The highest number of a part."""
_PART = re.compile(r"(\d{4})-([0-9a-f]{32})")


class BadParts(ValueError):
    """The parts that were named are not those that came. The message says which."""


class Part(NamedTuple):
    """A part as its sender names it at the end."""

    number: int
    tag: str
    """What its upload was answered with."""


class Parts:
    """Unfinished uploads below `root`, each under a name."""

    def __init__(self, root: Path, limits: ServerLimits) -> None:
        make_folders(root)
        self._root = root
        self._limits = limits
        for leftover in root.glob("*/*.new"):
            leftover.unlink()
        self._held_bytes = sum(part.stat().st_size for part in root.glob("*/*"))
        self.joining = asyncio.Lock()
        """Held while parts become a file: asked twice at once, it is still put together once."""
        self._naming = asyncio.Lock()
        """Held while a part takes its place: the others of its file must not change while they are added up."""

    async def put(self, name: str, number: int, chunks: AsyncIterator[bytes], announced: int | None) -> str:
        """Write one part down; durable when it returns. Its tag.

        Args:
            name: of the upload.
            number: of the part, from 1 to `PARTS`.
            chunks: its bytes.
            announced: how many there will be, if the sender says so.

        Raises:
            UploadTooLarge: see the limits above.
            StorageError: the disk refused, or all unfinished uploads together take too much of it.
        """
        # Room is taken before the bytes come, so that many at once cannot go past the limits.
        room = self._limits.part_bytes if announced is None else announced
        if room > self._limits.part_bytes:
            raise UploadTooLarge(f"a part may have {self._limits.part_bytes // 2**20} MiB")
        if self._held_bytes + room > self._limits.unfinished_bytes:
            raise StorageError(
                "too many unfinished uploads are kept; finish some, or wait a day until they are removed"
            )
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
        except ConnectionError:  # the sender's, not the disk's
            raise
        except OSError as error:
            raise _unwritable(folder, error) from error
        finally:
            with suppress(OSError):
                temporary.unlink()
            self._held_bytes += used - room
        return tag

    def started(self, name: str) -> bool:
        """Whether parts of it are here."""
        return (self._root / name).exists()

    async def join(self, name: str, parts: Sequence[Part], target: Path) -> None:
        """Copy the parts into one file, in the order of their numbers; it is not synced.

        Raises:
            BadParts: none is named, one twice, or one that did not come like that.
            StorageError: the disk refused.
        """
        folder = self._root / name
        wanted = sorted(parts)
        if not wanted or len({part.number for part in wanted}) < len(wanted):
            raise BadParts("name every part once")
        files = [folder / f"{part.number:04}-{part.tag}" for part in wanted]
        found = [_PART.fullmatch(file.name) is not None and file.is_file() for file in files]
        missing = [part.number for part, here in zip(wanted, found, strict=True) if not here]
        if missing:
            raise BadParts(f"part {missing[0]} did not come with that etag; send it again")
        await asyncio.to_thread(patiently, partial(_join, files, target), time.sleep)

    async def drop(self, name: str) -> None:
        """Remove all its parts."""
        self._held_bytes -= await asyncio.to_thread(_drop, self._root / name)

    async def remove_abandoned(self, before: float) -> int:
        """Remove the uploads to which nothing was added since an instant (Unix seconds); how many."""
        found = [folder for folder in self._root.iterdir() if folder.stat().st_mtime < before]
        for folder in found:
            self._held_bytes -= await asyncio.to_thread(_drop, folder)
        return len(found)


def _keep(temporary: Path, folder: Path, name: str, size: int, limit: int) -> int:
    """Give a part its name and remove what it replaces; by how many bytes the folder has grown."""
    sizes = {part.name: part.stat().st_size for part in folder.iterdir() if _PART.fullmatch(part.name)}
    earlier = {part: sizes[part] for part in sizes if part[:5] == name[:5]}
    grown = size - sum(earlier.values())
    if sum(sizes.values()) + grown > limit:
        raise UploadTooLarge(f"a file may have {limit // 2**20} MiB")
    temporary.replace(folder / name)
    for part in earlier.keys() - {name}:
        (folder / part).unlink(missing_ok=True)
    return grown


def _unwritable(place: Path, error: OSError) -> StorageError:
    return StorageError(f"{place} cannot be written: {error}; free space or check its rights")


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
    """More bytes came than may be stored."""


class Spooled(NamedTuple):
    """What was written."""

    sha256: bytes
    size_bytes: int


async def spool(chunks: AsyncIterator[bytes], place: Path, limit: int) -> Spooled:
    """Append a stream of at most `limit` bytes to a file; it is not synced.

    Raises:
        UploadTooLarge: more came; what was written so far is left for the caller to remove.
        OSError: the disk refused.
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
