"""The echo engine, for rehearsals: it fetches nothing, waits for a set time and returns a small card.

A rehearsal tests rates, budgets and restarts of a batch of any size against a service of known speed. The engine must
therefore cost almost nothing: a fixed card, a bitmap font, a small grey image. The card shows seed and prompt. Its
metadata contains a digest of every input except the image, so two jobs never return equal bytes.
"""

from __future__ import annotations

import hashlib
import io

import anyio
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from batch.fal.endpoint import ImageToImageInput
from batch.server.engines.base import (
    Cancelled,
    EngineCancelled,
    EngineImage,
    EngineInfo,
    EngineJob,
    EngineResult,
    OnStep,
)

__all__ = ["NOTE", "EchoEngine", "draw_card"]

NOTE = "restyle rehearsal card: no model ran"
"""Start of the JPEG comment or PNG text of every card."""
_SLOTS = 32
_CHECK_EVERY = 0.25
"""Seconds between two checks for cancellation; long enough that thousands of jobs can wait at once."""
_WIDTH, _HEIGHT = 192, 112
_PAPER, _CARD, _INK, _FAINT = 214, 255, 24, 120  # grey levels
_LEFT = 12
_LINES, _LETTERS = 4, 28  # space for the prompt: lines, and letters per line
_GLYPH_WIDTH, _GLYPH_HEIGHT = 6, 11

_Grey = NDArray[np.uint8]


def _draw_text(text: str, ink: int, paper: int) -> _Grey:
    """Render a line of text with Pillow's bitmap font, whose letters all have the same width."""
    line = Image.new("L", (_GLYPH_WIDTH * len(text), _GLYPH_HEIGHT), paper)
    ImageDraw.Draw(line).text((0, 0), text, fill=ink, font=ImageFont.load_default_imagefont())
    return np.asarray(line)


_GLYPHS = np.stack([_draw_text(chr(code), _INK, _CARD) for code in range(256)])
"""Pixels of each Latin-1 letter: a lookup costs a fraction of drawing the text."""


def _write(card: _Grey, top: int, pixels: _Grey) -> None:
    card[top : top + _GLYPH_HEIGHT, _LEFT : _LEFT + pixels.shape[1]] = pixels


def _blank() -> _Grey:
    card = np.full((_HEIGHT, _WIDTH), _PAPER, np.uint8)
    card[4:-4, 4:-4] = _FAINT
    card[5:-5, 5:-5] = _CARD
    card[24, _LEFT:-_LEFT] = _FAINT
    _write(card, 10, _draw_text("restyle rehearsal", _FAINT, _CARD))
    return card


_BLANK = _blank()


def draw_card(inputs: ImageToImageInput, seed: int) -> EngineImage:
    """Draw the card of one image: the seed and the start of the prompt, with `?` for letters outside Latin-1."""
    card = _BLANK.copy()
    words = " ".join(inputs.prompt[: 2 * _LINES * _LETTERS].split()).encode("latin-1", "replace")[: _LINES * _LETTERS]
    lines = [words[start : start + _LETTERS] for start in range(0, len(words), _LETTERS)]
    for number, line in enumerate([f"seed {seed}".encode(), *lines]):
        letters = np.frombuffer(line, np.uint8)
        _write(card, 30 + 14 * number, _GLYPHS[letters].transpose(1, 0, 2).reshape(_GLYPH_HEIGHT, -1))
    data = _encode_card(card, inputs.output_format, f"{NOTE}; seed {seed}, input {_digest(inputs, seed)}")
    return EngineImage(data, f"image/{inputs.output_format}", _WIDTH, _HEIGHT)


def _encode_card(card: _Grey, output_format: str, note: str) -> bytes:
    image, buffer = Image.fromarray(card), io.BytesIO()
    if output_format == "png":
        text = PngImagePlugin.PngInfo()
        text.add_text("Comment", note)
        image.save(buffer, "PNG", compress_level=1, pnginfo=text)
    else:
        image.save(buffer, "JPEG", quality=75, comment=note.encode())
    return buffer.getvalue()


def _digest(inputs: ImageToImageInput, seed: int) -> str:
    """Return a digest of the inputs. It excludes the source URL, because every server assigns its own to an upload."""
    parts = (
        inputs.prompt,
        inputs.strength,
        inputs.num_inference_steps,
        inputs.guidance_scale,
        seed,
        inputs.enable_safety_checker,
        inputs.acceleration,
    )
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class EchoEngine:
    """Returns cards after a set time.

    Args:
        service_time: seconds per job, including the drawing (about 0.1 ms per card).
        slots: concurrent jobs; None: 32.
    """

    def __init__(self, service_time: float = 0.0, slots: int | None = None) -> None:
        self._service_time = service_time
        self._slots = _SLOTS if slots is None else slots

    def info(self) -> EngineInfo:
        """Describe the engine."""
        return EngineInfo(
            name="echo",
            model="none (rehearsal: a card with the job's prompt and seed)",
            revision="1",
            safety_checker=None,
            slots=self._slots,
            fetches_source=False,
        )

    async def start(self) -> None:
        """Do nothing."""

    async def aclose(self) -> None:
        """Do nothing."""

    async def generate(self, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        """Wait, then draw `num_images` cards, image i with seed + i.

        Raises:
            EngineCancelled: the job was cancelled; detected within 0.25 s.
        """
        began = anyio.current_time()
        if self._service_time > 0:
            await self._wait(began + self._service_time, cancelled)
        elif cancelled():
            raise EngineCancelled
        seeds = range(job.seed, job.seed + job.input.num_images)
        images = tuple(draw_card(job.input, seed) for seed in seeds)
        on_step(1, 1)
        # The empty tuple means "not checked".
        timings = {"inference": anyio.current_time() - began}
        return EngineResult(images, job.seed, (), timings, job.input.prompt)

    async def _wait(self, until: float, cancelled: Cancelled) -> None:
        while (left := until - anyio.current_time()) > 0:
            if cancelled():
                raise EngineCancelled
            await anyio.sleep(min(left, _CHECK_EVERY))
        if cancelled():
            raise EngineCancelled
