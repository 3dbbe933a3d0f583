"""Decode source images to RGB at output size and encode results as JPEG or PNG. Pure.

Owns the rules of size, rotation, colour and rejection that all engines with a source image share. Errors have the
endpoint's types (`image_load_error`, `image_too_small`, `image_too_large`). Colour profiles are ignored: pixel values
are read as sRGB.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from batch.image_formats import READABLE
from batch.server.engines.base import EngineFailure, EngineImage

__all__ = ["MAX_AREA_PX", "MAX_SOURCE_PX", "MIN_SOURCE_SIDE_PX", "Size", "encode", "output_size", "read_source"]

MAX_AREA_PX = 1440 * 1440
"""Maximum area of a result before its sides are rounded: about 2 megapixels."""
MAX_SOURCE_PX = 100_000_000
"""Maximum area of a source image; larger ones are rejected before decoding."""
MIN_SOURCE_SIDE_PX = 16
"""Minimum side of a source image; smaller ones are usually tracking pixels."""

_GRID_PX = 16  # one latent covers 8 px, and FLUX packs 2x2 latents
_MIN_SIDE_PX = 256
_TURNED = range(5, 9)
"""EXIF orientations that swap width and height."""


class Size(NamedTuple):
    """Sides in pixels."""

    width: int
    height: int


def output_size(width: int, height: int) -> Size:
    """Return the size of the result for a source of this size.

    A source with an area above 1440x1440 px is scaled down, one with a side under 256 px is scaled up; both keep their
    aspect ratio. Then each side is rounded to the nearest multiple of 16, so the area can slightly exceed the limit.
    A strip that cannot satisfy both limits gets a shorter long side.
    """
    scale = min(1.0, math.sqrt(MAX_AREA_PX / (width * height)))
    scale = max(scale, _MIN_SIDE_PX / min(width, height))
    longest_px = MAX_AREA_PX / (min(width, height) * scale)
    sides = (min(side * scale, longest_px) for side in (width, height))
    return Size(*(max(_MIN_SIDE_PX, round(side / _GRID_PX) * _GRID_PX) for side in sides))


def read_source(data: bytes, max_pixels: int = MAX_SOURCE_PX) -> Image.Image:
    """Decode an image to RGB at output size.

    Applies the EXIF orientation, takes the first frame of an animation and composites alpha over white. Pillow's own
    limit of about 179 million pixels applies as well, so a larger `max_pixels` has no effect.

    Raises:
        EngineFailure: 422 with `image_load_error`, `image_too_small` or `image_too_large`.
    """
    image = _open(data, max_pixels)
    try:
        orientation = _orientation(image)
        width, height = image.size
        # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, which saves memory and time.
        image.draft(None, output_size(width, height))
        rgb = _upright(_to_rgb(image), orientation)
        width, height = (height, width) if orientation in _TURNED else (width, height)
        size = output_size(width, height)
        return rgb if rgb.size == size else rgb.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything for damaged files, from OSError to IndexError
        raise _unreadable(f"cannot be decoded ({_reason(error)})") from error


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read only the header; reject unsupported formats and sizes."""
    Image.init()
    known = [name for name in READABLE if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            # `max_pixels` is checked below, so Pillow's warning would only repeat it.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=known)
    except Image.DecompressionBombError as error:
        raise _too_large(str(error), max_pixels) from error
    except Exception as error:  # decoders raise anything for damaged files
        start = f"starts with {data[:12].hex(' ')}" if data else "0 bytes"
        raise _unreadable(f"has an unsupported format or is damaged ({start}); use JPEG, PNG or WebP") from error
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(f"{width}x{height} px, {width * height / 1e6:.0f} megapixels", max_pixels)
    if min(width, height) < MIN_SOURCE_SIDE_PX:
        least = MIN_SOURCE_SIDE_PX
        message = f"the source image is {width}x{height} px; each side must be at least {least} px"
        raise EngineFailure(422, "image_too_small", message, ctx={"min_width": least, "min_height": least})
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decode and convert to RGB; values of more than 8 bits are scaled, not clipped."""
    image.load()
    if image.mode in {"I", "F"} or image.mode.startswith("I;"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.has_transparency_data:
        over = image.convert("RGBA")
        paper = Image.new("RGBA", over.size, (255, 255, 255, 255))
        image = Image.alpha_composite(paper, over)
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Scale grey levels of any depth to 0-255.

    Files with floats or 32-bit integers do not record the depth, so the narrowest common range that contains the
    brightest pixel is used.
    """
    levels = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0).clip(min=0)
    brightest = float(levels.max(initial=0))
    if np.issubdtype(values.dtype, np.floating):
        full = next((top for top in (1.0, 255.0, 65535.0) if brightest <= top), brightest)
    else:
        full = 65535.0 if brightest <= 65535 else brightest
    return np.asarray(np.rint(levels * (255.0 / full)), np.uint8)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) if it is missing or damaged, because the image is still usable."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF raises anything
        return 1


def _upright(rgb: Image.Image, orientation: int) -> Image.Image:
    # Pillow rewrites all EXIF and XMP data when it rotates an image and fails if some of it is damaged.
    for name in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
        rgb.info.pop(name, None)
    rgb.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def encode(image: Image.Image, output_format: Literal["jpeg", "png"], note: str) -> EngineImage:
    """Encode as JPEG (quality 95) or PNG (compression level 1), with `note` as JPEG comment or PNG text."""
    buffer = io.BytesIO()
    if output_format == "png":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("Comment", note)
        image.save(buffer, "PNG", compress_level=1, pnginfo=text)
    else:
        image.save(buffer, "JPEG", quality=95, comment=note.encode())
    return EngineImage(buffer.getvalue(), f"image/{output_format}", *image.size)


def _unreadable(what: str) -> EngineFailure:
    return EngineFailure(422, "image_load_error", f"the source image {what}")


def _too_large(what: str, max_pixels: int) -> EngineFailure:
    side = math.isqrt(max_pixels)
    message = f"the source image is too large: {what}; the maximum is {max_pixels / 1e6:g} megapixels"
    return EngineFailure(422, "image_too_large", message, ctx={"max_width": side, "max_height": side})


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:200]
