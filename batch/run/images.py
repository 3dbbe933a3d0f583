"""The image files of a run: read and verify local sources, decode results and store them by content.

The only writer of `images/` in the run directory. Does not use the network. All blocking work runs in worker threads;
Pillow and hashlib release the interpreter lock for the long parts.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import shutil
import threading
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.to_thread
from PIL import Image, UnidentifiedImageError

from batch.errors import StorageError
from batch.image_formats import READABLE, format_named
from batch.run.interfaces import ImageError, LoadedImage
from batch.system.durable import NameSync, write_file
from batch.types import LocalImage, StoredImage

__all__ = ["ImageFolder", "decode", "sum_of"]

_CHUNK_BYTES = 2**20
_PNG_END = b"IEND\xaeB`\x82"
"""Pillow accepts a PNG that has all pixels; a file without this chunk is truncated."""
_HARD_LIMIT_PIXELS = 400_000_000
"""Larger images are never decoded, whatever the configuration says: they take several GB of memory."""


class Decoded(NamedTuple):
    """Facts about an image that was decoded."""

    width: int
    height: int
    format: str
    content_type: str
    suffix: str
    """The suffix of its file name, with the dot."""


_RESULT_LIMIT_PIXELS = 100_000_000
"""Limit for results. The endpoint returns at most four megapixels, but a small file can claim any size."""
_ALONE_FROM_PIXELS = 16_000_000
"""Larger images are decoded one at a time: each takes 64 MB of memory or more."""


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in READABLE if name in Image.OPEN]


def decode(
    data: bytes, *, limit_pixels: int = _HARD_LIMIT_PIXELS, alone: AbstractContextManager[object] | None = None
) -> Decoded:
    """Decode all of an image; its size and true format.

    Args:
        data: the whole file.
        limit_pixels: refuse a larger one before it is decoded.
        alone: held while a large one is decoded.

    Raises:
        ImageError: `image_load_error` for bytes that are not a complete image, `image_too_large` for one of
            more than `limit_pixels` (refused before it is decoded).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                width, height, kind = image.width, image.height, format_named(image.format)
                assert kind is not None, "only formats of the table are opened"
                if width * height > limit_pixels:
                    raise ImageError(
                        "image_too_large", f"{width} x {height} pixels are more than {limit_pixels / 1e6:g} megapixels"
                    )
                # A JPEG unpacks at an eighth of its size: every coded byte is still read, at a third of the time.
                image.draft(None, (max(1, width // 8), max(1, height // 8)))
                with alone if alone is not None and width * height > _ALONE_FROM_PIXELS else nullcontext():
                    image.load()
                if kind.name == "PNG" and _PNG_END not in data:
                    raise ImageError("image_load_error", "the image is damaged or incomplete (its end is missing)")
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageError("image_load_error", "the bytes are not an image in a known format") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError("image_load_error", f"the image is damaged or incomplete ({error})") from error
    return Decoded(width, height, *kind)


class ImageFolder:
    """Implements `batch.run.interfaces.Images` on a directory."""

    def __init__(self, run_directory: Path, *, limit_megapixels: float, threads: int = 8) -> None:
        self._root = run_directory
        self._limit_pixels = min(_HARD_LIMIT_PIXELS, int(limit_megapixels * 1e6))
        self._threads = anyio.CapacityLimiter(threads)
        self._alone = threading.Lock()  # protects memory: one large image is decoded at a time
        self._names = NameSync(run_directory)
        self._numbers = itertools.count()
        # On the same file system as the images, so that a rename moves a file there. Files of a killed run are useless.
        self._parts = run_directory / "images" / ".part"
        shutil.rmtree(self._parts, ignore_errors=True)

    async def load(self, image: LocalImage) -> LoadedImage:
        """Read a manifest image, check that it is still the planned one, and decode it."""
        return await anyio.to_thread.run_sync(self._load, image, limiter=self._threads)

    async def store(self, data: bytes) -> StoredImage:
        """Verify by decoding, then store under the hash of its content; durable when it returns."""
        return await anyio.to_thread.run_sync(self._store, data, limiter=self._threads)

    def _load(self, image: LocalImage) -> LoadedImage:
        data = image.data
        if data is None:
            assert image.path is not None, "a local image has bytes or a path"
            try:
                data = image.path.read_bytes()
            except OSError as error:
                raise ImageError("image_load_error", f"{image.path} cannot be read: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != image.sha256:
            raise ImageError("image_changed", f"{image.path or image.name} changed while the run went on; run again")
        seen = decode(data, limit_pixels=self._limit_pixels, alone=self._alone)
        return LoadedImage(data, seen.content_type, seen.width * seen.height / 1e6)

    def _store(self, data: bytes) -> StoredImage:
        seen = decode(data, limit_pixels=_RESULT_LIMIT_PIXELS, alone=self._alone)
        digest = hashlib.sha256(data).hexdigest()
        relative = f"images/{digest[:2]}/{digest}{seen.suffix}"
        target = self._root / relative
        try:
            if not (target.exists() and target.stat().st_size == len(data)):
                self._write(target, data)
            self._names.sync(target.parent)  # also for an equal image: its writer may not have come so far yet
        except OSError as error:
            raise StorageError(
                f"{target.parent} cannot be written: {error.strerror}; what is finished is kept,"
                " make room or unlock it and run the same command again"
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
        target.parent.mkdir(parents=True, exist_ok=True)
        self._parts.mkdir(exist_ok=True)
        temporary = self._parts / f"{next(self._numbers)}-{target.name}"  # equal images may come at once
        write_file(target, data, temporary, sync_name=False)


def sum_of(path: Path) -> tuple[int, str] | None:
    """Size in bytes and SHA-256 of a file; None where it cannot be read."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except OSError:
        return None
    return size, digest.hexdigest()
