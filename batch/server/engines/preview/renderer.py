"""Render one preview: source bytes and a prompt in, encoded images out. Blocking; runs in a worker process.

The same input and seed produce the same bytes with the same versions of OpenCV and Pillow on the same kind of
processor, independent of earlier jobs and of other load. `num_inference_steps` and `acceleration` have no effect,
because there is no model.
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
"""Start of the JPEG comment or PNG text of every preview."""
_WORK_SIDE_PX = 768
"""Maximum long side at which filters work; the results of larger images are scaled up again."""
_FULL_STRENGTH = 0.9
"""Strength from which the source is no longer blended in. FLUX also changes most of an image from about there."""

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
_GREY = frozenset({Style.PENCIL, Style.VINTAGE})  # a full tint would be visible on their grey paper
_UNGRADED = frozenset({Style.BLUEPRINT})  # its paper is blue in every scene


def restyled(image: Array, prompt: str, seed: int, strength: float, guidance: float) -> Array:
    """Render a uint8 BGR image in the style and light that the prompt names.

    Args:
        image: uint8 BGR, at least 16 px per side.
        prompt: its words select style and scene; any change of the prompt changes the tint.
        seed: any integer; it changes grain, strokes and shades.
        strength: 0 to 1; 0.01 is almost the source, and from 0.9 the source is no longer blended in.
        guidance: 1 to 20; strength of the scene's colours.
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
    """The blocking part of the preview engine."""

    def render(self, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        """Render `num_images` previews, image i with seed + i. Steps: reading, then styling and encoding of each image.

        Raises:
            EngineFailure: the source image cannot be used.
            EngineCancelled: the job was cancelled.
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

        inputs = job.input
        source = cv2.cvtColor(np.asarray(read_source(job.source or b"")), cv2.COLOR_RGB2BGR)
        step()
        images = []
        for seed in range(job.seed, job.seed + inputs.num_images):
            result = restyled(source, inputs.prompt, seed, inputs.strength, inputs.guidance_scale)
            step()
            image = Image.fromarray(cv2.cvtColor(result, cv2.COLOR_BGR2RGB))
            note = f"{NOTE}; style {style_of(inputs.prompt)}, seed {seed}"
            images.append(encode(image, inputs.output_format, note))
            step()
        # The empty tuple means "not checked".
        return EngineResult(tuple(images), job.seed, (), {"inference": time.perf_counter() - began}, inputs.prompt)


def open_renderer() -> PreviewRenderer:
    """Create the renderer of one worker process. OpenCV gets one thread, because the pool has one process per core."""
    cv2.setNumThreads(1)
    cv2.ocl.setUseOpenCL(False)
    # The rounding of Intel's IPP depends on the alignment of buffers, which made some previews differ in a byte.
    cv2.ipp.setUseIPP(False)
    return PreviewRenderer()
