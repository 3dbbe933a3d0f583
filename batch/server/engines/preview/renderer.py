"""One preview: source bytes and a prompt in, encoded images out. Blocking; runs inside a worker process.

The same input and seed give the same bytes (with the same versions of OpenCV and Pillow, on the same kind of
processor), whatever was rendered before and whatever else the machine does. `num_inference_steps` and `acceleration`
mean nothing here: there is no model that they could steer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

import cv2
import numpy as np
from PIL import Image

from batch.server.engines.base import Cancelled, EngineCancelled, EngineJob, EngineResult, OnStep
from batch.server.engines.images import encode, read_source
from batch.server.engines.preview import graphic, painted
from batch.server.engines.preview.brush import clipped
from batch.server.engines.preview.grade import Tint, graded, tint_of
from batch.server.engines.preview.texture import Array, generator
from batch.server.engines.preview.wording import Style, scene_of, style_of

__all__ = ["NOTE", "STYLES", "PreviewRenderer", "open_renderer", "restyled"]

NOTE = "restyle preview: no model ran"
"""Begins the JPEG comment or PNG text of every preview."""
_WORK_SIDE_PX = 768
"""Filters work at this long side at most; larger images are scaled back up."""
_FULL_STRENGTH = 0.9
"""From here on nothing of the source shines through; FLUX too changes most of an image there."""

_Filter: TypeAlias = Callable[[Array, np.random.Generator, float], Array]
STYLES: dict[Style, _Filter] = {
    Style.PIXEL: graphic.pixel,
    Style.MOSAIC: graphic.mosaic,
    Style.BLUEPRINT: graphic.blueprint,
    Style.PENCIL: painted.pencil,
    Style.POPART: graphic.popart,
    Style.CARTOON: graphic.cartoon,
    Style.WATERCOLOR: painted.watercolor,
    Style.NEON: graphic.neon,
    Style.VINTAGE: painted.vintage,
    Style.OIL: painted.oil,
    Style.PAINTERLY: painted.painterly,
}
_GREY = frozenset({Style.PENCIL, Style.VINTAGE})  # a tint that colours hide would dye their paper
_UNGRADED = frozenset({Style.BLUEPRINT})  # drafting paper is blue, whatever the weather


def restyled(image: Array, prompt: str, seed: int, strength: float, guidance: float) -> Array:
    """A uint8 BGR image in the style and light that the prompt names.

    Args:
        image: uint8 BGR, any size from 16 px a side.
        prompt: its words choose style and scene; any change of it changes the tint.
        seed: any integer; another one gives other grain, strokes and shades.
        strength: 0 to 1; 0.01 is all but the source, from 0.9 on nothing of the source shines through.
        guidance: 1 to 20; how strongly the scene colours the image.
    """
    rng = generator(seed, prompt)
    style, tint = style_of(prompt), tint_of(prompt, rng)
    height, width = image.shape[:2]
    scale = min(1.0, _WORK_SIDE_PX / max(height, width))
    small = image
    if scale < 1:
        shape = max(1, round(width * scale)), max(1, round(height * scale))
        small = cv2.resize(image, shape, interpolation=cv2.INTER_AREA)
    result = STYLES[style](small, rng, max(0.15, strength))
    if style not in _UNGRADED:
        tint = Tint(tint.a * 0.25, tint.b * 0.25) if style in _GREY else tint
        result = graded(result, scene_of(prompt), tint, strength * (0.75 + 0.5 * min(guidance, 20) / 20))
    if scale < 1:
        blocky = cv2.INTER_NEAREST if style is Style.PIXEL else cv2.INTER_CUBIC
        result = cv2.resize(result, (width, height), interpolation=blocky)
    share = min(1.0, strength / _FULL_STRENGTH) ** 1.2
    if share < 1:
        result = clipped(image * (1 - share) + result * share + 0.5)
    return result


class PreviewRenderer:
    """The preview engine's blocking part."""

    def render(self, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        """Make `num_images` previews, image i with seed + i. Steps: reading, then styling and encoding of each.

        Raises:
            EngineFailure: the source is no usable image.
            EngineCancelled: the job was told to stop.
        """
        began = time.perf_counter()
        total = 1 + 2 * job.input.num_images
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            on_step(done, total)
            if cancelled():
                raise EngineCancelled

        asked = job.input
        source = cv2.cvtColor(np.asarray(read_source(job.source or b"")), cv2.COLOR_RGB2BGR)
        step()
        images = []
        for seed in range(job.seed, job.seed + asked.num_images):
            result = restyled(source, asked.prompt, seed, asked.strength, asked.guidance_scale)
            step()
            image = Image.fromarray(cv2.cvtColor(result, cv2.COLOR_BGR2RGB))
            note = f"{NOTE}; style {style_of(asked.prompt)}, seed {seed}"
            images.append(encode(image, asked.output_format, note))
            step()
        # Nothing looked at the content, so there is nothing to say about it.
        return EngineResult(tuple(images), job.seed, (), {"inference": time.perf_counter() - began}, asked.prompt)


def open_renderer() -> PreviewRenderer:
    """The renderer of one worker process; OpenCV is held to one core, the pool uses the others."""
    cv2.setNumThreads(1)
    cv2.ocl.setUseOpenCL(False)
    # Intel's primitives round by where a buffer lies in memory: the same preview had another byte now and then.
    cv2.ipp.setUseIPP(False)
    return PreviewRenderer()
