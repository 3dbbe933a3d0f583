"""Colour grading by scene (night, sunset, winter, ...) in CIE L*a*b*, and a slight tint per prompt. Pure."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import cv2
import numpy as np

from batch.server.engines.preview.brush import clipped
from batch.server.engines.preview.texture import Array
from batch.server.engines.preview.wording import Scene

__all__ = ["Tint", "graded", "tint_of"]


class Tint(NamedTuple):
    """A colour shift in units of a* and b*."""

    a: float
    b: float


class _Look(NamedTuple):
    """The grading parameters of a scene."""

    gain: float
    lift: float
    shadows: Tint
    lights: Tint
    saturation: float
    weight: float


_LOOKS = {
    Scene.NIGHT: _Look(0.55, -4, Tint(2, -26), Tint(4, -12), 0.85, 0.8),
    Scene.SUNSET: _Look(0.95, 0, Tint(24, 4), Tint(22, 50), 1.2, 0.75),
    Scene.WINTER: _Look(0.85, 38, Tint(-2, -12), Tint(-2, -8), 0.55, 0.7),
    Scene.AUTUMN: _Look(0.97, 2, Tint(14, 18), Tint(12, 36), 1.2, 0.65),
    Scene.FOREST: _Look(0.92, 2, Tint(-22, 10), Tint(-18, 30), 1.1, 0.6),
    Scene.WATER: _Look(0.8, 6, Tint(-8, -26), Tint(-14, -10), 0.9, 0.75),
    Scene.FIRE: _Look(0.85, -4, Tint(30, 20), Tint(20, 48), 1.3, 0.75),
    Scene.MAGIC: _Look(0.84, 2, Tint(40, -56), Tint(26, -16), 1.25, 0.75),
}


def tint_of(prompt: str, rng: np.random.Generator) -> Tint:
    """Return a tint of up to 6 units from the prompt plus 3 from the seed, so that prompts and seeds look different."""
    digest = hashlib.sha256(prompt.encode()).digest()
    by_prompt = ((byte / 255 - 0.5) * 12 for byte in digest[:2])
    return Tint(*(part + rng.uniform(-3, 3) for part in by_prompt))


def graded(image: Array, scene: Scene | None, tint: Tint, amount: float) -> Array:
    """Grade an image for a scene; `amount` goes from 0 (no change) to 1 (full effect)."""
    lab = cv2.cvtColor(image, cv2.COLOR_BGR2LAB).astype(np.float32)
    if scene is not None:
        _relight(lab, _LOOKS[scene], amount)
    lab[..., 1:] += np.array(tint, np.float32) * amount
    return cv2.cvtColor(clipped(lab), cv2.COLOR_LAB2BGR)


def _relight(lab: Array, look: _Look, amount: float) -> None:
    """Shift the colours towards those of the look, in place, interpolated from shadows to lights."""
    weight = look.weight * amount
    light = lab[..., :1] / 255
    target = np.array(look.shadows, np.float32) * (1 - light) + np.array(look.lights, np.float32) * light
    keep = (1 + (look.saturation - 1) * weight) * (1 - 0.55 * weight)
    lab[..., 1:] = 128 + (lab[..., 1:] - 128) * keep + target * weight
    lab[..., 0] = lab[..., 0] * (1 + (look.gain - 1) * weight) + look.lift * weight
