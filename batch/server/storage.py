"""The server's files: pictures that came in and pictures that were made, on disk, by content.

Owns `data_dir/files` and the names in it. A file appears by rename, complete and durable or not at all; small
results lie together in `small.db`. A file's name is a keyed hash of its SHA-256: equal bytes are kept once, and
nobody can guess a name. Paths are given out as `/files/<prefix>/<name>`; the server's origin is put before them
when somebody is answered, since it may change.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import mimetypes
import os
import re
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import urlsplit

from batch.errors import StorageError
from batch.server.smallfiles import SMALL_BYTES, SmallFiles

__all__ = ["Reservation", "Storage", "TooLarge", "content_type_of"]

_PATH = re.compile(r"/files/([0-9a-f]{2})/(\1[0-9a-f]{30}(?:\.[a-z0-9]{1,8})?)")
_TYPES = mimetypes.MimeTypes(filenames=())  # the standard library's own table: the same on every machine
_CHUNK = 1 << 20


class TooLarge(ValueError):
    """More bytes came than may be stored."""


class Reservation(NamedTuple):
    """A name for a file that is still to come."""

    path: str
    """`/files/...`, where it will be found."""
    token: str
    """Whoever knows it may write the file: a signature of the path."""


class Storage:
    """Files by content below `root`; an async context manager.

    Args:
        root: the server's data dir; `files/` and `incoming/` are made in it. Half-written files of an earlier
            process are removed.
    """

    def __init__(self, root: Path) -> None:
        self._files = root / "files"
        self._incoming = root / "incoming"
        for folder in (self._files, self._incoming):
            folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._incoming.iterdir():
            leftover.unlink()
        self._secret = _secret(root / "secret")
        self._small = SmallFiles(root / "small.db")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._small.aclose()

    async def save(self, data: bytes, content_type: str | None) -> str:
        """Store bytes; durable when it returns. Their path.

        Raises:
            StorageError: the disk refused.
        """
        path = self._path_of(hashlib.sha256(data).digest(), content_type)
        if len(data) <= SMALL_BYTES:
            await self._small.save(path, data)
        elif not (place := self._place(path)).exists():
            await asyncio.to_thread(_complete, self._incoming / secrets.token_hex(16), data, place)
        return path

    async def receive(
        self, chunks: AsyncIterator[bytes], content_type: str | None, limit: int, path: str | None = None
    ) -> str:
        """Store a stream of at most `limit` bytes without holding it in memory; durable when it returns.

        Args:
            chunks: the bytes.
            content_type: as the sender names it.
            limit: bytes.
            path: a reserved path; without it the content names the file.

        Raises:
            TooLarge: more than `limit` bytes came; nothing is kept.
            StorageError: the disk refused.
        """
        temporary = self._incoming / secrets.token_hex(16)
        digest, size, buffer = hashlib.sha256(), 0, bytearray()
        try:
            async for chunk in chunks:
                size += len(chunk)
                if size > limit:
                    raise TooLarge(f"more than {limit} bytes")
                digest.update(chunk)
                buffer += chunk
                if len(buffer) >= _CHUNK:
                    await asyncio.to_thread(_append, temporary, buffer)
                    buffer = bytearray()
            path = path or self._path_of(digest.digest(), content_type)
            place = self._place(path)
            await asyncio.to_thread(_complete, temporary, buffer, place)
        finally:
            temporary.unlink(missing_ok=True)
        return path

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

    async def read(self, path: str) -> bytes | None:
        """The bytes of a stored file, or None where there is none."""
        found = await self.find(path)
        return await asyncio.to_thread(found.read_bytes) if isinstance(found, Path) else found

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


def _suffix(content_type: str | None) -> str:
    """The name carries the type; a type without a usual suffix is served as plain bytes."""
    plain = (content_type or "").partition(";")[0].strip().lower()
    suffix = {"image/webp": ".webp", "image/jpeg": ".jpg"}.get(plain) or _TYPES.guess_extension(plain) or ""
    return suffix if content_type_of("x" + suffix) == plain else ""


def _secret(path: Path) -> bytes:
    """32 random bytes that make this data dir's names unguessable; made once."""
    if not path.exists():
        temporary = path.with_suffix(".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor with its rights set
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
        _sync_folder(path.parent)
    return path.read_bytes()


def _append(path: Path, data: bytearray) -> None:
    with path.open("ab") as file:
        file.write(data)


def _complete(temporary: Path, rest: bytes | bytearray, place: Path) -> None:
    try:
        with temporary.open("ab") as file:
            file.write(rest)
            file.flush()
            os.fsync(file.fileno())
        _appear(temporary, place)
        _sync_folder(place.parent)
    except OSError as error:
        raise StorageError(f"{place} cannot be written: {error}; free space or check its rights") from error


def _appear(temporary: Path, place: Path) -> None:
    try:
        temporary.replace(place)
    except FileNotFoundError:
        place.parent.mkdir(exist_ok=True)
        _sync_folder(place.parent.parent)
        temporary.replace(place)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
