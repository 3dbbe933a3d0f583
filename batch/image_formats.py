"""The table of image formats that are read and stored, with content types and suffixes. Pure.

A file with several images counts as the format of its first one: phones write a photo, its preview and its depth map as
one JPEG, which Pillow calls MPO; an animated PNG is a PNG.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FORMATS", "READABLE", "ImageFormat", "format_named", "format_of_type"]


class ImageFormat(NamedTuple):
    """An image format of the web."""

    name: str
    """Pillow's name."""
    content_type: str
    suffix: str
    """File suffix, with its dot."""


FORMATS = (
    ImageFormat("JPEG", "image/jpeg", ".jpg"),
    ImageFormat("PNG", "image/png", ".png"),
    ImageFormat("WEBP", "image/webp", ".webp"),
    ImageFormat("GIF", "image/gif", ".gif"),
    ImageFormat("AVIF", "image/avif", ".avif"),
    ImageFormat("TIFF", "image/tiff", ".tiff"),
    ImageFormat("BMP", "image/bmp", ".bmp"),
)
READABLE = tuple(known.name for known in FORMATS)
"""Excludes about sixty other formats of Pillow, one of which (EPS) starts another program."""

_NAMES = {"MPO": "JPEG"}
_TYPES = {
    "image/apng": "image/png",
    "image/avif-sequence": "image/avif",
    "image/jpg": "image/jpeg",
    "image/mpo": "image/jpeg",
    "image/pjpeg": "image/jpeg",
    "image/tif": "image/tiff",
    "image/vnd.mozilla.apng": "image/png",
    "image/x-bmp": "image/bmp",
    "image/x-ms-bmp": "image/bmp",
    "image/x-png": "image/png",
}
"""Other content types in use."""
_BY_NAME = {known.name: known for known in FORMATS}
_BY_TYPE = {known.content_type: known for known in FORMATS}


def format_named(name: str | None) -> ImageFormat | None:
    """Return the format with Pillow's name; None if it is not in the table."""
    return None if name is None else _BY_NAME.get(_NAMES.get(name, name))


def format_of_type(content_type: str) -> ImageFormat | None:
    """Return the format of a content type, under any of its names; None if it is not in the table."""
    plain = content_type.partition(";")[0].strip().lower()
    return _BY_TYPE.get(_TYPES.get(plain, plain))
