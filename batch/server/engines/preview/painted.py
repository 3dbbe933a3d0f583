"""Styles that imitate handwork: watercolour, oil, pencil, old photograph, and a plain painterly style. Pure.

Each function takes a uint8 BGR image, a random generator and a power from 0 to 1, and returns a uint8 BGR image of the
same size.
"""

from __future__ import annotations

import cv2
import numpy as np

from batch.server.engines.preview.brush import (
    bgr,
    blur,
    clipped,
    directions,
    edges,
    grey,
    kuwahara,
    lines,
    oil_patches,
    over,
    saturated,
)
from batch.server.engines.preview.texture import (
    Array,
    clouds,
    coordinates,
    grain,
    ragged_border,
    smear,
    warp,
)

__all__ = ["oil", "painterly", "pencil", "vintage", "watercolor"]

_WARM_PAPER = bgr(228, 240, 247)
_WHITE_PAPER = bgr(240, 247, 250)


def watercolor(image: Array, rng: np.random.Generator, power: float) -> Array:
    """Render flat washes with dark rims of dried pigment, blooms, paper grain and an unpainted border."""
    height, width = image.shape[:2]
    wash = kuwahara(warp(image, rng, 2 + 5 * power, 14), int(4 + 5 * power))
    wash = saturated(cv2.bilateralFilter(wash, 5, 40, 5), 1.1 + 0.3 * power, 0.9, 36)
    luma = grey(wash)
    rims = np.clip(np.abs(luma - blur(luma, 2.4)) / 16, 0, 1)
    blooms = clouds(rng, height, width, 7, 4)
    paper = 0.5 * grain(rng, height, width, 1.6) + 0.5 * grain(rng, height, width, 3)
    pigment = 1 - 0.3 * power * rims + 0.16 * power * blooms + 0.05 * paper
    painted = wash * pigment[..., None]
    # The paper shows through in wet areas.
    painted = over(painted, _WHITE_PAPER, np.clip(blooms - 0.35, 0, 0.5) * 0.9 * power)
    inside = 1 - (1 - ragged_border(rng, height, width, 0.045)) * power
    return clipped(over(_WHITE_PAPER + 5 * paper[..., None], painted, inside))


def oil(image: Array, rng: np.random.Generator, power: float) -> Array:
    """Render strokes along the shapes, with the relief of thick paint lit from the upper left."""
    height, width = image.shape[:2]
    patches = saturated(oil_patches(image, int(2 + 3 * power), 10), 1.15 + 0.3 * power, 1.02, 2)
    along = _strokes(image, rng)
    colour = smear(patches, along, 4, 0.6 + 1.6 * power)
    bristles = smear(grain(rng, height, width, 2.4), along, 6, 2.4)
    relief = cv2.filter2D(bristles, -1, np.array([[-1, -1, 0], [-1, 0, 1], [0, 1, 1]], np.float32))
    return clipped(colour + power * (60 * relief + 26 * bristles)[..., None])


def _strokes(image: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return stroke directions as unit vectors: along the shapes, and in large curves where the image is flat."""
    height, width = image.shape[:2]
    tx, ty = directions(image, 4)
    free = clouds(rng, height, width, 4, 2) * 2.6 + np.float32(rng.uniform(0, np.pi))
    shaped = np.clip(blur(edges(image), 5) / 7, 0, 1)
    x, y = tx * shaped + np.cos(free) * (1 - shaped), ty * shaped + np.sin(free) * (1 - shaped)
    length = np.maximum(np.sqrt(x * x + y * y), 1e-3)
    return x / length, y / length


def pencil(image: Array, rng: np.random.Generator, power: float) -> Array:
    """Render contours and up to three layers of hatching on warm paper."""
    height, width = image.shape[:2]
    luma = cv2.cvtColor(kuwahara(image, 2), cv2.COLOR_BGR2GRAY)
    dodged = cv2.divide(luma, 255 - cv2.GaussianBlur(255 - luma, (0, 0), 4 + 6 * power), scale=256)
    sheet = np.minimum(dodged.astype(np.float32) / 255, 0.25 + 0.75 * lines(kuwahara(image, 3), 1.2, 1.2))
    dark, bright = np.quantile(luma[::4, ::4], (0.03, 0.85))
    light = np.clip((blur(luma.astype(np.float32), 2) - dark) / max(bright - dark, 1), 0, 1)
    x, y = coordinates(height, width)
    wobble, pressure = 4 * clouds(rng, height, width, 10, 2), 0.75 + 0.5 * clouds(rng, height, width, 30, 3)
    first = rng.uniform(0.6, 1.0)
    for angle, below in ((first, 0.62), (first + 0.9, 0.36), (first + np.pi / 2, 0.17)):
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle) + wobble) * (2 * np.pi / 5.6))
        sheet *= 1 - np.clip((below - light) * 3, 0, 1) * 0.5 * pressure * np.clip(0.35 + 0.9 * wave, 0, 1)
    lead = np.clip(sheet * (0.97 + 0.06 * grain(rng, height, width, 1.3)), 0.14, 1)
    colour = over(image.astype(np.float32), _WARM_PAPER, lead * 0.9)
    return clipped(over(colour, _WARM_PAPER * lead[..., None], np.full_like(lead, 0.25 + 0.75 * power)))


def vintage(image: Array, rng: np.random.Generator, power: float) -> Array:
    """Render soft sepia with dark corners, grain, stains and scratches."""
    height, width = image.shape[:2]
    luma = np.clip(128 + (grey(image) - 120) * 1.1, 0, 255)
    sepia = luma[..., None] * bgr(0.70, 0.88, 1.0) + bgr(14, 17, 20)
    faded = blur(image * (1 - 0.97 * power) + sepia * 0.97 * power, 0.8)
    x, y = coordinates(height, width)
    corner = (x / width - 0.5) ** 2 + (y / height - 0.5) ** 2
    faded *= (1 - 1.1 * power * np.clip(corner - 0.12, 0, 1))[..., None]
    faded += (power * (14 * grain(rng, height, width, 1.5) + 12 * clouds(rng, height, width, 5, 4)))[..., None]
    print_ = clipped(faded)
    for _ in range(int(rng.integers(4, 9))):
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        foot = (left + int(rng.integers(-6, 7)), top + int(rng.integers(20, max(21, height // 3))))
        cv2.line(print_, (left, top), foot, (190, 210, 220), 1, cv2.LINE_AA)
    paper = bgr(205, 222, 230)
    inside = np.clip(ragged_border(rng, height, width, 0.018), 1 - power, 1)
    return clipped(over(paper, print_, inside))


def painterly(image: Array, rng: np.random.Generator, power: float) -> Array:
    """Render soft brush strokes close to the source; used if the prompt contains no known style."""
    height, width = image.shape[:2]
    along = _strokes(image, rng)
    colour = smear(saturated(kuwahara(image, int(3 + 4 * power)), 1.15, 1.02, 2), along, 3, 1.2)
    bristles = smear(grain(rng, height, width, 2.5), along, 5, 2)
    return clipped(colour * (1 + 0.3 * power * bristles)[..., None])
