"""The server's files, uploads and results, stored by content.

Owns `data_dir/files`. A file appears by rename, complete and durable or not at all; small files are rows of `small.db`.
A file's name is a keyed hash of its SHA-256, so that equal bytes are stored once and names cannot be guessed. A file
with its own lifetime has a random name and is never shared. Paths are `/files/<prefix>/<name>`; responses add the
server's origin, which may change. `batch.server.queue.cleanup` decides when files are removed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import mimetypes
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import urlsplit

from batch.errors import StorageError
from batch.image_formats import FORMATS, format_of_type
from batch.server.files.multipart import Part, Parts, Spooled, UploadTooLarge, spool
from batch.server.files.small_files import SMALL_BYTES, SmallFile, SmallFiles
from batch.server.limits import DEFAULT_LIMITS, ServerLimits
from batch.system.descriptors import patiently
from batch.system.durable import NameSync, make_folders, sync, write_file

__all__ = ["Reservation", "Storage", "UploadTooLarge", "content_type_of"]

_PATH = re.compile(r"/files/([0-9a-f]{2})/(\1[0-9a-f]{30}(?:\.[a-z0-9]{1,8})?)")
_TYPES = mimetypes.MimeTypes(filenames=())  # the standard library's table only: the same on every machine
for _known in FORMATS:  # older versions of Python lack some of them
    _TYPES.add_type(_known.content_type, _known.suffix)


class Reservation(NamedTuple):
    """A reserved name for a file that is uploaded later."""

    path: str
    """The future `/files/...` path of the file."""
    token: str
    """Authorises the upload; a signature of the path."""


class Storage:
    """Files by content below `root`; an async context manager.

    Args:
        root: the server's data dir; `files/`, `incoming/` and `parts/` are created in it. Partial files of an
            earlier process are removed.
        clock: Unix seconds, for the save time of each file.
        limits: limits of multipart uploads.
    """

    def __init__(
        self, root: Path, clock: Callable[[], float] = time.time, *, limits: ServerLimits = DEFAULT_LIMITS
    ) -> None:
        self._files = root / "files"
        self._incoming = root / "incoming"
        for folder in (self._files, self._incoming):
            make_folders(folder)
        self._names = NameSync(self._files)
        for leftover in self._incoming.iterdir():
            leftover.unlink()
        self._secret = _secret(root / "secret")
        self._small = SmallFiles(root / "small.db", clock())
        self._parts = Parts(root / "parts", limits)
        self._clock = clock

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._small.aclose()

    async def save(self, data: bytes, content_type: str | None, life: float | None = None) -> str:
        """Store bytes and return their path; durable on return.

        Args:
            data: the bytes.
            content_type: determines the suffix of the name.
            life: lifetime in seconds; None: the server's retention.

        Raises:
            StorageError: the disk refused.
        """
        path = self._path_of(hashlib.sha256(data).digest(), content_type)
        if life is not None:
            path = self.reserve(content_type).path
        now = self._clock()
        expires_at = now + life if life is not None else None
        if len(data) <= SMALL_BYTES:
            await self._small.save(SmallFile(path, data, now, expires_at))
        elif not _renewed(place := self._place(path), now):
            if expires_at is not None:
                await self._small.expire(path, expires_at)
            await asyncio.to_thread(self._write, data, place, now)
        return path

    async def receive(
        self,
        chunks: AsyncIterator[bytes],
        content_type: str | None,
        limit: int,
        path: str | None = None,
        life: float | None = None,
    ) -> str:
        """Store a stream without holding it in memory, and return its path; durable on return.

        Args:
            chunks: the bytes.
            content_type: the type that the client sent.
            limit: maximum number of bytes.
            path: a reserved path; None: the name is derived from the content.
            life: see `save`.

        Raises:
            UploadTooLarge: the stream is longer than `limit`; nothing is stored.
            StorageError: the write failed.
        """
        temporary = self._incoming / secrets.token_hex(16)
        try:
            spooled = await self._spool(chunks, temporary, limit)
            if path is None:
                own = life is not None
                path = self.reserve(content_type).path if own else self._path_of(spooled.sha256, content_type)
            if life is not None:
                await self.limit_life(path, life)
            await asyncio.to_thread(self._complete, temporary, self._place(path), self._clock())
        finally:
            with suppress(OSError):
                temporary.unlink()
        return path

    async def _spool(self, chunks: AsyncIterator[bytes], temporary: Path, limit: int) -> Spooled:
        try:
            return await spool(chunks, temporary, limit)
        except ConnectionError:  # from the client, not from the disk
            raise
        except OSError as error:
            raise _unwritable(temporary, error) from error

    async def limit_life(self, path: str, seconds: float) -> None:
        """Set the lifetime of a reserved path's file, before its bytes arrive.

        Raises:
            StorageError: the write failed.
        """
        await self._small.expire(path, self._clock() + seconds)

    # --- multipart uploads --------------------------------------------------------------------------------

    async def receive_part(self, path: str, number: int, chunks: AsyncIterator[bytes], announced: int | None) -> str:
        """Store one part of a reserved path's file and return its tag. A repeated number replaces the earlier part.

        Args:
            path: a reserved path.
            number: the part number, >= 1.
            chunks: the bytes.
            announced: the size in bytes, if the client sent it.

        Raises:
            UploadTooLarge: the part or its file exceeds its limit.
            StorageError: the write failed, or the unfinished uploads exceed their total limit.
        """
        return await self._parts.put(_name_of(path), number, chunks, announced)

    async def join_parts(self, path: str, parts: Sequence[Part]) -> None:
        """Join the parts into the file; durable on return. A repeated call does nothing.

        Raises:
            BadParts: the listed parts are not those that were received.
            StorageError: the write failed.
        """
        place, name = self._place(path), _name_of(path)
        async with self._parts.joining:
            if place.exists() and not self._parts.started(name):
                return
            temporary = self._incoming / secrets.token_hex(16)
            try:
                await self._parts.join(name, parts, temporary)
                await asyncio.to_thread(self._complete, temporary, place, self._clock())
            finally:
                temporary.unlink(missing_ok=True)
            await self._parts.drop(name)

    # --- removal ------------------------------------------------------------------------------------------

    async def old_small(self, before: float, limit: int) -> list[str]:
        """Return the paths of small files last saved before `before` (Unix seconds), oldest first."""
        return await self._small.old(before, limit)

    async def shelves(self) -> list[str]:
        """Return the names of the folders with large files, at most 256."""
        return await asyncio.to_thread(lambda: sorted(folder.name for folder in self._files.iterdir()))

    async def old_large(self, shelf: str, before: float) -> list[str]:
        """Return the paths of a folder's files last saved before `before` (Unix seconds)."""
        names = await asyncio.to_thread(_saved_before, self._files / shelf, before)
        return [f"/files/{shelf}/{name}" for name in names]

    async def remove(self, paths: Sequence[str], before: float) -> int:
        """Remove the files that were not saved again since `before`; return their number."""
        small = await self._small.remove(paths, before)
        large = await asyncio.to_thread(self._remove_large, paths, before)
        return small + large

    async def renew(self, paths: Sequence[str], at: float) -> None:
        """Set the save time of files (Unix seconds)."""
        await self._small.renew(paths, at)
        for path in paths:
            _renewed(self._place(path), at)

    async def expired(self, now: float, limit: int) -> list[str]:
        """Return the paths of files whose own expiry has passed."""
        return await self._small.expired(now, limit)

    async def remove_abandoned_parts(self, before: float) -> int:
        """Remove multipart uploads without a new part since `before` (Unix seconds); return their number."""
        return await self._parts.remove_abandoned(before)

    def _remove_large(self, paths: Sequence[str], before: float) -> int:
        return sum(_removed(self._place(path), self._incoming / secrets.token_hex(16), before) for path in paths)

    # --- names and reads ----------------------------------------------------------------------------------

    def reserve(self, content_type: str | None) -> Reservation:
        """Reserve a random name for an upload whose bytes arrive later."""
        name = secrets.token_hex(16)
        path = f"/files/{name[:2]}/{name}{_suffix(content_type)}"
        return Reservation(path, self._sign(path))

    def derived(self, purpose: bytes) -> bytes:
        """Derive a 32-byte secret from the data dir's secret. `purpose`: its name, at most 16 bytes."""
        return hashlib.blake2b(key=self._secret, digest_size=32, person=purpose).digest()

    def may_write(self, path: str, token: str) -> bool:
        """Whether the token authorises an upload to this reserved path."""
        return hmac.compare_digest(self._sign(path).encode(), token.encode())

    def path_in(self, url: str) -> str | None:
        """Return the `/files/...` path in a path or URL; None if there is no such path.

        The origin of a URL is ignored: the server's address may have changed since it returned the URL.
        """
        try:
            path = urlsplit(url).path
        except ValueError:
            return None
        return path if _PATH.fullmatch(path) else None

    async def find(self, path: str) -> Path | bytes | None:
        """Return a stored file: the path of a large one, the bytes of a small one; None if it does not exist."""
        if self.path_in(path) != path:
            return None
        place = self._place(path)
        return place if place.is_file() else await self._small.find(path)

    async def read(self, path: str, limit: float = math.inf) -> bytes | None:
        """Return the bytes of a stored file; None if it does not exist.

        Raises:
            UploadTooLarge: the file is larger than `limit` bytes.
        """
        found = await self.find(path)
        if found is not None and (found.stat().st_size if isinstance(found, Path) else len(found)) > limit:
            raise UploadTooLarge(f"more than {limit} bytes")
        if not isinstance(found, Path):
            return found
        return await asyncio.to_thread(patiently, found.read_bytes, time.sleep)

    def _write(self, data: bytes, place: Path, now: float) -> None:
        temporary = self._incoming / secrets.token_hex(16)
        try:
            patiently(partial(temporary.write_bytes, data), time.sleep)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise _unwritable(place, error) from error
        self._complete(temporary, place, now)

    def _complete(self, temporary: Path, place: Path, now: float) -> None:
        """Move a complete temporary file into place, durably."""
        try:
            patiently(partial(sync, temporary), time.sleep)
            os.utime(temporary, (now, now))
            try:
                temporary.replace(place)
            except FileNotFoundError:  # the first file of its folder
                place.parent.mkdir(exist_ok=True)
                temporary.replace(place)
            patiently(partial(self._names.sync, place.parent), time.sleep)
        except OSError as error:
            raise _unwritable(place, error) from error

    def _path_of(self, sha256: bytes, content_type: str | None) -> str:
        name = hashlib.blake2b(sha256, key=self._secret, digest_size=16).hexdigest()
        return f"/files/{name[:2]}/{name}{_suffix(content_type)}"

    def _place(self, path: str) -> Path:
        return self._files / path.removeprefix("/files/")

    def _sign(self, path: str) -> str:
        return hashlib.blake2b(path.encode(), key=self._secret, digest_size=16, person=b"upload").hexdigest()


def content_type_of(name: str) -> str:
    """Return the content type for a file name or path, by its suffix."""
    return _TYPES.guess_type(name)[0] or "application/octet-stream"


@lru_cache(maxsize=256)
def _suffix(content_type: str | None) -> str:
    """Return the suffix for a content type; empty for an unknown one, which is served as plain bytes."""
    image = format_of_type(content_type or "")
    if image is not None:
        return image.suffix
    plain = (content_type or "").partition(";")[0].strip().lower()
    suffix = _TYPES.guess_extension(plain) or ""
    return suffix if content_type_of("x" + suffix) == plain else ""


def _secret(path: Path) -> bytes:
    """Read the data dir's 32-byte secret, which makes file names unguessable, or create it."""
    if not path.exists():
        write_file(path, secrets.token_bytes(32), path.with_suffix(".new"), mode=0o600)
    return path.read_bytes()


def _name_of(path: str) -> str:
    """Return the name of the folder for a file's parts: the random part of the path, never chosen by a client."""
    return path.rpartition("/")[2].partition(".")[0]


def _renewed(place: Path, now: float) -> bool:
    """Set the save time of an existing file; False if it does not exist."""
    try:
        os.utime(place, (now, now))
    except OSError:  # missing, or not writable
        return False
    return True


def _saved_before(folder: Path, before: float) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.stat().st_mtime < before]
    except FileNotFoundError:
        return []


def _removed(place: Path, aside: Path, before: float) -> bool:
    """Remove a file. It is moved aside first and put back if it was saved again in the meantime."""
    try:
        place.replace(aside)
    except FileNotFoundError:
        return False
    if aside.stat().st_mtime >= before:
        aside.replace(place)
        return False
    aside.unlink()
    return True


def _unwritable(place: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {place}: {error}; free disk space or check the permissions")
