"""The rehearsal engine: fetches nothing, waits as long as it is told, answers with a small card.

It is there to rehearse a batch of any size (rates, budgets, restarts) against a service of known speed, so it
must cost next to nothing itself: a fixed card, a bitmap font, a small grey picture. The card shows seed and
prompt; its metadata carries a digest of every input but the picture, so that two jobs never give equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import textwrap

import anyio
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from batch.fal.endpoint import ImageToImageInput
from batch.server.engines.base import (
    Cancelled,
    EngineCancelled,
    EngineInfo,
    EngineJob,
    EnginePicture,
    EngineResult,
    OnStep,
)

__all__ = ["NOTE", "EchoEngine", "draw_card"]

NOTE = "restyle rehearsal card: no model ran"
"""Begins the JPEG comment or PNG text of every card."""
_SLOTS = 32
_CHECK_EVERY = 0.25
"""Seconds between two looks at whether the job was told to stop; thousands may wait at once."""
_WIDTH, _HEIGHT = 256, 160
_PAPER, _CARD, _INK, _FAINT = 214, 255, 24, 120  # grey levels
_LINES, _LETTERS = 4, 36  # of the prompt that fit on a card
_FONT = ImageFont.load_default_imagefont()  # a bitmap font: 15 times as fast as drawing outlines


def _blank() -> Image.Image:
    card = Image.new("L", (_WIDTH, _HEIGHT), _PAPER)
    pen = ImageDraw.Draw(card)
    pen.rectangle((8, 8, _WIDTH - 9, _HEIGHT - 9), fill=_CARD, outline=_FAINT)
    pen.text((18, 16), "restyle rehearsal", fill=_FAINT, font=_FONT)
    pen.line((18, 32, _WIDTH - 19, 32), fill=_FAINT)
    return card


_BLANK = _blank()


def draw_card(asked: ImageToImageInput, seed: int) -> EnginePicture:
    """The card of one picture: seed and the beginning of the prompt, `?` for letters beyond Latin-1."""
    card = _BLANK.copy()
    pen = ImageDraw.Draw(card)
    pen.text((18, 42), f"seed {seed}", fill=_INK, font=_FONT)
    words = asked.prompt[: _LINES * _LETTERS].encode("latin-1", "replace").decode("latin-1")
    for number, line in enumerate(textwrap.wrap(words, _LETTERS)[:_LINES]):
        pen.text((18, 64 + 18 * number), line, fill=_INK, font=_FONT)
    note = f"{NOTE}; seed {seed}, input {_digest(asked, seed)}"
    buffer = io.BytesIO()
    if asked.output_format == "png":
        text = PngImagePlugin.PngInfo()
        text.add_text("Comment", note)
        card.save(buffer, "PNG", compress_level=1, pnginfo=text)
    else:
        card.save(buffer, "JPEG", quality=75, comment=note.encode())
    return EnginePicture(buffer.getvalue(), f"image/{asked.output_format}", _WIDTH, _HEIGHT)


def _digest(asked: ImageToImageInput, seed: int) -> str:
    """Of what makes this picture. The source's URL is left out: an upload gets a new one at every server."""
    parts = (
        asked.prompt,
        asked.strength,
        asked.num_inference_steps,
        asked.guidance_scale,
        seed,
        asked.enable_safety_checker,
        asked.acceleration,
    )
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class EchoEngine:
    """Answers each job with cards after a set time.

    Args:
        service_time: seconds a job takes; the drawing, about 0.2 ms a card, is in it.
        slots: jobs at once; None: 32.
    """

    def __init__(self, service_time: float = 0.0, slots: int | None = None) -> None:
        self._service_time = service_time
        self._slots = _SLOTS if slots is None else slots

    def info(self) -> EngineInfo:
        """What this engine is."""
        return EngineInfo(
            name="echo",
            model="none (rehearsal: a card with the job's prompt and seed)",
            revision="1",
            safety_checker=None,
            slots=self._slots,
            fetches_source=False,
        )

    async def start(self) -> None:
        """Nothing to start."""

    async def aclose(self) -> None:
        """Nothing to end."""

    async def generate(self, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        """Wait, then draw `num_images` cards, image i with seed + i.

        Raises:
            EngineCancelled: the job was told to stop; heard within 0.25 s.
        """
        began = anyio.current_time()
        left = self._service_time
        while True:
            if cancelled():
                raise EngineCancelled
            if left <= 0:
                break
            await anyio.sleep(min(left, _CHECK_EVERY))
            left = began + self._service_time - anyio.current_time()
        seeds = range(job.seed, job.seed + job.input.num_images)
        pictures = tuple(draw_card(job.input, seed) for seed in seeds)
        on_step(1, 1)
        # Nothing looked at the content, so there is nothing to say about it.
        timings = {"inference": anyio.current_time() - began}
        return EngineResult(pictures, job.seed, (), timings, job.input.prompt)
