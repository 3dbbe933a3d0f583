"""Helpers that render the same image with the engine's renderer and with plain diffusers."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from batch.fal.endpoint import ImageToImageInput
from batch.server.engines.base import EngineJob
from batch.server.engines.flux.loading import Setup
from batch.server.engines.flux.renderer import FluxRenderer

PROMPT = "a cat, watercolor painting"


def opened(folder, checker=None, kind=""):
    """Return a renderer on the CPU."""
    return FluxRenderer(Setup(str(folder), "tiny, revision 1", "cpu", None if checker is None else str(checker), kind))


def photograph(width=256, height=256):
    """Return a deterministic RGB image without flat areas."""
    down, across = np.mgrid[0:height, 0:width]
    channels = (across * 255 / width, down * 255 / height, (across * 7 + down * 3) % 256)
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8), "RGB")


def packed(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def job(source=None, **inputs):
    """Return a request with few steps and lossless output."""
    given = {"prompt": PROMPT, "seed": 5, "num_inference_steps": 10, "output_format": "png", **inputs}
    asked = ImageToImageInput(image_url="https://images.example/cat.png", **given)
    return EngineJob("r1", asked, packed(photograph()) if source is None else source)


def rendered(renderer, given, on_step=lambda *_: None, cancelled=lambda: False):
    return renderer.render(given, on_step, cancelled)


def pixels(loaded):
    """Return the pixels of a result image or of a Pillow image."""
    image = Image.open(io.BytesIO(loaded.data)) if hasattr(loaded, "data") else loaded
    assert image.mode == "RGB"
    return np.asarray(image)


def by_diffusers(pipeline, source, **inputs):
    """Return the pixels of one call of plain diffusers; `source` is RGB at output size."""
    given = job(**inputs).input
    made = pipeline(
        prompt=given.prompt,
        image=source,
        width=source.width,
        height=source.height,
        strength=given.strength,
        num_inference_steps=given.num_inference_steps,
        guidance_scale=given.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(given.seed),
    )
    return np.asarray(made.images[0])
