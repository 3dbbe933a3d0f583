"""`MemoryImages`: the image files of a run in memory, really decoded."""

from __future__ import annotations

import hashlib

from batch.run.images import decode
from batch.run.interfaces import ImageError, LoadedImage
from batch.types import LocalImage, StoredImage

__all__ = ["MemoryImages"]


class MemoryImages:
    """Implements `batch.run.interfaces.Images` without a disk or threads."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        """Stored images by path."""

    async def load(self, image: LocalImage) -> LoadedImage:
        """Return an image that the manifest itself contains."""
        if image.data is None:
            raise ImageError("image_load_error", f"{image.name} has no bytes in memory")
        seen = decode(image.data)
        return LoadedImage(image.data, seen.content_type, seen.width * seen.height / 1e6)

    async def store(self, data: bytes) -> StoredImage:
        """Store it under its hash."""
        seen = decode(data)
        digest = hashlib.sha256(data).hexdigest()
        path = f"images/{digest[:2]}/{digest}"
        self.files[path] = data
        return StoredImage("", seen.width, seen.height, seen.content_type, None, len(data), path, digest)
