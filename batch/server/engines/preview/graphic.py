"""Styles that imitate print and screen: cartoon, pop art, pixel, mosaic, neon, blueprint. Pure.

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
    edges,
    grey,
    kuwahara,
    lines,
    over,
    saturated,
    soft_steps,
)
from batch.server.engines.preview.texture import Array, clouds, coordinates, grain

__all__ = ["blueprint", "cartoon", "mosaic", "neon", "pixel", "popart"]

# Ink, shade, tone and light of each print; RGB.
_PRINTS = np.array(
    [
        [[22, 28, 70], [222, 40, 70], [255, 196, 40], [255, 246, 214]],
        [[52, 16, 74], [240, 62, 140], [64, 196, 214], [255, 240, 130]],
        [[14, 50, 70], [0, 138, 150], [250, 120, 84], [253, 234, 196]],
        [[40, 24, 24], [206, 44, 44], [60, 160, 206], [248, 238, 216]],
        [[28, 20, 60], [98, 66, 190], [120, 214, 150], [254, 240, 170]],
    ],
    np.float32,
)
_BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]], np.float32) / 16 - 0.5
_PALETTE_COLOURS = 16


def cartoon(image: Array, rng: np.random.Generator, power: float) -> Array:
    """Render flat bright tones with inked contours."""
    flat = image
    for _ in range(2):
        flat = cv2.bilateralFilter(flat, 7, 45, 7)
    flat = saturated(kuwahara(flat, int(2 + 2 * power)), 1.4, 1.05, 12)
    toned = soft_steps(flat, round(9 - 4 * power), rng.uniform(-0.35, 0.35))
    ink = lines(kuwahara(image, 3), 1.4, 1.1)
    return clipped(toned * (1 - (1 - ink) * (0.45 + 0.5 * power))[..., None])


def popart(image: Array, rng: np.random.Generator, power: float) -> Array:
    """Render a screen print: four inks, halftone dots between two inks, black contours."""
    height, width = image.shape[:2]
    luma = grey(cv2.GaussianBlur(kuwahara(image, 4), (0, 0), 1.2))
    inks = _PRINTS[int(rng.integers(len(_PRINTS)))][:, ::-1]
    cuts = np.quantile(luma[::4, ::4], (0.2, 0.5, 0.8))
    x, y = coordinates(height, width)
    angle, pitch = rng.uniform(0.3, 0.8), 7 + 2 * power
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    dots = (np.cos(2 * np.pi * u / pitch) + np.cos(2 * np.pi * v / pitch)) * 16
    ink_of = sum((luma + dots > cut).astype(np.int32) for cut in cuts)
    printed = cv2.GaussianBlur(inks[ink_of], (0, 0), 0.6)
    contours = lines(kuwahara(image, 3), 1.8, 1.0)
    return clipped(over(printed, inks[0] * 0.6, (1 - contours) * 0.92))


def pixel(image: Array, rng: np.random.Generator, power: float) -> Array:
    """Render large square pixels in sixteen colours, dithered in a 4x4 pattern."""
    height, width = image.shape[:2]
    block = 3 + 5 * power
    shape = max(1, round(width / block)), max(1, round(height / block))
    small = saturated(cv2.resize(image, shape, interpolation=cv2.INTER_AREA), 1.3, 1.04, 4)
    points = small.reshape(-1, 3).astype(np.float32)
    palette = _palette(points, rng)
    dither = np.tile(_BAYER, (shape[1] // 4 + 1, shape[0] // 4 + 1))[: shape[1], : shape[0]]
    wanted = points + 22 * dither.reshape(-1, 1)
    # |w - p|^2 without the term |w|^2, which is the same for every colour of the palette.
    # einsum instead of BLAS, whose threads can change the order of additions and thereby the rounding.
    nearest = ((palette**2).sum(1) - 2 * np.einsum("nc,pc->np", wanted, palette)).argmin(1)
    blocks: Array = clipped(palette)[nearest].reshape(small.shape)
    return cv2.resize(blocks, (width, height), interpolation=cv2.INTER_NEAREST)


def _palette(points: Array, rng: np.random.Generator) -> Array:
    """Return the palette that k-means finds in a sample of the points."""
    sample = points[rng.permutation(len(points))[:1500]]
    cv2.setRNGSeed(int(rng.integers(1 << 30)))
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 8, 1.0)
    count = min(_PALETTE_COLOURS, len(sample))
    labels = np.zeros((len(sample), 1), np.int32)
    return np.asarray(cv2.kmeans(sample, count, labels, stop, 1, cv2.KMEANS_PP_CENTERS)[2])


def mosaic(image: Array, rng: np.random.Generator, power: float) -> Array:
    """Render stained glass: one colour per cell, lead joints, smaller cells in detailed areas."""
    height, width = image.shape[:2]
    cell = 10 + 9 * power
    distance, label = _cells(image, rng, cell)
    count = label.max() + 1
    size = np.maximum(np.bincount(label.ravel(), minlength=count), 1)
    means = [np.bincount(label.ravel(), image[..., channel].ravel(), count) / size for channel in range(3)]
    glass = saturated(clipped(np.stack(means, -1))[None], 1.5, 1.12, 4)[0].astype(np.float32)
    glass *= rng.uniform(0.88, 1.14, (count, 1)).astype(np.float32)
    field = label.astype(np.float32)
    joint = (cv2.morphologyEx(field, cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8)) > 0).astype(np.float32)
    lead = np.clip(blur(joint, 0.9) * 1.5, 0, 1)
    shine = 1.12 - 0.3 * np.clip(distance / cell, 0, 1) + 0.06 * clouds(rng, height, width, 6, 3)
    return clipped(over(glass[label] * shine[..., None], bgr(34, 30, 28), lead * 0.92))


def _cells(image: Array, rng: np.random.Generator, cell: float) -> tuple[Array, Array]:
    """Return per pixel the distance to the nearest of the jittered cell centres, and its number."""
    height, width = image.shape[:2]
    rows, columns = np.mgrid[cell / 2 : height : cell, cell / 2 : width : cell]
    seeds = [(rows, columns, cell)]
    detail = blur(edges(image), cell / 2)
    busy = detail[rows.astype(int), columns.astype(int)] > np.quantile(detail[::8, ::8], 0.7)
    for down, across in ((-0.25, 0.25), (0.25, -0.25)):
        seeds.append((rows[busy] + down * cell, columns[busy] + across * cell, cell / 2))
    empty = np.full((height, width), 255, np.uint8)
    for down, across, room in seeds:
        y = np.clip(down + rng.uniform(-0.4, 0.4, down.shape) * room, 0, height - 1).astype(int)
        x = np.clip(across + rng.uniform(-0.4, 0.4, across.shape) * room, 0, width - 1).astype(int)
        empty[y, x] = 0
    distance, label = cv2.distanceTransformWithLabels(empty, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    return distance, label


def neon(image: Array, rng: np.random.Generator, power: float) -> Array:
    """Render glowing contours in two colours on dark violet, with faint scan lines."""
    height, width = image.shape[:2]
    light = (blur(grey(image), 1) / 255)[..., None]
    base = bgr(78, 16, 34) * (1 - light) * 0.6 + (image * 0.3 + bgr(190, 70, 170) * 0.35) * light
    turn = rng.uniform(-12, 12)
    tubes = np.array([[[int(90 + turn) % 180, 235, 255], [int(158 - turn) % 180, 225, 255]]], np.uint8)
    cool, hot = cv2.cvtColor(tubes, cv2.COLOR_HSV2BGR)[0].astype(np.float32)
    drawn = np.clip(edges(kuwahara(image, 5)) / 17 - 0.16, 0, 1)
    glow = drawn + 0.8 * blur(drawn, 3) + 1.2 * blur(drawn, 10)
    side = np.clip(clouds(rng, height, width, 2) * 1.8 + 0.5, 0, 1)
    light_of = np.clip(over(hot, cool, side) * glow[..., None], 0, 255)
    lit = 255 - (255 - np.clip(base, 0, 255)) * (255 - light_of) / 255
    lit[::3] *= 1 - 0.16 * power
    return clipped(lit)


def blueprint(image: Array, rng: np.random.Generator, power: float) -> Array:
    """Render white lines on blue drafting paper with a grid."""
    height, width = image.shape[:2]
    calm = kuwahara(image, 4)
    thin = 1 - lines(calm, 1.1, 1.0)
    drawn = np.clip(0.65 * thin + edges(calm) / 24 - 0.06, 0, 1)
    cloudy = 1 + 0.12 * clouds(rng, height, width, 4, 3)
    paper = bgr(132, 66, 22) * (cloudy * (0.62 + 0.5 * blur(grey(image), 7) / 255))[..., None]
    step = 24 + int(rng.integers(0, 9))
    grid = np.zeros((height, width), np.float32)
    for every, shade in ((step, 0.12), (4 * step, 0.26)):
        grid[step // 2 :: every] = grid[:, step // 2 :: every] = shade
    chalk = np.clip(drawn + grid * (1 - drawn), 0, 1) * (0.3 + 0.7 * power)
    sheet = over(paper, bgr(252, 242, 230), chalk)
    return clipped(sheet + 5 * grain(rng, height, width, 1.4)[..., None])
