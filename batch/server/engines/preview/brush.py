"""Deterministic filters: edge-preserving smoothing, lines, directions, tones. Pure; uses only cv2 and numpy.

Images are uint8 BGR, fields float32 of the same height and width.
"""

from __future__ import annotations

import cv2
import numpy as np

from batch.server.engines.preview.texture import Array

__all__ = [
    "bgr",
    "blur",
    "clipped",
    "directions",
    "edges",
    "grey",
    "kuwahara",
    "lines",
    "oil_patches",
    "over",
    "saturated",
    "soft_steps",
]


def bgr(blue: float, green: float, red: float) -> Array:
    """Return a colour; each channel is 0 to 255."""
    return np.array((blue, green, red), np.float32)


def clipped(values: Array) -> Array:
    """Convert floats to uint8, clipped to 0-255."""
    return np.clip(values, 0, 255).astype(np.uint8)


def grey(image: Array) -> Array:
    """Return the luma as float32, 0 to 255."""
    return cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(np.float32)


def blur(field: Array, sigma_px: float) -> Array:
    """Apply a Gaussian blur."""
    return cv2.GaussianBlur(field, (0, 0), sigma_px)


def over(base: Array, cover: Array, share: Array) -> Array:
    """Blend `cover` over `base`; `share` is a field of opacities from 0 to 1."""
    weight = share[..., None]
    return np.asarray(base * (1 - weight) + cover * weight)


def kuwahara(image: Array, radius_px: int) -> Array:
    """Apply the Kuwahara filter: each pixel gets the mean of the square around it with the lowest variance, of four.

    It flattens surfaces and keeps edges (Kuwahara et al. 1976). Box filters make the cost independent of the radius.
    """
    side = radius_px + 1
    colours, luma = image.astype(np.float32), grey(image)
    means: Array = cv2.blur(colours, (side, side))
    unrest: Array = cv2.blur(luma * luma, (side, side)) - cv2.blur(luma, (side, side)) ** 2
    reach = (radius_px + 1) // 2
    means = cv2.copyMakeBorder(means, reach, reach, reach, reach, cv2.BORDER_REFLECT)
    unrest = cv2.copyMakeBorder(unrest, reach, reach, reach, reach, cv2.BORDER_REFLECT)
    height, width = luma.shape
    calmest = np.full((height, width), np.inf, np.float32)
    result = np.empty_like(colours)
    for top in (0, 2 * reach):
        for left in (0, 2 * reach):
            here = unrest[top : top + height, left : left + width]
            calmer = here < calmest
            np.copyto(calmest, here, where=calmer)
            np.copyto(result, means[top : top + height, left : left + width], where=calmer[..., None])
    return clipped(result)


def oil_patches(image: Array, radius_px: int, levels: int) -> Array:
    """Apply the classic oil filter: the mean colour of the most common brightness level around each pixel."""
    level_of = (grey(image) * (levels / 256)).astype(np.int32)
    side = 2 * radius_px + 1
    most = np.zeros(level_of.shape, np.float32)
    result = np.zeros(image.shape, np.float32)
    for level in range(levels):
        mask = (level_of == level).astype(np.float32)
        if not mask.any():
            continue
        common = cv2.blur(mask, (side, side))
        colour = cv2.blur(image * mask[..., None], (side, side)) / np.maximum(common, 1e-4)[..., None]
        wins = common > most
        np.copyto(most, common, where=wins)
        np.copyto(result, colour, where=wins[..., None])
    return clipped(result)


def lines(image: Array, width_px: float, ink: float) -> Array:
    """Draw dark contours: 0 on a line, 1 elsewhere.

    Extended difference of Gaussians (Winnemoeller 2011). A larger `ink` also draws fainter edges.
    """
    luma = grey(image)
    difference = blur(luma, width_px) - 0.98 * blur(luma, 1.6 * width_px)
    return np.asarray(np.clip(1 + np.tanh((difference - ink) * 0.35), 0, 1))


def edges(image: Array) -> Array:
    """Return the magnitude of the brightness gradient, in grey levels per pixel."""
    luma = grey(image)
    return cv2.magnitude(cv2.Sobel(luma, cv2.CV_32F, 1, 0), cv2.Sobel(luma, cv2.CV_32F, 0, 1)) / 4


def directions(image: Array, sigma_px: float) -> tuple[Array, Array]:
    """Return unit vectors along the shapes, from the smoothed structure tensor."""
    luma = grey(image)
    gx, gy = cv2.Sobel(luma, cv2.CV_32F, 1, 0), cv2.Sobel(luma, cv2.CV_32F, 0, 1)
    xx, xy, yy = (blur(product, sigma_px) for product in (gx * gx, gx * gy, gy * gy))
    angle = 0.5 * np.arctan2(2 * xy, xx - yy) + np.float32(np.pi / 2)
    return np.cos(angle), np.sin(angle)


def saturated(image: Array, saturation: float, gain: float = 1.0, lift: float = 0.0) -> Array:
    """Scale the saturation, and map brightness to `gain * brightness + lift`."""
    ramp = np.arange(256)
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
    hsv[..., 1] = cv2.LUT(hsv[..., 1], clipped(ramp * saturation))
    hsv[..., 2] = cv2.LUT(hsv[..., 2], clipped(ramp * gain + lift))
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)


def soft_steps(image: Array, count: int, phase: float) -> Array:
    """Quantize brightness into `count` tones with a small slope in each; `phase` shifts the cuts by parts of a tone."""
    ramp = np.arange(256)
    stepped = (np.floor(ramp / 256 * count + phase) + 0.5 - phase) * 256 / count
    lab = cv2.cvtColor(image, cv2.COLOR_BGR2LAB)
    lab[..., 0] = cv2.LUT(lab[..., 0], clipped(0.25 * ramp + 0.75 * stepped))
    return cv2.cvtColor(lab, cv2.COLOR_LAB2BGR)
