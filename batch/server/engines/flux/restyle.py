"""Render one request on a loaded model: source bytes and a prompt in, encoded images out. Runs in a worker process.

Owns the mapping of the endpoint's inputs to diffusers. On a CPU and without acceleration the pixels equal those of a
plain `FluxImg2ImgPipeline` called with the same values.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from batch.server.engines.base import Cancelled, EngineCancelled, EngineJob, EngineResult, OnStep
from batch.server.engines.flux.loading import LoadedModel
from batch.server.engines.flux.tuning import accelerated
from batch.server.engines.images import encode, read_source

__all__ = ["NOTE", "PROMPT_TOKENS", "restyle"]

NOTE = "restyle flux"
"""Start of the JPEG comment or PNG text of every image."""
PROMPT_TOKENS = 512
"""T5 tokens to which a prompt is padded or truncated. It affects the images, because attention includes the padding."""


@dataclass(slots=True)
class _Timer:
    """Seconds per phase. The end of a phase waits for the GPU."""

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
    """Counts steps across the images of a request; raises `EngineCancelled` if the job is cancelled."""

    def __init__(self, count: int, timer: _Timer, on_step: OnStep, cancelled: Cancelled) -> None:
        self._count = count
        self._timer = timer
        self._on_step = on_step
        self._cancelled = cancelled
        self._done = 0
        self._previous_step: Any = None

    def __call__(self, pipeline: Any, step: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
        """Handle the pipeline's `callback_on_step_end`. Its `_interrupt` flag would return a half-noisy image."""
        self._wait_for_previous_step()
        self._done += 1
        # The number of steps depends on strength and on diffusers' rounding, so it is known only now.
        self._on_step(self._done, pipeline.num_timesteps * self._count)
        if self._cancelled():
            raise EngineCancelled
        if step == pipeline.num_timesteps - 1:
            self._timer.end("denoising")
        return values

    def _wait_for_previous_step(self) -> None:
        """Wait for the previous step: steps are queued faster than a GPU runs them, which would delay cancellation."""
        if self._timer.device.type != "cuda":
            return
        import torch

        event = torch.cuda.Event()
        event.record()
        if self._previous_step is not None:
            self._previous_step.synchronize()
        self._previous_step = event


def restyle(model: LoadedModel, label: str, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
    """Render `num_images` images. Image i uses seed + i and equals the single image of that seed.

    Args:
        model: the loaded model.
        label: name and revision of the model, for the metadata of the images.
        job: a job with a source.
        on_step: called after each denoising step of each image.
        cancelled: called after each of these steps.

    Raises:
        EngineFailure: the source image cannot be used.
        EngineCancelled: the job was cancelled.
    """
    import torch

    if cancelled():
        raise EngineCancelled
    inputs = job.input
    seeds = range(job.seed, job.seed + inputs.num_images)
    timer = _Timer(model.device)
    source = read_source(job.source or b"")
    timer.end("reading")
    pipeline = _copy_with_new_scheduler(model.pipeline)
    with torch.no_grad():
        prompt, pooled, _ = pipeline.encode_prompt(inputs.prompt, prompt_2=None, max_sequence_length=PROMPT_TOKENS)
    timer.end("prompt")
    steps = _Steps(inputs.num_images, timer, on_step, cancelled)
    images = []
    for seed in seeds:
        with accelerated(pipeline.transformer, inputs.acceleration):
            made = pipeline(
                prompt_embeds=prompt,
                pooled_prompt_embeds=pooled,
                image=source,
                width=source.width,
                height=source.height,
                strength=inputs.strength,
                num_inference_steps=inputs.num_inference_steps,
                guidance_scale=inputs.guidance_scale,
                max_sequence_length=PROMPT_TOKENS,
                # Always on the CPU, so that a seed starts from the same noise on every device.
                generator=torch.Generator("cpu").manual_seed(seed),
                callback_on_step_end=steps,
            )
        images.append(made.images[0])
        timer.end("decoding")
    model.pipeline.maybe_free_model_hooks()  # the copy does not know what is offloaded
    flags = _flags(model, job, images)
    timer.end("checking")
    inference = sum(seconds for name, seconds in timer.seconds.items() if name != "reading")
    encoded = []
    for number, (rendered, seed) in enumerate(zip(images, seeds, strict=True)):
        flagged = bool(flags) and flags[number]
        image = Image.new("RGB", rendered.size) if flagged else rendered
        note = f"{NOTE}: FLUX.1 [dev], {label}, seed {seed}" + ("; blackened by the safety checker" if flagged else "")
        encoded.append(encode(image, inputs.output_format, note))
    timer.end("encoding")
    return EngineResult(tuple(encoded), job.seed, flags, {"inference": inference, **timer.seconds}, inputs.prompt)


def _flags(model: LoadedModel, job: EngineJob, images: list[Image.Image]) -> tuple[bool, ...]:
    """Return one flag per image; empty if no checker ran."""
    if model.checker is None or not job.input.enable_safety_checker:
        return ()
    return tuple(model.checker.flags(images))


def _copy_with_new_scheduler(pipeline: Any) -> Any:
    """Return a pipeline with the same parts and a new scheduler, which holds the state of a request. Takes 1 ms."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    fresh = type(pipeline)(**{**pipeline.components, "scheduler": scheduler})
    fresh.set_progress_bar_config(disable=True)
    return fresh
