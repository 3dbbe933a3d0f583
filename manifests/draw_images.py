"""Draw the demo's images and manifests, so that the demo contains no third-party material.

`python manifests/draw_images.py [FOLDER]` writes images/, demo.csv, demo.parquet and sweep.jsonl to FOLDER (default:
the folder of this script). All numbers and seeds are fixed, so the images are reproducible.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

__all__ = ["IMAGES", "draw", "write_everything"]

Field: TypeAlias = npt.NDArray[Any]
"""float32 array: coverage from 0 to 1 with one value per pixel, or RGB from 0 to 255 with three."""
Point: TypeAlias = tuple[float, float]


# --- the drawing board ------------------------------------------------------------------------------------


def rgb(code: str) -> Field:
    """Return `"#rrggbb"` as three floats."""
    return np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)], np.float32)


@functools.cache
def noise(seed: int, height: int, width: int, cells: float, octaves: int = 1) -> Field:
    """Return smooth noise from about -1 to 1."""
    rng = np.random.default_rng(seed)
    field = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        across = cells * 2**octave / max(height, width)
        grid = rng.random((round(across * height) + 3, round(across * width) + 3)).astype(np.float32)
        field += (cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) * 2 - 1) / 2**octave
    return field / np.float32(2 - 0.5 ** (octaves - 1))


def smooth(points: Sequence[Point], closed: bool = True, fineness: int = 14) -> list[Point]:
    """Return a Catmull-Rom curve through the points."""
    p = np.array(points, np.float64)
    p = np.vstack([p[-1], p, p[:2]]) if closed else np.vstack([p[0], p, p[-1]])
    t = np.linspace(0, 1, fineness, endpoint=False)[:, None]
    curve = []
    for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False):
        curve.append(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3))
    return [(float(x), float(y)) for x, y in np.vstack(curve)]


class Board:
    """An RGB canvas, and the shapes to paint on it."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.x, self.y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
        self.pixels = np.zeros((height, width, 3), np.float32)

    def paint(self, shape: Field, colour: Field | str, opacity: float = 1.0) -> None:
        """Paint a shape with one colour, or with a colour per pixel."""
        colour = rgb(colour) if isinstance(colour, str) else colour
        rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
        if len(rows) == 0:
            return
        window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        part = colour[window] if colour.ndim == 3 else colour
        self.pixels[window] += (shape[window] * opacity)[..., None] * (part - self.pixels[window])

    def glow(self, shape: Field, colour: str, strength: float = 1.0) -> None:
        """Add light by screen blending."""
        light = np.clip(rgb(colour) * (shape * strength)[..., None], 0, 255)
        self.pixels = 255 - (255 - self.pixels) * (255 - light) / 255

    def blend(self, *stops: tuple[float, str], turn: float = 0.0) -> Field:
        """Return a gradient from top (0) to bottom (1); with a `turn` of 1, from left to right."""
        along = self.y / self.height * (1 - turn) + self.x / self.width * turn
        where, colours = [stop for stop, _ in stops], np.array([rgb(code) for _, code in stops])
        return np.stack([np.interp(along, where, colours[:, part]) for part in range(3)], -1).astype(np.float32)

    def noise(self, seed: int, cells: float, octaves: int = 1) -> Field:
        return noise(seed, self.height, self.width, cells, octaves)

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, turn: float = 0.0, soft: float = 1.2) -> Field:
        """Return an ellipse; `turn` is in radians, `soft` is the width of the edge in pixels."""
        field = np.zeros_like(self.x)
        window = self.window(cx, cy, max(rx, ry) + soft * max(rx, ry) / min(rx, ry))
        dx, dy = self.x[window] - cx, self.y[window] - cy
        u, v = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
        distance = (np.hypot(u / rx, v / ry) - 1) * min(rx, ry)
        field[window] = np.clip(0.5 - distance / soft, 0, 1)
        return field

    def window(self, cx: float, cy: float, reach: float) -> tuple[slice, slice]:
        """Return the pixels around a point, to skip the work on all others."""
        left, top = max(0, int(cx - reach) - 1), max(0, int(cy - reach) - 1)
        return slice(top, max(top, int(cy + reach) + 3)), slice(left, max(left, int(cx + reach) + 3))

    def below(self, line: Field, soft: float = 1.2) -> Field:
        """Return the area below a line with one height per column."""
        return np.clip(0.5 + (self.y - line[None, :]) / soft, 0, 1)

    def polygon(self, points: Iterable[Point]) -> Field:
        mask = np.zeros((self.height, self.width), np.uint8)
        corners = np.array([[(round(x * 16), round(y * 16)) for x, y in points]], np.int32)
        cv2.fillPoly(mask, corners, 255, cv2.LINE_AA, 4)
        return mask.astype(np.float32) / 255

    def stroke(self, points: Sequence[Point], start: float, end: float | None = None) -> Field:
        """Return a brush stroke whose width changes along its length."""
        p = np.array(points, np.float64)
        along = np.gradient(p, axis=0)
        normal = np.stack([-along[:, 1], along[:, 0]], -1) / np.maximum(np.hypot(*along.T), 1e-6)[:, None]
        reach = np.linspace(start, start if end is None else end, len(p))[:, None] / 2
        outline = np.vstack([p + normal * reach, (p - normal * reach)[::-1]])
        return self.polygon([(float(x), float(y)) for x, y in outline])

    def blur(self, shape: Field, sigma: float) -> Field:
        return np.asarray(cv2.GaussianBlur(shape, (0, 0), sigma))

    def ball(self, cx: float, cy: float, rx: float, ry: float, dark: str, light: str, gloss: float = 0.6) -> None:
        """Paint a sphere lit from the upper left."""
        window = self.window(cx, cy, max(rx, ry) + 2)
        nx, ny = (self.x[window] - cx) / rx, (self.y[window] - cy) / ry
        nz = np.sqrt(np.clip(1 - nx * nx - ny * ny, 0, 1))
        lit = np.clip(-0.52 * nx - 0.6 * ny + 0.62 * nz, 0, 1)[..., None]
        shine = np.clip(-0.36 * nx - 0.44 * ny + 0.82 * nz, 0, 1) ** 40
        body = rgb(dark) * (1 - lit) + rgb(light) * lit + 190 * gloss * shine[..., None]
        cover = self.ellipse(cx, cy, rx, ry)[window][..., None]
        self.pixels[window] += cover * (body - self.pixels[window])

    def finish(self, grain: float = 2.5, corners: float = 0.25, seed: int = 1) -> Image.Image:
        """Darken the corners slightly and add fine grain."""
        away = ((self.x / self.width - 0.5) ** 2 + (self.y / self.height - 0.5) ** 2) * 2
        pixels = self.pixels * (1 - corners * away**1.5)[..., None]
        rough = np.random.default_rng(seed).normal(0, grain, (self.height, self.width, 1))
        return Image.fromarray(np.clip(pixels + rough, 0, 255).astype(np.uint8))


def ridge(board: Board, seed: int, height: float, relief: float, cells: float, octaves: int = 5) -> Field:
    """Return the skyline of a hill or a mountain range, one height per column."""
    return height + relief * noise(seed, 8, board.width, cells, octaves)[4]


# --- the images -----------------------------------------------------------------------------------------


def mountains() -> Image.Image:
    """A lake under snowy peaks in the morning."""
    b = Board(768, 512)
    b.paint(np.ones_like(b.x), b.blend((0, "#5b8fc7"), (0.3, "#a9cbe2"), (0.52, "#fbe3c4"), (1, "#fbe3c4")))
    b.glow(b.ellipse(560, 175, 150, 120, soft=240), "#ffd9a0", 0.9)
    b.paint(b.ellipse(560, 172, 24, 24), "#fff6dc")
    drift = np.clip(b.noise(3, 5, 5) * (1 - b.y / 330) * 1.4 + 0.1, 0, 1)
    b.paint(drift * np.clip(1 - b.y / 210, 0, 1), "#ffffff", 0.75)
    shore = 336.0
    across = np.arange(b.width)
    for seed, height, relief, peaks, rock in (
        (11, 300, 60, ((60, 190), (220, 130), (390, 175), (540, 150), (700, 120)), "#7f98b8"),
        (24, 330, 40, ((-20, 120), (150, 205), (300, 150), (455, 250), (640, 170), (790, 210)), "#4f6a8c"),
    ):
        cones = np.max([top - 0.92 * np.abs(across - at) for at, top in peaks], axis=0)
        line = np.minimum(ridge(b, seed, height, relief, 7, 6) - np.clip(cones, 0, None), 330)
        _massif(b, line.astype(np.float32), seed, rock)
    for seed, height, relief, colour in ((5, 306, 20, "#4f7a66"), (7, 322, 12, "#2f5a48")):
        line = ridge(b, seed, height, relief, 6) - 7 * np.abs(np.sin(np.arange(b.width) * 0.55 + seed)) ** 3
        b.paint(b.below(line), colour)
    _reflect(b, shore, "#27506e", 0.34)
    meadow = ridge(b, 9, 474, 20, 3)
    b.paint(b.below(meadow), b.blend((0.85, "#54803c"), (1, "#2c4a22")))
    rng = np.random.default_rng(4)
    for x, height in zip((40, 84, 120, 665, 706, 742), (210, 150, 105, 120, 190, 240), strict=True):
        _pine(b, x, 500, height, rng)
    return b.finish()


def _massif(b: Board, line: Field, seed: int, rock: str) -> None:
    """Rock faces lit from the right, snow above and in the gullies."""
    face, depth = b.below(line), b.y - line[None, :]
    relief = 1 - np.abs(b.noise(seed, 8, 6))
    light = cv2.GaussianBlur(np.gradient(relief, axis=1) - 0.5 * np.gradient(relief, axis=0), (0, 0), 1.2) * 14
    slope = np.gradient(cv2.GaussianBlur(line[None], (0, 0), 9)[0])[None, :]
    shade = np.clip(0.42 + 0.34 * light - 0.5 * slope, 0, 1)
    b.paint(face, rgb(rock) * (0.62 + 0.6 * shade[..., None]))
    snow = np.clip((64 - 0.62 * depth + 46 * b.noise(seed + 1, 12, 5) + 26 * light) / 16, 0, 1)
    b.paint(face * snow, rgb("#a9bfdc") * (1 - shade[..., None]) + rgb("#fffaf2") * shade[..., None], 0.95)
    b.paint(face * np.clip(depth / 170 - 0.3, 0, 0.6), "#a9c3d6", 0.6)


def _reflect(b: Board, shore: float, water: str, share: float) -> None:
    """Paint water below `shore`, with a rippled reflection of the scene above."""
    depth = np.clip(b.y - shore, 0, None)
    ripple = b.noise(77, 40, 3) * (1 + depth * 0.05) * 2
    mirrored = cv2.remap(b.pixels, b.x + ripple * 0.6, np.clip(2 * shore - b.y + ripple * 2, 0, shore - 2), 1)
    surface = mirrored * (1 - share) + rgb(water) * share
    glitter = np.clip(np.sin(depth * 1.3 + ripple * 3) * b.noise(78, 30, 3) - 0.25, 0, 1)
    b.paint(np.clip(b.y - shore, 0, 1), surface + 60 * glitter[..., None])


def _pine(b: Board, x: float, foot: float, height: float, rng: np.random.Generator) -> None:
    b.paint(b.stroke([(x, foot), (x, foot - height * 0.5)], 7, 4), "#3a2a1e")
    tiers = 9
    for tier in range(tiers):
        top = foot - height + tier * height * 0.098
        reach = height * (0.035 + 0.022 * tier) * rng.uniform(0.85, 1.1)
        drop = height * 0.19
        points = [(x, top), (x + reach, top + drop), (x + reach * 0.4, top + drop * 0.86), (x, top + drop * 1.02)]
        points += [(2 * x - px, py) for px, py in reversed(points[1:3])]
        b.paint(b.polygon(points), rgb("#1d3b2c") + 9 * (tiers - tier) / tiers * np.array([1, 2, 1], np.float32))


def still_life() -> Image.Image:
    """Fruit and a jug on a table, lit from a window at the left."""
    b = Board(640, 768)
    b.paint(np.ones_like(b.x), b.blend((0, "#7d6b58"), (1, "#33281f"), turn=0.75))
    b.paint(np.ones_like(b.x), rgb("#a08a70") + 0 * b.pixels, 0.25)
    b.glow(b.ellipse(90, 190, 240, 300, soft=420), "#c9a874", 0.55)
    b.paint(np.clip(b.noise(5, 9, 4), 0, 1), "#2c2018", 0.25)
    table = b.below(np.full(b.width, 520, np.float32))
    grain = b.noise(6, 3, 2) + np.sin((b.y + 24 * b.noise(8, 3, 2)) * 0.36) * 0.35
    b.paint(table, b.blend((0.66, "#96602f"), (1, "#55311a")) + 16 * grain[..., None])
    cloth = smooth([(330, 522), (470, 540), (660, 520), (660, 780), (430, 790), (395, 690), (350, 610)])
    b.paint(b.polygon(cloth), b.blend((0.66, "#d8dfe6"), (1, "#93a2b3"), turn=0.2))
    folds = np.sin(b.x * 0.045 + b.y * 0.018 + 2 * b.noise(12, 3))
    b.paint(b.polygon(cloth) * np.clip(folds, 0, 1), "#6f7f92", 0.5)
    for cx, cy, rx in ((215, 622, 190), (450, 645, 150), (525, 660, 70), (120, 690, 70)):
        b.paint(b.ellipse(cx + 34, cy, rx, 30, soft=46), "#1c110a", 0.62)
    _jug(b)
    b.paint(b.polygon(smooth([(66, 520), (96, 590), (160, 628), (260, 628), (322, 592), (352, 520)])), "#315f86")
    bowl = b.polygon(smooth([(66, 520), (96, 590), (160, 628), (260, 628), (322, 592), (352, 520)]))
    b.paint(bowl * np.clip((b.x - 120) / 240, 0, 1), "#122c44", 0.85)
    b.paint(bowl * b.ellipse(140, 560, 26, 40, 0.5, soft=40), "#cfe6f5", 0.55)
    b.paint(b.ellipse(209, 520, 146, 26), "#1b3d5c")
    for fruit in (
        (150, 470, 62, 60, "#7a2410", "#f39b2d"),
        (268, 474, 60, 58, "#5c0f14", "#e2433a"),
        (206, 428, 58, 56, "#8a5a0c", "#f7d25a"),
        (210, 502, 60, 44, "#6a2a0a", "#f08a28"),
    ):
        b.ball(*fruit, gloss=0.7)
    b.paint(b.stroke(smooth([(270, 420), (276, 402), (290, 390)], closed=False), 6, 3), "#3c2a16")
    b.paint(b.polygon(smooth([(286, 396), (318, 372), (350, 378), (322, 402)])), "#4f8a3a")
    front = bowl * np.clip((b.y - 512 - 22 * np.sqrt(np.clip(1 - ((b.x - 209) / 146) ** 2, 0, 1))) / 2, 0, 1)
    b.paint(front, b.blend((0, "#3f7aa8"), (0.45, "#2f5f88"), (1, "#122c44"), turn=1))
    b.paint(front * b.ellipse(140, 570, 22, 30, 0.5, soft=36), "#e2f2fb", 0.6)
    rng = np.random.default_rng(8)
    for row in range(6):
        for place in range(6 - row):
            x = 420 + 34 * place + 17 * row + rng.uniform(-4, 4)
            b.ball(x, 652 - 27 * row + rng.uniform(-4, 4), 20, 20, "#1d0f33", "#8d6bc0", 0.8)
    b.ball(112, 662, 58, 54, "#2f4d12", "#b4d44e", 0.7)
    b.paint(b.stroke(smooth([(112, 618), (118, 600), (132, 588)], closed=False), 6, 3), "#3c2a16")
    return b.finish(corners=0.5)


def _jug(b: Board) -> None:
    body = [(392, 250), (398, 300), (352, 380), (340, 470), (376, 560), (440, 584), (504, 560), (540, 470), (528, 380)]
    shape = b.polygon(smooth([*body, (482, 300), (488, 250)]))
    handle = smooth([(486, 290), (560, 300), (588, 370), (560, 440), (534, 462)], closed=False)
    b.paint(b.stroke(handle, 20, 16), "#8e4a2c")
    b.paint(b.stroke([(x - 3, y - 3) for x, y in handle], 6, 4), "#d08a5c")
    b.paint(shape, b.blend((0.5, "#e9a878"), (0.62, "#b9623a"), (0.86, "#4a2014"), turn=1))
    b.paint(shape * np.clip(np.cos((b.y - 470) * 0.09) - 0.75, 0, 1) * 3 * (np.abs(b.y - 470) < 40), "#f3e2c4", 0.85)
    b.paint(shape * b.ellipse(398, 440, 12, 62, 0.12, soft=22), "#fff1dc", 0.75)
    b.paint(b.ellipse(440, 250, 50, 13), "#5c2a18")
    b.paint(b.ellipse(440, 254, 40, 8), "#24100a")


def skyline() -> Image.Image:
    """A city at night behind a river."""
    b = Board(768, 576)
    b.paint(
        np.ones_like(b.x),
        b.blend((0, "#080d2b"), (0.4, "#1f2a63"), (0.66, "#6d4a83"), (0.72, "#b0628a"), (1, "#000000")),
    )
    rng = np.random.default_rng(21)
    for _ in range(170):
        x, y, size = rng.uniform(0, 768), rng.uniform(0, 270), rng.uniform(0.4, 1.3)
        b.glow(b.ellipse(x, y, size, size, soft=1.6), "#dfe6ff", rng.uniform(0.3, 1))
    b.glow(b.ellipse(600, 108, 120, 120, soft=210), "#8fa4e8", 0.5)
    b.paint(b.ellipse(600, 108, 42, 42), "#f4f0da")
    b.paint(b.ellipse(600, 108, 42, 42) * np.clip(b.noise(4, 26, 3) * 1.6, 0, 1), "#c9c4ae", 0.7)
    for depth, (colour, count, low, high) in enumerate(
        (("#33306a", 20, 130, 235), ("#1d2150", 15, 90, 290), ("#0d1132", 12, 60, 215))
    ):
        for place in range(count):
            width = rng.uniform(0.8, 1.25) * 768 / count
            _tower(b, place * 768 / count - 8, 410, width, rng.uniform(low, high), colour, rng, depth)
    _reflect(b, 410, "#0a1030", 0.35)
    b.glow(np.exp(-(((b.y - 410) / 9) ** 2)), "#ffb066", 0.35)
    return b.finish(grain=2)


def _tower(
    b: Board, left: float, foot: float, width: float, height: float, colour: str, rng: np.random.Generator, depth: int
) -> None:
    right, top = left + width, foot - height
    b.paint(b.polygon([(left, foot), (left, top), (right, top), (right, foot)]), colour)
    kind = rng.integers(4)
    middle = (left + right) / 2
    if kind == 0:
        b.paint(b.polygon([(left + 6, top), (middle, top - 38), (right - 6, top)]), colour)
    elif kind == 1:
        b.paint(b.polygon([(left + 9, top), (left + 9, top - 16), (right - 9, top - 16), (right - 9, top)]), colour)
        b.paint(b.stroke([(middle, top - 14), (middle, top - 62)], 3, 1), colour)
        b.glow(b.ellipse(middle, top - 62, 2, 2, soft=7), "#ff4a3c", 1)
    if depth == 0:
        return
    lamp = ("#ffd98a", "#fff0c4", "#ffb864", "#a9d4ff")[int(rng.integers(4))]
    for x in np.arange(left + 6, right - 8, 10):
        for y in np.arange(top + 9, foot - 12, 13):
            if rng.random() < (0.32, 0.42)[depth - 1]:
                pane = slice(int(y), int(y) + 7), slice(max(0, int(x)), max(0, int(x) + 5))
                b.pixels[pane] += rng.uniform(0.5, 1) * (rgb(lamp) - b.pixels[pane])


def portrait() -> Image.Image:
    """A woman with a red scarf, looking at the viewer."""
    b = Board(576, 768)
    b.paint(np.ones_like(b.x), b.blend((0, "#86a8a4"), (1, "#34505a"), turn=0.4))
    b.paint(np.clip(b.noise(3, 5, 4) + 0.2, 0, 1), "#bfd0c0", 0.35)
    hair = smooth(
        [
            (288, 92),
            (190, 112),
            (128, 210),
            (122, 360),
            (104, 520),
            (150, 600),
            (430, 600),
            (472, 520),
            (452, 360),
            (450, 210),
            (388, 112),
        ]
    )
    strands = np.sin(b.x * 0.5 + 6 * b.noise(9, 5, 2) + b.y * 0.03) * 0.6 + b.noise(10, 60, 2)
    b.paint(b.polygon(hair), rgb("#3a2018") + 14 * strands[..., None])
    b.paint(
        b.polygon(smooth([(30, 780), (60, 660), (170, 606), (288, 590), (406, 606), (516, 660), (546, 780)])),
        b.blend((0.75, "#31507c"), (1, "#1c2f50")),
    )
    neck = b.polygon(smooth([(236, 480), (228, 590), (250, 640), (326, 640), (348, 590), (340, 480)]))
    b.paint(neck, b.blend((0.6, "#b57a5c"), (0.72, "#d29a78"), (0.85, "#c48a6a")))
    face = smooth(
        [
            (288, 160),
            (206, 190),
            (180, 290),
            (188, 400),
            (226, 486),
            (288, 530),
            (350, 486),
            (388, 400),
            (396, 290),
            (370, 190),
        ]
    )
    skin = b.polygon(face)
    b.paint(skin, b.blend((0.3, "#f4cfae"), (0.48, "#eab993"), (0.66, "#c98a68"), turn=1))
    b.paint(skin * b.ellipse(400, 380, 90, 210, soft=130), "#a2644a", 0.55)
    for x in (222, 352):
        b.paint(skin * b.ellipse(x, 402, 40, 32, soft=46), "#df7f6c", 0.5)
    b.paint(skin * b.ellipse(262, 232, 80, 46, soft=80), "#fff0dc", 0.5)
    for x, way in ((236, 1), (340, -1)):
        _eye(b, x, 330, way)
    b.paint(b.stroke(smooth([(296, 330), (304, 372), (310, 398)], closed=False), 5, 10) * skin, "#b97a5a", 0.55)
    b.paint(b.ellipse(288, 406, 30, 18, soft=16), "#e2a683", 0.8)
    b.paint(b.ellipse(282, 398, 9, 9, soft=12), "#fff0e0", 0.7)
    for x in (272, 305):
        b.paint(b.ellipse(x, 413, 6, 3.4, soft=4), "#7d4030", 0.85)
    upper = smooth([(238, 448), (268, 442), (288, 447), (308, 442), (338, 448), (288, 460)])
    lower = smooth([(238, 448), (288, 459), (338, 448), (312, 475), (288, 480), (264, 475)])
    b.paint(b.polygon(upper), "#a63b40")
    b.paint(b.polygon(lower), "#c95658")
    b.paint(b.ellipse(280, 468, 18, 4, soft=8), "#f2b0a6", 0.8)
    b.paint(
        b.stroke(smooth([(230, 444), (254, 453), (288, 458), (322, 453), (346, 444)], closed=False), 2.5),
        "#5e1f22",
        0.8,
    )
    fringe = smooth(
        [
            (288, 128),
            (200, 150),
            (166, 250),
            (168, 350),
            (196, 276),
            (250, 214),
            (330, 184),
            (384, 244),
            (408, 350),
            (412, 250),
            (376, 150),
        ]
    )
    b.paint(b.polygon(fringe), rgb("#4a2a1e") + 16 * strands[..., None])
    b.paint(b.polygon(fringe) * b.ellipse(250, 176, 70, 26, -0.4, soft=40), "#9a6a48", 0.6)
    for points in (
        [(164, 604), (230, 640), (288, 648), (346, 640), (412, 604), (430, 660), (288, 706), (146, 660)],
        [(330, 660), (392, 650), (430, 780), (340, 790)],
    ):
        scarf = b.polygon(smooth(points))
        b.paint(scarf, b.blend((0.2, "#e0524a"), (0.8, "#8c1f2a"), turn=0.8))
        b.paint(scarf * np.clip(np.sin(b.x * 0.07 + b.y * 0.12 + 2 * b.noise(5, 4)), 0, 1), "#6d1420", 0.5)
    return b.finish(corners=0.4)


def _eye(b: Board, x: float, y: float, way: int) -> None:
    white = b.polygon(
        smooth(
            [(x - 32, y + 3), (x - 14, y - 13), (x + 10, y - 14), (x + 32, y + 1), (x + 8, y + 12), (x - 16, y + 11)]
        )
    )
    b.paint(b.ellipse(x, y - 4, 40, 24, soft=24), "#a86a50", 0.4)
    b.paint(white, "#f6f0ea")
    b.paint(white * b.ellipse(x + 2, y - 1, 15, 15), "#3d6f5c")
    b.paint(white * b.ellipse(x + 2, y - 1, 15, 15) * (1 - b.ellipse(x + 2, y - 1, 11, 11)), "#1d3a30", 0.7)
    b.paint(white * b.ellipse(x + 2, y - 1, 7, 7), "#0c1412")
    b.paint(b.ellipse(x - 4, y - 6, 3.6, 3.6), "#ffffff")
    lid = smooth([(x - 34, y + 3), (x - 15, y - 14), (x + 10, y - 15), (x + 34, y)], closed=False)
    b.paint(b.stroke(lid, 4, 5), "#2a1612")
    brow = smooth([(x - 38 * way, y - 36), (x - 6 * way, y - 46), (x + 34 * way, y - 40)], closed=False)
    b.paint(b.stroke(brow if way > 0 else brow[::-1], 6, 9), "#3a2018", 0.85)


def cat() -> Image.Image:
    """A ginger cat on a blue rug."""
    b = Board(640, 640)
    b.paint(np.ones_like(b.x), b.blend((0, "#e9dcc6"), (0.68, "#cdb898"), (1, "#8a6f52")))
    for x in range(-20, 660, 54):
        b.paint(b.stroke([(x, 0), (x, 440)], 20), "#dfcdb0", 0.6)
    b.paint(
        b.below(np.full(640, 436, np.float32), 3),
        b.blend((0.68, "#7d5638"), (1, "#54351f")) + 10 * b.noise(2, 4, 4)[..., None],
    )
    b.paint(b.ellipse(320, 556, 300, 84), "#2f5c86")
    for reach, colour in ((270, "#e3c98c"), (250, "#2f5c86"), (190, "#b5483c"), (176, "#2f5c86")):
        b.paint(b.ellipse(320, 556, reach, reach * 0.28), colour)
    b.paint(b.ellipse(345, 574, 190, 36, soft=40), "#101c2a", 0.6)
    fur = b.noise(11, 90, 2)
    tail = smooth([(420, 560), (520, 570), (566, 520), (540, 440), (556, 390)], closed=False)
    b.paint(b.stroke(tail, 46, 30), rgb("#c9742c") + 18 * fur[..., None])
    for i in range(12, len(tail) - 4, 9):
        b.paint(b.stroke(tail[i : i + 5], 44 - 0.25 * i), "#8f4416", 0.55)
    body = smooth(
        [(320, 300), (232, 350), (196, 460), (190, 556), (250, 590), (390, 590), (450, 556), (444, 460), (408, 350)]
    )
    shape = b.polygon(body)
    b.paint(shape, b.blend((0.3, "#ea9a48"), (0.7, "#b7601f"), turn=1) + 18 * fur[..., None])
    b.paint(
        shape
        * np.clip(np.sin(b.y * 0.16 + 1.5 * b.noise(5, 4) + np.abs(b.x - 320) * 0.03) - 0.25, 0, 1)
        * np.clip((np.abs(b.x - 320) - 62) / 34, 0, 1),
        "#8f4416",
        0.75,
    )
    b.paint(b.ellipse(320, 438, 62, 104, soft=46) * shape, rgb("#fbeeda") + 10 * fur[..., None], 0.95)
    for x in (272, 368):
        b.paint(
            b.stroke([(x, 440), (x - 2, 580)], 62, 52),
            b.blend((0.7, "#df8e40"), (0.92, "#e9a65c")) + 16 * fur[..., None],
        )
        b.paint(b.ellipse(x, 582, 37, 20), rgb("#fbeeda") + 8 * fur[..., None])
        for toe in (-13, 0, 13):
            b.paint(b.stroke([(x + toe, 580), (x + toe, 596)], 2), "#a97a52", 0.8)
    for way in (-1, 1):
        ear = [(320 + way * 118, 118), (320 + way * 122, 246), (320 + way * 30, 190)]
        b.paint(b.polygon(ear), "#c9742c")
        inner = [(320 + way * 108, 146), (320 + way * 108, 226), (320 + way * 52, 196)]
        b.paint(b.polygon(inner), "#e7a392")
    head = b.polygon(
        smooth(
            [
                (320, 160),
                (232, 178),
                (186, 250),
                (198, 322),
                (262, 372),
                (320, 384),
                (378, 372),
                (442, 322),
                (454, 250),
                (408, 178),
            ]
        )
    )
    b.paint(head, b.blend((0.28, "#f2a955"), (0.72, "#c06a26"), turn=1) + 18 * fur[..., None])
    for x, lean in ((320, 0), (288, 9), (352, -9)):
        b.paint(b.stroke([(x, 166), (x + lean, 226)], 13, 4) * head, "#8f4416", 0.8)
    for way in (-1, 1):
        for drop in (0, 24):
            stripe = smooth(
                [(320 + way * 134, 268 + drop), (320 + way * 104, 276 + drop), (320 + way * 80, 274 + drop)],
                closed=False,
            )
            b.paint(b.stroke(stripe, 12, 3) * head, "#8f4416", 0.75)
    b.paint(b.ellipse(320, 334, 66, 42, soft=20) * head, rgb("#fbeeda") + 8 * fur[..., None])
    for x in (264, 376):
        b.paint(b.ellipse(x, 266, 31, 27), "#3a1c0c")
        b.paint(b.ellipse(x, 266, 28, 24), b.blend((0.37, "#8fb83c"), (0.46, "#d9e47a")))
        b.paint(b.ellipse(x, 266, 9, 22), "#10100c")
        b.paint(b.ellipse(x - 8, 256, 6, 6), "#ffffff")
    b.paint(b.polygon(smooth([(302, 312), (338, 312), (320, 332)])), "#d9736c")
    for way in (-1, 1):
        b.paint(
            b.stroke(smooth([(320, 330), (320 + way * 10, 350), (320 + way * 32, 348)], closed=False), 3, 2), "#6b3420"
        )
        for lift in (-14, 0, 14):
            whisker = smooth(
                [(320 + way * 44, 336 + lift * 0.4), (320 + way * 110, 330 + lift), (320 + way * 178, 340 + lift * 2)],
                closed=False,
            )
            b.paint(b.stroke(whisker, 2.4, 0.8), "#fffaf0", 0.9)
    return b.finish()


def boat() -> Image.Image:
    """A sailing boat against a summer sky."""
    b = Board(768, 512)
    b.paint(np.ones_like(b.x), b.blend((0, "#2f7fc4"), (0.45, "#9fd0ec"), (0.62, "#e6f3f2"), (1, "#e6f3f2")))
    puffs = np.clip(b.noise(14, 4.2, 6) * 1.7 - 0.12 + 0.2 * np.exp(-(((b.y - 170) / 90) ** 2)), 0, 1)
    puffs *= np.clip((300 - b.y) / 120, 0, 1)
    b.paint(puffs, "#ffffff")
    b.paint(puffs * np.clip(b.noise(15, 6, 4) + (b.y - 150) / 160, 0, 1), "#9fb6cc", 0.55)
    b.paint(b.below(ridge(b, 30, 292, 26, 2.5, 4) + np.abs(np.arange(768) - 120) * 0.06), "#6f93a6")
    sea = b.below(np.full(768, 304, np.float32))
    b.paint(sea, b.blend((0.59, "#4fa3bd"), (0.72, "#1f7496"), (1, "#0b3f63")))
    near = np.clip((b.y - 304) / 208, 0.02, 1)
    swell = np.sin((b.y - 304) / (3 + 20 * near) * 3.2 + 5 * b.noise(16, 9, 3) + b.x * 0.008)
    b.paint(sea * np.clip(swell, 0, 1) * near, "#082f4c", 0.55)
    b.paint(sea * np.clip(swell * -1 - 0.55, 0, 1) * near, "#bfe6ea", 0.9)
    b.paint(sea * b.ellipse(420, 440, 150, 40, soft=70), "#062a44", 0.5)
    mast = [(404, 398), (408, 66)]
    hull = smooth([(262, 372), (300, 384), (430, 390), (556, 362), (540, 404), (500, 428), (330, 430), (286, 412)])
    main = [(414, 84), *smooth([(414, 84), (470, 190), (540, 352)], closed=False), (540, 352), (414, 362)]
    jib = [(398, 104), *smooth([(398, 104), (336, 220), (276, 356)], closed=False), (276, 356), (396, 358)]
    for sail, left, right in ((main, "#fffaf0", "#d9cdb8"), (jib, "#e4553e", "#b0321f")):
        b.paint(b.polygon(sail), b.blend((0.35, left), (0.72, right), turn=0.9))
        for height in range(130, 350, 44):
            b.paint(b.polygon(sail) * np.clip(1 - np.abs(b.y - height - (b.x - 400) * 0.1), 0, 1), "#8a7a66", 0.5)
    b.paint(b.stroke(mast, 8, 5), "#6b4526")
    b.paint(b.stroke([(404, 366), (548, 354)], 6, 4), "#6b4526")
    b.paint(b.polygon(hull), b.blend((0.7, "#f6f0e4"), (0.77, "#ded3c0"), (0.775, "#1f4d7a"), (0.84, "#12304e")))
    b.paint(b.polygon([(408, 66), (446, 74), (408, 84)]), "#f2c230")
    b.ball(462, 356, 10, 11, "#8a5a3c", "#f0c49c", 0)
    b.paint(b.polygon(smooth([(448, 386), (452, 366), (472, 366), (478, 386)])), "#d8a02c")
    foam = np.clip(b.noise(18, 46, 3) * 1.8 + 0.35, 0, 1)
    wake = b.polygon(smooth([(276, 424), (400, 434), (516, 424), (600, 440), (420, 452), (250, 442)]))
    b.paint(b.blur(wake, 3) * foam, "#f4fbfb", 0.95)
    for x, y, size in ((150, 120, 17), (196, 150, 12), (640, 96, 14)):
        for way in (-1, 1):
            wing = smooth(
                [(x, y), (x + way * size, y - size * 0.55), (x + way * size * 2, y - size * 0.1)], closed=False
            )
            b.paint(b.stroke(wing, 3.4, 1), "#33475a")
    return b.finish()


def tree() -> Image.Image:
    """An old oak on a hill, in black and white."""
    b = Board(640, 640)
    b.paint(np.ones_like(b.x), b.blend((0, "#6f7780"), (0.75, "#eceae4"), (1, "#eceae4")))
    b.paint(np.clip(b.noise(41, 3, 6) * 1.5, 0, 1) * np.clip(1 - b.y / 460, 0, 1), "#fdfdfb", 0.85)
    b.paint(b.below(ridge(b, 42, 486, 18, 2)), "#b9b9b4")
    hill = 560 - 62 * np.exp(-(((np.arange(640) - 320) / 230) ** 2)) + 4 * noise(43, 8, 640, 40, 3)[4]
    b.paint(
        b.below(hill.astype(np.float32)),
        b.blend((0.78, "#6c6c68"), (1, "#2c2c2a")) + 26 * b.noise(44, 60, 3)[..., None],
    )
    rng = np.random.default_rng(45)
    tips: list[Point] = []
    _branch(b, (322, 520), -np.pi / 2, 112, 46, 7, rng, tips)
    for share, dark in ((0.0, "#20201f"), (0.3, "#3d3d3b"), (0.62, "#6d6d69"), (0.82, "#a3a29c")):
        for x, y in tips:
            if rng.random() < share:
                continue
            size = rng.uniform(9, 21) * (1.15 - 0.5 * share)
            lean = 16 * share
            leaf = b.ellipse(x - lean + rng.normal(0, 11), y - lean + rng.normal(0, 9), size, size * 0.72, soft=5)
            b.paint(leaf * np.clip(b.noise(int(rng.integers(6)) + 50, 70, 2) * 3 + 0.7, 0, 1), dark, 0.75)
    b.paint(b.ellipse(360, 540, 210, 20, soft=44), "#1c1c1b", 0.55)
    for _ in range(260):
        x = float(rng.uniform(0, 640))
        y = float(np.interp(x, np.arange(640), hill) + rng.uniform(8, 90))
        blade = smooth(
            [(x, y), (x + rng.uniform(-3, 3), y - 8), (x + rng.uniform(-7, 7), y - rng.uniform(12, 20))],
            closed=False,
            fineness=4,
        )
        b.paint(b.stroke(blade, 2, 0.6), "#8f8f8a" if rng.random() < 0.5 else "#1e1e1d", 0.7)
    return b.finish(grain=4, corners=0.5).convert("L")


def _branch(
    b: Board,
    foot: Point,
    angle: float,
    length: float,
    width: float,
    depth: int,
    rng: np.random.Generator,
    tips: list[Point],
) -> None:
    bend = angle + rng.uniform(-0.22, 0.22)
    middle = foot[0] + length * 0.5 * np.cos(angle), foot[1] + length * 0.5 * np.sin(angle)
    end = middle[0] + length * 0.5 * np.cos(bend), middle[1] + length * 0.5 * np.sin(bend)
    limb = smooth([foot, middle, end], closed=False, fineness=6)
    b.paint(b.stroke(limb, width, width * 0.68), "#232221")
    b.paint(b.ellipse(end[0], end[1], width * 0.35, width * 0.35), "#232221")
    b.paint(
        b.blur(b.stroke([(x - width * 0.2, y) for x, y in limb[2:-2]], width * 0.2, width * 0.14), 1.5), "#6c6a64", 0.6
    )
    if depth <= 3:
        tips.append((float(end[0]), float(end[1])))
    if depth == 0:
        return
    for spread in (-1, 1, 0)[: 3 if depth == 6 else 2]:
        turn = spread * rng.uniform(0.3, 0.62) + rng.uniform(-0.08, 0.08)
        _branch(
            b,
            (float(end[0]), float(end[1])),
            bend + turn,
            length * rng.uniform(0.7, 0.84),
            width * 0.66,
            depth - 1,
            rng,
            tips,
        )


def shapes() -> Image.Image:
    """Glassy shapes on a transparent background, the only image with transparency."""
    b = Board(640, 640)
    cover = np.zeros_like(b.x)
    b.paint(np.ones_like(b.x), "#ffffff")

    def lay(shape: Field, colours: Field, opacity: float) -> None:
        nonlocal cover
        b.paint(shape, colours, opacity)
        cover = cover + shape * opacity * (1 - cover)

    lay(b.ellipse(250, 262, 196, 196), b.blend((0.1, "#ff7a59"), (0.7, "#ffcf56"), turn=0.3), 0.95)
    lay(
        b.ellipse(402, 360, 168, 168) * (1 - b.ellipse(402, 360, 96, 96)),
        b.blend((0.3, "#2e86de"), (0.9, "#48dbfb"), turn=0.6),
        0.9,
    )
    lay(b.polygon([(120, 560), (330, 196), (520, 560)]), b.blend((0.3, "#8e54e9"), (0.9, "#4776e6")), 0.7)
    lay(
        b.polygon(
            smooth(
                [
                    (60, 420),
                    (150, 370),
                    (250, 440),
                    (360, 384),
                    (470, 452),
                    (590, 396),
                    (590, 436),
                    (470, 496),
                    (360, 428),
                    (250, 486),
                    (150, 414),
                    (60, 466),
                ]
            )
        ),
        b.blend((0, "#11998e"), (1, "#38ef7d"), turn=1),
        0.9,
    )
    for x, y, size, dark, light in (
        (486, 160, 66, "#a01860", "#ff8fc4"),
        (150, 470, 46, "#0c4a5a", "#5ce0e6"),
        (540, 500, 40, "#7a3c00", "#ffc860"),
    ):
        lay(b.ellipse(x, y, size, size), b.pixels, 1.0)
        b.ball(x, y, size, size, dark, light, 0.9)
    for step in range(6):
        lay(b.stroke([(70 + 22 * step, 90), (180 + 22 * step, 200)], 7), rgb("#22303c"), 1.0)
    pixels = np.clip(np.dstack([b.pixels, cover * 255]), 0, 255).astype(np.uint8)
    pixels[pixels[..., 3] == 0] = 0
    return Image.fromarray(pixels)


def flower() -> Image.Image:
    """A dahlia in front of a blurred garden."""
    b = Board(576, 768)
    b.paint(np.ones_like(b.x), b.blend((0, "#9cc47c"), (0.5, "#4f8a52"), (1, "#1d4a34")))
    rng = np.random.default_rng(61)
    for _ in range(46):
        x, y, size = rng.uniform(0, 576), rng.uniform(0, 768), rng.uniform(16, 58)
        colour = ("#e8f0a0", "#bfe08a", "#f6d9e0", "#2f6a44", "#ffe9a8")[int(rng.integers(5))]
        b.paint(b.ellipse(x, y, size, size, soft=10), colour, float(rng.uniform(0.1, 0.34)))
    stem = smooth([(288, 330), (296, 480), (276, 640), (290, 780)], closed=False)
    b.paint(b.stroke(stem, 15, 20), b.blend((0.46, "#7fae4c"), (0.54, "#35632c"), turn=1))
    for points in ([(284, 620), (200, 560), (90, 580), (180, 640)], [(284, 560), (370, 480), (490, 500), (390, 574)]):
        leaf = b.polygon(smooth(points))
        b.paint(leaf, b.blend((0.1, "#7fb356"), (0.9, "#2c5e30"), turn=0.7))
        b.paint(b.stroke([points[0], points[2]], 4, 1) * leaf, "#b8dc8c", 0.7)
    for ring, (count, reach, wide, dark, light) in enumerate(
        (
            (20, 214, 44, "#6e1036", "#cf3a72"),
            (18, 176, 40, "#86163f", "#e2507f"),
            (16, 138, 34, "#9c2048", "#ef6c90"),
            (13, 98, 27, "#b02f50", "#f78ca4"),
            (10, 62, 19, "#bf4458", "#ffb0b4"),
        )
    ):
        for place in range(count):
            angle = 2 * np.pi * (place + 0.5 * (ring % 2)) / count + rng.uniform(-0.05, 0.05)
            _petal(b, angle, reach * rng.uniform(0.94, 1.04), wide, dark, light)
    b.ball(288, 300, 34, 34, "#9a4a10", "#ffd766", 0.2)
    for _ in range(90):
        angle, away = rng.uniform(0, 2 * np.pi), 32 * np.sqrt(rng.random())
        b.paint(
            b.ellipse(288 + away * np.cos(angle), 300 + away * np.sin(angle), 2.6, 2.6),
            "#fff0a8" if rng.random() < 0.6 else "#8a4410",
            0.8,
        )
    return b.finish(corners=0.45)


def _petal(b: Board, angle: float, reach: float, wide: float, dark: str, light: str) -> None:
    def at(along: float, aside: float) -> Point:
        return (
            float(288 + along * reach * np.cos(angle) - aside * wide * np.sin(angle)),
            float(300 + along * reach * np.sin(angle) + aside * wide * np.cos(angle)),
        )

    shape = b.polygon(
        smooth([at(0.1, 0), at(0.45, 0.62), at(0.78, 0.72), at(1, 0), at(0.78, -0.72), at(0.45, -0.62)], fineness=7)
    )
    window = b.window(*at(0.55, 0), reach * 0.55 + wide)
    x, y = b.x[window] - 288, b.y[window] - 300
    along, aside = (x * np.cos(angle) + y * np.sin(angle)) / reach, (y * np.cos(angle) - x * np.sin(angle)) / wide
    inside = shape[window]
    lit = np.clip(along * 1.1 - 0.12 - 0.35 * np.abs(aside) + 0.2 * np.cos(angle + 2.4), 0, 1)[..., None]
    vein = 0.45 * np.clip(1 - np.abs(aside) * 14, 0, 1)[..., None]
    body = rgb(dark) * np.maximum(1 - lit, vein) + rgb(light) * np.minimum(lit, 1 - vein)
    for cover, colour in ((0.35 * b.blur(inside, 5), rgb("#3c0a20")), (inside, body)):
        b.pixels[window] += cover[..., None] * (colour - b.pixels[window])


def lighthouse() -> Image.Image:
    """A lighthouse on its rock at dusk."""
    b = Board(512, 768)
    b.paint(
        np.ones_like(b.x),
        b.blend((0, "#23345f"), (0.35, "#7a5a8c"), (0.58, "#f08a5c"), (0.7, "#ffd08a"), (1, "#ffd08a")),
    )
    bands = np.clip(b.noise(71, 3, 5) * 1.5 + 0.3 * np.sin(b.y * 0.06), 0, 1) * np.clip((540 - b.y) / 260, 0, 1)
    b.paint(bands, "#f6a08a", 0.55)
    b.paint(bands * np.clip(b.noise(72, 5, 4), 0, 1), "#4a3a6a", 0.6)
    sea = b.below(np.full(512, 556, np.float32))
    b.paint(sea, b.blend((0.72, "#d98a72"), (0.8, "#5a5a86"), (1, "#1c2a50")))
    waves = np.sin((b.y - 556) * 0.5 + 4 * b.noise(73, 14, 3))
    b.paint(sea * np.clip(waves - 0.2, 0, 1), "#ffd9b0", 0.5)
    b.paint(sea * np.clip(-waves - 0.2, 0, 1), "#16203e", 0.55)
    lamp = (300.0, 190.0)
    for points, strength in (([lamp, (-60, 40), (-60, 210)], 0.75), ([lamp, (600, 210), (600, 300)], 0.5)):
        fade = np.clip(1 - np.hypot(b.x - lamp[0], b.y - lamp[1]) / 420, 0, 1)
        b.glow(b.blur(b.polygon(points), 5) * fade, "#fff0b4", strength)
    rock = smooth(
        [(120, 640), (180, 600), (226, 560), (300, 548), (392, 566), (440, 604), (530, 610), (530, 780), (60, 780)]
    )
    stone = b.polygon(rock)
    b.paint(stone, b.blend((0.7, "#6f5a58"), (1, "#221d2a")) + 34 * b.noise(74, 24, 4)[..., None])
    b.paint(stone * np.clip(b.noise(75, 16, 4) * 2 - 0.4, 0, 1), "#1a1622", 0.7)
    tower = [(258, 562), (272, 240), (328, 240), (344, 562)]
    shape = b.polygon(tower)
    b.paint(shape, b.blend((0.5, "#fff6e8"), (0.6, "#e7d6c8"), (0.68, "#8f7c8a"), turn=1))
    for top in (300, 414, 520):
        band = shape * np.clip(b.y - top, 0, 1) * np.clip(top + 52 - b.y, 0, 1)
        b.paint(band, b.blend((0.5, "#e0443c"), (0.6, "#b8302e"), (0.68, "#5c1a26"), turn=1))
    for y in (376, 482):
        b.paint(b.polygon([(294, y), (306, y), (306, y + 20), (294, y + 20)]), "#2a2030")
    b.paint(b.polygon([(286, 562), (286, 534), (300, 524), (314, 534), (314, 562)]), "#33222a")
    b.paint(b.polygon([(260, 240), (340, 240), (334, 226), (266, 226)]), "#2c2836")
    b.paint(b.polygon([(276, 226), (324, 226), (324, 160), (276, 160)]), "#ffe9a0")
    for x in (276, 292, 308, 324):
        b.paint(b.stroke([(x, 226), (x, 160)], 3), "#2c2836")
    b.paint(b.polygon(smooth([(268, 162), (332, 162), (318, 138), (300, 126), (282, 138)])), "#a82a2c")
    b.paint(b.stroke([(300, 130), (300, 104)], 4, 2), "#2c2836")
    b.glow(b.ellipse(300, 192, 26, 30, soft=110), "#ffe9a0", 1.0)
    hut = [(352, 566), (352, 522), (412, 522), (412, 572)]
    b.paint(b.polygon(hut), b.blend((0.7, "#efe2d4"), (0.82, "#a8949a"), turn=1))
    b.paint(b.polygon([(344, 524), (360, 496), (404, 496), (420, 524)]), "#8c2f30")
    b.paint(b.polygon([(374, 536), (390, 536), (390, 552), (374, 552)]), "#ffd766")
    foam = np.clip(b.noise(76, 30, 4) * 2.2 + 0.2, 0, 1)
    b.paint(np.clip(b.blur(stone, 8) - stone, 0, 1) * sea * foam * 2, "#fff2e6", 0.95)
    return b.finish()


def house() -> Image.Image:
    """A cottage with a garden in spring."""
    b = Board(768, 576)
    b.paint(np.ones_like(b.x), b.blend((0, "#6fb1e4"), (0.55, "#d9eef6"), (1, "#d9eef6")))
    puffs = np.clip(b.noise(81, 3.4, 6) * 1.6, 0, 1) * np.clip((300 - b.y) / 160, 0, 1)
    b.paint(puffs, "#ffffff", 0.95)
    b.paint(b.below(ridge(b, 82, 300, 30, 2.2, 3)), "#8fb98a")
    b.paint(b.below(ridge(b, 83, 336, 16, 5, 4)), "#5f9860")
    rng = np.random.default_rng(84)
    for x, y, size in ((70, 300, 84), (150, 330, 54), (690, 300, 92), (610, 336, 50)):
        b.paint(b.stroke([(x, y + size * 1.5), (x, y)], 16, 10), "#5a3d28")
        for shade, lean in (("#2c5c34", 0), ("#3f7a40", 8), ("#6fa858", 16)):
            for _ in range(26):
                angle, away = rng.uniform(0, 2 * np.pi), size * 0.62 * np.sqrt(rng.random())
                spot = size * rng.uniform(0.16, 0.3)
                b.paint(
                    b.ellipse(x - lean + away * np.cos(angle), y - lean + away * np.sin(angle), spot, spot, soft=5),
                    shade,
                    0.8,
                )
    lawn = b.below(ridge(b, 85, 420, 10, 2))
    b.paint(lawn, b.blend((0.72, "#8cc05a"), (1, "#3f7a34")) + 20 * b.noise(86, 70, 3)[..., None])
    b.paint(b.polygon(smooth([(376, 448), (412, 448), (440, 500), (560, 590), (330, 590), (372, 510)])), "#d8c09a")
    b.paint(b.ellipse(400, 452, 230, 20, soft=30), "#2a4a24", 0.6)
    wall = b.polygon([(230, 450), (230, 280), (560, 280), (560, 450)])
    b.paint(wall, b.blend((0.3, "#fbf3df"), (0.75, "#d9c8a8"), turn=1) + 6 * b.noise(87, 60, 3)[..., None])
    b.paint(b.polygon([(482, 240), (482, 150), (526, 150), (526, 240)]), "#a4553c")
    b.paint(b.polygon([(476, 160), (476, 144), (532, 144), (532, 160)]), "#7d3c2a")
    roof = b.polygon([(196, 292), (276, 170), (516, 170), (594, 292)])
    tiles = np.where((np.floor(b.y / 11) % 2) > 0, np.sin(b.x * 0.42), np.cos(b.x * 0.42)) * 9 - 14 * ((b.y % 11) < 2)
    b.paint(roof, b.blend((0.3, "#c8643c"), (0.5, "#8f3c28")) + tiles[..., None])
    b.paint(wall * np.clip(1 - (b.y - 292) / 16, 0, 1), "#6a5038", 0.6)
    for x in (262, 470):
        _window(b, x, 326)
    b.paint(b.polygon([(362, 450), (362, 338), (428, 338), (428, 450)]), "#fffaf0")
    b.paint(b.polygon([(370, 450), (370, 346), (420, 346), (420, 450)]), b.blend((0.6, "#3f7d8c"), (0.8, "#2a5866")))
    b.paint(b.ellipse(411, 402, 4, 4), "#f2c94c")
    for step in range(9):
        x, y = 506 + 9 * step + 5 * np.sin(step), 138 - 15 * step
        b.paint(b.ellipse(x, y, 9 + 3.4 * step, 7 + 2.6 * step, soft=14), "#f4f6f8", 0.55 - 0.05 * step)
    for _ in range(330):
        x, y = rng.uniform(0, 768), rng.uniform(440, 576)
        if 300 < x < 580 and abs(x - 394 - (y - 448) * 0.35) < 24 + (y - 448) * 0.62:
            continue
        size = 2.4 + (y - 430) / 48
        colour = ("#e8504c", "#f6c945", "#f28ab2", "#fffdf6", "#a06cd0")[int(rng.integers(5))]
        b.paint(b.stroke([(x, y + size * 2.6), (x, y)], 1.6), "#2f6430")
        b.ball(float(x), float(y), float(size), float(size), colour, "#fff6f0" if rng.random() < 0.3 else colour, 0)
    for x in range(6, 768, 30):
        if not 318 < x < 560:
            board = [(x, 556), (x, 498), (x + 7, 486), (x + 14, 498), (x + 14, 556)]
            b.paint(b.polygon(board), b.blend((0.84, "#ffffff"), (0.97, "#cfd6d8")))
    for y in (508, 536):
        for left, right in ((0, 326), (560, 768)):
            b.paint(b.polygon([(left, y), (right, y), (right, y + 7), (left, y + 7)]), "#eef2f2")
    return b.finish(grain=2)


def _window(b: Board, x: float, y: float) -> None:
    b.paint(b.polygon([(x - 5, y - 5), (x + 63, y - 5), (x + 63, y + 67), (x - 5, y + 67)]), "#fffaf0")
    b.paint(
        b.polygon([(x, y), (x + 58, y), (x + 58, y + 62), (x, y + 62)]),
        b.blend((0.55, "#2f4d66"), (0.7, "#88aebf"), turn=0.2),
    )
    b.paint(b.stroke([(x + 29, y), (x + 29, y + 62)], 5), "#fffaf0")
    b.paint(b.stroke([(x, y + 30), (x + 58, y + 30)], 5), "#fffaf0")
    for side in (x - 29, x + 65):
        b.paint(b.polygon([(side, y - 4), (side + 22, y - 4), (side + 22, y + 66), (side, y + 66)]), "#3f7d8c")
        for slat in range(6):
            b.paint(b.stroke([(side + 3, y + 6 + 11 * slat), (side + 19, y + 6 + 11 * slat)], 3), "#2a5866")
    b.paint(b.polygon([(x - 6, y + 67), (x + 64, y + 67), (x + 60, y + 82), (x - 2, y + 82)]), "#8a5a38")
    for step in range(8):
        b.ball(x + 8.5 * step, y + 63 + 3 * (step % 2), 6, 6, ("#d03a4a", "#f2789a")[step % 2], "#ffd0d8", 0)


def balloon() -> Image.Image:
    """Hot-air balloons over hills in the early morning sun."""
    b = Board(576, 768)
    b.paint(np.ones_like(b.x), b.blend((0, "#3f86c8"), (0.45, "#a8d4ea"), (0.75, "#fdeccb"), (1, "#fdeccb")))
    b.glow(b.ellipse(470, 560, 120, 110, soft=260), "#ffd48a", 0.9)
    b.paint(np.clip(b.noise(91, 3, 6) * 1.5 - 0.05, 0, 1) * np.clip((520 - b.y) / 300, 0, 1), "#ffffff", 0.85)
    for seed, height, relief, top, low in (
        (92, 574, 40, "#a9bcc4", "#c9d2cc"),
        (93, 622, 40, "#7fa08a", "#a6bf96"),
        (94, 668, 34, "#5f8a4c", "#8fae5c"),
        (95, 716, 26, "#3c6634", "#52803e"),
    ):
        b.paint(
            b.below(ridge(b, seed, height, relief, 2.4, 4)),
            b.blend((height / 768 - 0.05, top), (height / 768 + 0.08, low)) + 12 * b.noise(seed, 30, 3)[..., None],
        )
    rng = np.random.default_rng(96)
    for _ in range(70):
        x = rng.uniform(0, 576)
        y = rng.uniform(690, 768)
        size = (y - 640) / 11
        b.ball(float(x), float(y), float(size), float(size * 0.85), "#1f4426", "#7fae4c", 0)
    _balloon(b, 452, 330, 44, ("#2f8f83", "#f6f0dc"))
    _balloon(b, 112, 420, 30, ("#8a4fb0", "#f4c9e0"))
    _balloon(b, 506, 470, 17, ("#d9583c", "#f8e2a0"))
    _balloon(b, 262, 262, 168, ("#e2483d", "#f9c846", "#f6f0dc", "#2d6fb0"))
    return b.finish(grain=2)


def _balloon(b: Board, cx: float, cy: float, radius: float, colours: tuple[str, ...]) -> None:
    outline = smooth(
        [
            (cx + radius * u, cy + radius * v)
            for u, v in (
                (0, -1.06),
                (0.72, -0.74),
                (1, 0),
                (0.74, 0.62),
                (0.22, 1.2),
                (-0.22, 1.2),
                (-0.74, 0.62),
                (-1, 0),
                (-0.72, -0.74),
            )
        ]
    )
    shape = b.polygon(outline)
    down = np.clip((b.y - cy) / radius, -1.06, 1.2)
    half = np.interp(down, (-1.06, -0.74, 0, 0.62, 1.2), (0.12, 0.72, 1, 0.74, 0.22)) * radius
    around = np.arcsin(np.clip((b.x - cx) / half, -1, 1)) / np.pi + 0.5
    gores = np.floor(around * 10)
    for number, colour in enumerate(colours):
        b.paint(shape * (gores % len(colours) == number), colour)
    band = shape * (np.abs(down - 0.12) < 0.12)
    b.paint(band, colours[0])
    b.paint(band * (np.abs(((around * 20) % 2) - 1) < (1 - np.abs(down - 0.12) / 0.12)), colours[1])
    seam = np.abs(around * 10 - np.round(around * 10)) < 0.035
    b.paint(shape * seam, "#3a2420", 0.3)
    b.paint(shape * np.clip((b.x - cx + 0.3 * (b.y - cy)) / radius * 0.9, 0, 1), "#2a1420", 0.55)
    b.paint(
        shape * b.ellipse(cx - radius * 0.42, cy - radius * 0.42, radius * 0.2, radius * 0.34, 0.5, soft=radius * 0.3),
        "#ffffff",
        0.45,
    )
    basket = cy + radius * 1.58
    size = radius * 0.17
    for way in (-1, 1):
        b.paint(
            b.stroke(
                [(cx + way * radius * 0.21, cy + radius * 1.19), (cx + way * size, basket)], max(1.2, radius / 70)
            ),
            "#4a3020",
        )
    b.paint(
        b.polygon(
            [
                (cx - size, basket),
                (cx + size, basket),
                (cx + size * 0.86, basket + size * 1.4),
                (cx - size * 0.86, basket + size * 1.4),
            ]
        ),
        b.blend((0.3, "#a86a38"), (0.8, "#5c3418"), turn=1),
    )
    b.paint(
        b.polygon(
            [
                (cx - size * 1.1, basket - size * 0.1),
                (cx + size * 1.1, basket - size * 0.1),
                (cx + size * 1.1, basket + size * 0.2),
                (cx - size * 1.1, basket + size * 0.2),
            ]
        ),
        "#5c3418",
    )
    b.glow(b.ellipse(cx, cy + radius * 1.24, radius * 0.05, radius * 0.12, soft=radius * 0.16), "#ffb040", 1.0)


IMAGES: dict[str, Callable[[], Image.Image]] = {
    "mountains.jpg": mountains,
    "still-life.jpg": still_life,
    "skyline.jpg": skyline,
    "portrait.jpg": portrait,
    "cat.jpg": cat,
    "boat.jpg": boat,
    "tree.jpg": tree,
    "shapes.png": shapes,
    "flower.jpg": flower,
    "lighthouse.jpg": lighthouse,
    "house.jpg": house,
    "balloon.jpg": balloon,
}


# --- the manifests ----------------------------------------------------------------------------------------

_DEMO: list[tuple[str, str, dict[str, float]]] = [  # image, prompt, other inputs of the row
    ("mountains.jpg", "a watercolor painting of an alpine lake, soft morning light", {}),
    ("still-life.jpg", "an impasto oil painting of fruit and a clay jug, in the manner of the old masters", {}),
    ("skyline.jpg", "a neon cyberpunk city at night, glowing signs", {}),
    ("portrait.jpg", "a pop art screen print portrait with halftone dots", {}),
    ("cat.jpg", "a cheerful cartoon cat, flat colours and bold outlines", {}),
    ("boat.jpg", "a blueprint of a sailing boat, white lines on blue paper", {}),
    ("tree.jpg", "an old oak in autumn, golden leaves, painted on canvas", {"strength": 0.85}),
    ("shapes.png", "a stained glass mosaic of circles and triangles", {}),
    ("flower.jpg", "a pencil sketch of a dahlia, fine hatching", {}),
    ("lighthouse.jpg", "a vintage sepia photo of a lighthouse", {"strength": 0.9, "seed": 7}),
    ("house.jpg", "a cottage in deep winter snow, pixel art, 16-bit game", {}),
    ("balloon.jpg", "hot-air balloons in a dream, a fantasy book cover", {"seed": 42}),
]
_PARQUET = [  # image, prompt, caption; the file contains the image bytes
    ("boat.jpg", "a watercolor painting of a sailing boat at sunset", "a sailing boat"),
    ("balloon.jpg", "a stained glass mosaic of a hot-air balloon", "a hot-air balloon"),
    ("cat.jpg", "a pencil sketch of a sitting cat", "a ginger cat"),
]
_SWEEP = [  # image, and the columns of the template "a {animal} as a {style}"
    ("cat.jpg", "cat", "watercolor painting"),
    ("cat.jpg", "fox", "stained glass mosaic"),
    ("cat.jpg", "tiger", "pencil sketch"),
]


def draw(name: str) -> bytes:
    """Return one of `IMAGES` as the bytes of a file: JPEG of quality 85, or PNG.

    Raises:
        KeyError: there is no such image.
    """
    image, buffer = IMAGES[name](), io.BytesIO()
    if name.endswith(".png"):
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=85, optimize=True)
    return buffer.getvalue()


def write_everything(folder: Path) -> None:
    """Write the images and manifests to `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    drawn = {name: draw(name) for name in IMAGES}
    for name, data in drawn.items():
        (folder / "images" / name).write_bytes(data)
    _write_csv(folder / "demo.csv")
    _write_parquet(folder / "demo.parquet", drawn)
    lines = [{"image_url": f"images/{name}", "animal": animal, "style": style} for name, animal, style in _SWEEP]
    (folder / "sweep.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def _write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["id", "image_url", "prompt", "strength", "seed"])
        for name, prompt, own in _DEMO:
            image = f"images/{name}"
            rows.writerow([Path(name).stem, image, prompt, own.get("strength", ""), own.get("seed", "")])


def _write_parquet(path: Path, drawn: dict[str, bytes]) -> None:
    """Write a table with a `{bytes, path}` image column and the feature metadata of Hugging Face `datasets`."""
    features = {
        "image": {"_type": "Image"},
        "prompt": {"dtype": "string", "_type": "Value"},
        "caption": {"dtype": "string", "_type": "Value"},
    }
    images = [{"bytes": _smaller(drawn[name]), "path": name} for name, _, _ in _PARQUET]
    table = pa.table(
        {
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "prompt": [prompt for _, prompt, _ in _PARQUET],
            "caption": [caption for _, _, caption in _PARQUET],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, compression="zstd")


def _smaller(data: bytes) -> bytes:
    """Scale an image to at most 512 px per side, to keep the manifest small."""
    image, buffer = Image.open(io.BytesIO(data)), io.BytesIO()
    image.thumbnail((512, 512), Image.Resampling.LANCZOS)
    image.save(buffer, "JPEG", quality=85, optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    write_everything(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
