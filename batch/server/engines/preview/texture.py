"""Random fields: noise, grain, ragged borders. All random numbers come from the generator that the caller passes. Pure.

A field is float32 with the height and width of the image and no channels.
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

__all__ = ["Array", "clouds", "coordinates", "generator", "grain", "ragged_border", "smear", "warp"]

Array: TypeAlias = npt.NDArray[Any]
"""uint8 for images (BGR), float32 for fields."""


def generator(seed: int, prompt: str) -> np.random.Generator:
    """Return a random generator that depends only on seed and prompt, on every machine. The seed is any integer."""
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))


def coordinates(height: int, width: int) -> tuple[Array, Array]:
    """Return x as a row and y as a column, which broadcast to the whole field."""
    return np.arange(width, dtype=np.float32)[None, :], np.arange(height, dtype=np.float32)[:, None]


def clouds(rng: np.random.Generator, height: int, width: int, cells: int, octaves: int = 1) -> Array:
    """Return smooth noise of about -1 to 1 with `cells` spots along the long side; each octave halves their size."""
    field = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        across = cells * 2**octave / max(height, width)
        grid = rng.random((max(2, round(across * height)) + 3, max(2, round(across * width)) + 3), dtype=np.float32)
        spots = cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        field += (spots * 2 - 1) * 0.5**octave
    return field / np.float32(2 - 0.5 ** (octaves - 1))


def grain(rng: np.random.Generator, height: int, width: int, size_px: float) -> Array:
    """Return fine noise of -1 to 1, blurred to grains of about `size_px`."""
    shape = (int(height / size_px) + 1, int(width / size_px) + 1)
    coarse = rng.integers(0, 256, shape, dtype=np.uint8)
    field = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    return field.astype(np.float32) / 127.5 - 1


def shift(image: Array, dx: Array, dy: Array) -> Array:
    """Return the image in which each pixel comes from (x + dx, y + dy)."""
    height, width = image.shape[:2]
    x, y = coordinates(height, width)
    return cv2.remap(image, x + dx, y + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def warp(image: Array, rng: np.random.Generator, amount_px: float, cells: int) -> Array:
    """Distort an image with smooth noise, as in a freehand drawing."""
    height, width = image.shape[:2]
    dx, dy = (amount_px * clouds(rng, height, width, cells, 2) for _ in range(2))
    return shift(image, dx, dy)


def smear(image: Array, along: tuple[Array, Array], steps: int, step_px: float) -> Array:
    """Average along a direction field in both directions. Turns noise into strokes and an image into brushed colour."""
    total = image.astype(np.float32)
    source = total.copy()
    for step in range(1, steps + 1):
        for way in (-1, 1):
            total += shift(source, along[0] * (way * step * step_px), along[1] * (way * step * step_px))
    return total / (2 * steps + 1)


def ragged_border(rng: np.random.Generator, height: int, width: int, margin: float) -> Array:
    """Return 0 on the edge and 1 inside, with a ragged transition; `margin` is a fraction of the shorter side."""
    x, y = coordinates(height, width)
    near_x, near_y = np.minimum(x, width - 1 - x), np.minimum(y, height - 1 - y)
    depth = np.minimum(near_x, near_y) / min(height, width)
    shore = depth - margin + margin * 0.9 * clouds(rng, height, width, 9, 4)
    return np.asarray(np.clip(shore / (margin * 0.35), 0, 1))
