"""One request on a loaded model: source bytes and a prompt in, encoded images out. In a worker process.

Owns what the endpoint's inputs mean to diffusers. On a CPU and without acceleration the images are, number by
number, those of a plain `FluxImg2ImgPipeline` called with the same values.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from batch.server.engines.base import Cancelled, EngineCancelled, EngineJob, EngineResult, OnStep
from batch.server.engines.flux.loading import Model
from batch.server.engines.flux.tuning import accelerated
from batch.server.engines.images import encode, read_source

__all__ = ["NOTE", "PROMPT_TOKENS", "restyle"]

NOTE = "restyle flux"
"""Begins the JPEG comment or PNG text of every image."""
PROMPT_TOKENS = 512
"""T5 tokens that a prompt is padded or cut to; part of the result, since the padding is attended to as well."""


@dataclass(slots=True)
class _Laps:
    """Seconds by what they were spent on. A GPU is waited for at the end of each."""

    device: Any
    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    def end(self, name: str) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


class _Steps:
    """Follows one image after the other from step to step; raises where the job was told to stop."""

    def __init__(self, count: int, laps: _Laps, on_step: OnStep, cancelled: Cancelled) -> None:
        self._count = count
        self._laps = laps
        self._on_step = on_step
        self._cancelled = cancelled
        self._done = 0
        self._ahead: Any = None

    def __call__(self, pipeline: Any, step: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's `callback_on_step_end`. A stop is raised: `_interrupt` would give a half-noisy image."""
        self._keep_pace()
        self._done += 1
        # An image's number of steps is known only now: it depends on strength, and diffusers' rounding is the truth.
        self._on_step(self._done, pipeline.num_timesteps * self._count)
        if self._cancelled():
            raise EngineCancelled
        if step == pipeline.num_timesteps - 1:
            self._laps.end("denoising")
        return values

    def _keep_pace(self) -> None:
        """Steps are queued far sooner than a GPU works them off: wait for the one before, so that a cancel is real."""
        if self._laps.device.type != "cuda":
            return
        import torch

        event = torch.cuda.Event()
        event.record()
        if self._ahead is not None:
            self._ahead.synchronize()
        self._ahead = event


def restyle(model: Model, label: str, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
    """Make `num_images` images, image i with seed + i, each as if it were the only one.

    Args:
        model: where.
        label: name and revision of the model, for the notes in the files.
        job: with its source.
        on_step: told after each denoising step of each rendered.
        cancelled: asked after each.

    Raises:
        EngineFailure: the source is no usable rendered.
        EngineCancelled: the job was told to stop.
    """
    import torch

    if cancelled():
        raise EngineCancelled
    asked = job.input
    seeds = range(job.seed, job.seed + asked.num_images)
    laps = _Laps(model.device)
    source = read_source(job.source or b"")
    laps.end("reading")
    pipeline = _for_one_request(model.pipeline)
    with torch.no_grad():
        prompt, pooled, _ = pipeline.encode_prompt(asked.prompt, prompt_2=None, max_sequence_length=PROMPT_TOKENS)
    laps.end("prompt")
    steps = _Steps(asked.num_images, laps, on_step, cancelled)
    images = []
    for seed in seeds:
        with accelerated(pipeline.transformer, asked.acceleration):
            made = pipeline(
                prompt_embeds=prompt,
                pooled_prompt_embeds=pooled,
                image=source,
                width=source.width,
                height=source.height,
                strength=asked.strength,
                num_inference_steps=asked.num_inference_steps,
                guidance_scale=asked.guidance_scale,
                max_sequence_length=PROMPT_TOKENS,
                # On the CPU whatever the device: the same seed then starts from the same noise everywhere.
                generator=torch.Generator("cpu").manual_seed(seed),
                callback_on_step_end=steps,
            )
        images.append(made.images[0])
        laps.end("decoding")
    model.pipeline.maybe_free_model_hooks()  # of the one that knows what is offloaded
    flags = _flags(model, job, images)
    laps.end("checking")
    inference = sum(seconds for name, seconds in laps.seconds.items() if name != "reading")
    encoded = []
    for number, (rendered, seed) in enumerate(zip(images, seeds, strict=True)):
        flagged = bool(flags) and flags[number]
        shown = Image.new("RGB", rendered.size) if flagged else rendered
        note = f"{NOTE}: FLUX.1 [dev], {label}, seed {seed}" + ("; blackened by the safety checker" if flagged else "")
        encoded.append(encode(shown, asked.output_format, note))
    laps.end("encoding")
    return EngineResult(tuple(encoded), job.seed, flags, {"inference": inference, **laps.seconds}, asked.prompt)


def _flags(model: Model, job: EngineJob, images: list[Image.Image]) -> tuple[bool, ...]:
    """One per image; empty where nothing was looked at."""
    if model.checker is None or not job.input.enable_safety_checker:
        return ()
    return tuple(model.checker.flags(images))


def _for_one_request(pipeline: Any) -> Any:
    """A pipeline of the same parts with a scheduler of its own: that is where a request's state is. About 1 ms."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    fresh = type(pipeline)(**{**pipeline.components, "scheduler": scheduler})
    fresh.set_progress_bar_config(disable=True)
    return fresh
