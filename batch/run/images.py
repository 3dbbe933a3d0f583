"""The picture files of a run: local sources read and verified, results decoded and stored by content.

Owns `images/` in the run directory; the only writer there. Knows no network. All blocking work runs in
worker threads; Pillow and hashlib release the interpreter lock for the long parts.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.to_thread
from PIL import Image, UnidentifiedImageError

from batch.errors import StorageError
from batch.model import LocalImage, StoredImage
from batch.run.ports import Picture, PictureError

__all__ = ["ImageFolder", "decode"]

_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_PNG_END = b"IEND\xaeB`\x82"
"""Pillow calls a PNG whole when it has all pixels; one without this was cut off at the end."""
_HARD_LIMIT_PIXELS = 400_000_000
"""No picture of more is ever decoded, whatever the configuration says: it would be several GB in memory."""


class Decoded(NamedTuple):
    """What decoding a picture proved."""

    width: int
    height: int
    format: str
    content_type: str


def decode(data: bytes, *, limit_pixels: int = _HARD_LIMIT_PIXELS) -> Decoded:
    """Decode all of a picture; its size and true format.

    Raises:
        PictureError: `image_load_error` for bytes that are no complete picture, `image_too_large` for one of
            more than `limit_pixels` (refused before it is decoded).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as picture:
                width, height, kind = picture.width, picture.height, picture.format or ""
                if width * height > limit_pixels:
                    raise PictureError(
                        "image_too_large", f"{width} x {height} pixels are more than {limit_pixels / 1e6:g} megapixels"
                    )
                picture.load()
                if kind == "PNG" and _PNG_END not in data:
                    raise PictureError("image_load_error", "the picture is damaged or incomplete (its end is missing)")
                content_type = picture.get_format_mimetype() or "application/octet-stream"
    except Image.DecompressionBombError as error:
        raise PictureError("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise PictureError("image_load_error", "the bytes are not a picture in a known format") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise PictureError("image_load_error", f"the picture is damaged or incomplete ({error})") from error
    return Decoded(width, height, kind, content_type)


class ImageFolder:
    """Implements `batch.run.ports.Images` on a directory."""

    def __init__(self, run_directory: Path, *, limit_megapixels: float, threads: int = 4) -> None:
        self._root = run_directory
        self._limit_pixels = min(_HARD_LIMIT_PIXELS, int(limit_megapixels * 1e6))
        self._threads = anyio.CapacityLimiter(threads)
        self._folders: set[Path] = set()
        # Beside the pictures, so that a rename moves it there; what a killed run left in it is of no use.
        self._parts = run_directory / "images" / ".part"
        shutil.rmtree(self._parts, ignore_errors=True)

    async def load(self, image: LocalImage) -> Picture:
        """Read a manifest picture, check that it is still the planned one, and decode it."""
        return await anyio.to_thread.run_sync(self._load, image, limiter=self._threads)

    async def store(self, data: bytes) -> StoredImage:
        """Verify by decoding, then store under the hash of its content; durable when it returns."""
        return await anyio.to_thread.run_sync(self._store, data, limiter=self._threads)

    def _load(self, image: LocalImage) -> Picture:
        data = image.data
        if data is None:
            assert image.path is not None, "a local image has bytes or a path"
            try:
                data = image.path.read_bytes()
            except OSError as error:
                raise PictureError("image_load_error", f"{image.path} cannot be read: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != image.sha256:
            raise PictureError("image_changed", f"{image.path or image.name} changed while the run went on; run again")
        seen = decode(data, limit_pixels=self._limit_pixels)
        return Picture(data, seen.content_type, seen.width * seen.height / 1e6)

    def _store(self, data: bytes) -> StoredImage:
        seen = decode(data)
        digest = hashlib.sha256(data).hexdigest()
        relative = f"images/{digest[:2]}/{digest}.{_SUFFIXES.get(seen.format, 'bin')}"
        target = self._root / relative
        try:
            if not (target.exists() and target.stat().st_size == len(data)):
                self._write(target, data)
        except OSError as error:
            raise StorageError(
                f"{target.parent} cannot be written: {error.strerror}; what is finished is kept,"
                " make room and run the same command again"
            ) from error
        return StoredImage(
            url="",
            width=seen.width,
            height=seen.height,
            content_type=seen.content_type,
            file_size=len(data),
            path=relative,
            sha256=digest,
        )

    def _write(self, target: Path, data: bytes) -> None:
        folder = target.parent
        new = folder not in self._folders and not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._parts.mkdir(exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self._parts)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)  # mkstemp's 0600 would keep a colleague from looking at the results
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        for directory in (folder, folder.parent) if new else (folder,):
            _sync_folder(directory)
        self._folders.add(folder)


def _sync_folder(folder: Path) -> None:
    """A renamed file survives a power cut only when its folder is synced too. Windows cannot, and need not."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
