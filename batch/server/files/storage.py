"""The server's files: images that came in and images that were made, on disk, by content.

Owns `data_dir/files` and the names in it. A file appears by rename, complete and durable or not at all; small
results lie together in `small.db`. A file's name is a keyed hash of its SHA-256: equal bytes are kept once, and
nobody can guess a name. A file with a life of its own shares its bytes with nobody and has a random name. Paths are
given out as `/files/<prefix>/<name>`; the server's origin is put before them when somebody is answered, since it may
change. When files are old enough to go is decided by `retention`.
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
_TYPES = mimetypes.MimeTypes(filenames=())  # the standard library's own table: the same on every machine
for _known in FORMATS:  # some of which it knows in later versions of Python only
    _TYPES.add_type(_known.content_type, _known.suffix)


class Reservation(NamedTuple):
    """A name for a file that is still to come."""

    path: str
    """`/files/...`, where it will be found."""
    token: str
    """Whoever knows it may write the file: a signature of the path."""


class Storage:
    """Files by content below `root`; an async context manager.

    Args:
        root: the server's data dir; `files/`, `incoming/` and `parts/` are made in it. Half-written files of an
            earlier process are removed.
        clock: Unix seconds; a file remembers when it was last saved.
        limits: of uploads in parts.
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
        """Store bytes; durable when it returns. Their path.

        Args:
            data: the bytes.
            content_type: gives the name its suffix.
            life: seconds after which nobody gets them any more; None: as `retention` has it.

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
        """Store a stream of at most `limit` bytes without holding it in memory; durable when it returns.

        Args:
            chunks: the bytes.
            content_type: as the sender names it.
            limit: bytes.
            path: a reserved path; without it the content names the file.
            life: see `save`.

        Raises:
            UploadTooLarge: more than `limit` bytes came; nothing is kept.
            StorageError: the disk refused.
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
        except ConnectionError:  # the sender's, not the disk's
            raise
        except OSError as error:
            raise _unwritable(temporary, error) from error

    async def limit_life(self, path: str, seconds: float) -> None:
        """Give a reserved path's file an end of its own, before its bytes come.

        Raises:
            StorageError: the disk refused.
        """
        await self._small.expire(path, self._clock() + seconds)

    # --- uploads in parts ---------------------------------------------------------------------------------

    async def receive_part(self, path: str, number: int, chunks: AsyncIterator[bytes], announced: int | None) -> str:
        """Store one part of a reserved path's file; it replaces an earlier part of that number. Its tag.

        Args:
            path: a reserved path.
            number: from 1.
            chunks: the bytes.
            announced: how many there will be, if the sender says so.

        Raises:
            UploadTooLarge: the part, its file or all unfinished files together become too large.
            StorageError: the disk refused.
        """
        return await self._parts.put(_name_of(path), number, chunks, announced)

    async def join_parts(self, path: str, parts: Sequence[Part]) -> None:
        """Make the file of its parts; durable when it returns. Repeated after that it does nothing.

        Raises:
            BadParts: they are not the ones that came.
            StorageError: the disk refused.
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

    # --- what goes ----------------------------------------------------------------------------------------

    async def old_small(self, before: float, limit: int) -> list[str]:
        """Paths of small files that were last saved before an instant (Unix seconds), the oldest first."""
        return await self._small.old(before, limit)

    async def shelves(self) -> list[str]:
        """The large files lie on at most 256 shelves, which are looked at one by one."""
        return await asyncio.to_thread(lambda: sorted(folder.name for folder in self._files.iterdir()))

    async def old_large(self, shelf: str, before: float) -> list[str]:
        """Paths of the files on a shelf that were last saved before an instant (Unix seconds)."""
        names = await asyncio.to_thread(_saved_before, self._files / shelf, before)
        return [f"/files/{shelf}/{name}" for name in names]

    async def remove(self, paths: Sequence[str], before: float) -> int:
        """Remove those files that were not saved again since an instant; how many went."""
        small = await self._small.remove(paths, before)
        large = await asyncio.to_thread(self._remove_large, paths, before)
        return small + large

    async def renew(self, paths: Sequence[str], at: float) -> None:
        """Take files as saved at an instant (Unix seconds)."""
        await self._small.renew(paths, at)
        for path in paths:
            _renewed(self._place(path), at)

    async def expired(self, now: float, limit: int) -> list[str]:
        """Paths of files whose own life is over."""
        return await self._small.expired(now, limit)

    async def remove_abandoned_parts(self, before: float) -> int:
        """Remove uploads in parts that nobody has gone on with since an instant; how many."""
        return await self._parts.remove_abandoned(before)

    def _remove_large(self, paths: Sequence[str], before: float) -> int:
        return sum(_removed(self._place(path), self._incoming / secrets.token_hex(16), before) for path in paths)

    # --- names and reads ----------------------------------------------------------------------------------

    def reserve(self, content_type: str | None) -> Reservation:
        """A fresh name for an upload that is announced before its bytes are sent."""
        name = secrets.token_hex(16)
        path = f"/files/{name[:2]}/{name}{_suffix(content_type)}"
        return Reservation(path, self._sign(path))

    def derived(self, purpose: bytes) -> bytes:
        """32 secret bytes for another purpose, named in 16 bytes at most; the same as long as the data dir lives."""
        return hashlib.blake2b(key=self._secret, digest_size=32, person=purpose).digest()

    def may_write(self, path: str, token: str) -> bool:
        """Whether the token belongs to that reserved path."""
        return hmac.compare_digest(self._sign(path).encode(), token.encode())

    def path_in(self, url: str) -> str | None:
        """The path of ours in a path or URL, or None.

        The origin of a URL does not matter: the server may have listened elsewhere when it gave it out.
        """
        try:
            path = urlsplit(url).path
        except ValueError:
            return None
        return path if _PATH.fullmatch(path) else None

    async def find(self, path: str) -> Path | bytes | None:
        """A stored file: where it lies, or its bytes where it is a small one; None where there is none."""
        if self.path_in(path) != path:
            return None
        place = self._place(path)
        return place if place.is_file() else await self._small.find(path)

    async def read(self, path: str, limit: float = math.inf) -> bytes | None:
        """The bytes of a stored file, or None where there is none.

        Raises:
            UploadTooLarge: there are more than `limit`.
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
        """Put a complete temporary file in its place, durably."""
        try:
            patiently(partial(sync, temporary), time.sleep)
            os.utime(temporary, (now, now))
            try:
                temporary.replace(place)
            except FileNotFoundError:  # the first file on its shelf
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
    """What the name of a file or the end of its path says of its type."""
    return _TYPES.guess_type(name)[0] or "application/octet-stream"


@lru_cache(maxsize=256)
def _suffix(content_type: str | None) -> str:
    """The name carries the type; a type without a usual suffix is served as plain bytes."""
    image = format_of_type(content_type or "")
    if image is not None:
        return image.suffix
    plain = (content_type or "").partition(";")[0].strip().lower()
    suffix = _TYPES.guess_extension(plain) or ""
    return suffix if content_type_of("x" + suffix) == plain else ""


def _secret(path: Path) -> bytes:
    """32 random bytes that make this data dir's names unguessable; made once."""
    if not path.exists():
        write_file(path, secrets.token_bytes(32), path.with_suffix(".new"), mode=0o600)
    return path.read_bytes()


def _name_of(path: str) -> str:
    """Of the folder that holds a file's parts: letters and digits that nobody outside has chosen."""
    return path.rpartition("/")[2].partition(".")[0]


def _renewed(place: Path, now: float) -> bool:
    """Whether the file is there already; then it is as good as saved now."""
    try:
        os.utime(place, (now, now))
    except OSError:  # there is none, or it cannot be written anyway
        return False
    return True


def _saved_before(folder: Path, before: float) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.stat().st_mtime < before]
    except FileNotFoundError:
        return []


def _removed(place: Path, aside: Path, before: float) -> bool:
    """Remove a file unless it was saved again in this very moment: it is taken aside first and looked at there."""
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
    return StorageError(f"{place} cannot be written: {error}; free space or check its rights")
