"""Time per full-size FLUX.1 [dev] image: plain diffusers, then the engine with each optimization enabled in turn.

    python -m tests.benchmarks.bench_flux [--images 3] [--seconds 540] [--json FILE]

Needs the extra `flux` and a GPU with 40 GB or more, but no download: the 12 billion weights are random, because their
values do not affect the time. Measures 1024x1024 with the endpoint's defaults (strength 0.95, 40 steps, of which 38 are
executed) and compares the denoising with the device's rate of bf16 matrix products. It can run unattended: if a stage
fails, the error is recorded and the next stage runs; the figures are written after each stage.

Without a GPU a tiny model runs on the CPU, as a test of the script. Those times are meaningless.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxImg2ImgPipeline, FluxTransformer2DModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from batch.fal.endpoint import ImageToImageInput
from batch.server.engines.base import EngineJob
from batch.server.engines.flux import tuning
from batch.server.engines.flux.loading import LoadedModel
from batch.server.engines.flux.restyle import PROMPT_TOKENS, restyle
from tests.flux import tiny

__all__ = ["main", "measure", "render"]

PROMPT = "a cat as a watercolor painting on rough paper, soft light, high detail"
OTHER_SIZE = (768, 1344)
MATRIX = 8192
BARS = (
    ("compiled bf16: speedup over plain diffusers", "at least 1.5x"),
    ("compiled bf16: time over the floor of its steps", "at most 1.6x"),
    ("fp8, one image", "under 4.3 s"),
)

Figures = dict[str, Any]


# --- the model ------------------------------------------------------------------------------------------------


def full_size(device: torch.device) -> FluxImg2ImgPipeline:
    """Build FLUX.1 [dev] from the published configurations, with random bf16 weights; 34 GB."""
    pipeline = tiny.build()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            parts = {
                "transformer": FluxTransformer2DModel(
                    patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
                    num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
                ),
                "vae": AutoencoderKL(
                    in_channels=3, out_channels=3, sample_size=1024, latent_channels=16, norm_num_groups=32,
                    block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                    use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611,
                ),
                "text_encoder": CLIPTextModel(CLIPTextConfig(
                    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                    num_attention_heads=12, projection_dim=768, bos_token_id=0, eos_token_id=2, pad_token_id=1,
                )),
                "text_encoder_2": T5EncoderModel(T5Config(
                    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                    feed_forward_proj="gated-gelu", is_encoder_decoder=False, decoder_start_token_id=0,
                )),
            }  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    parts = {name: part.to(device, torch.bfloat16).eval().requires_grad_(False) for name, part in parts.items()}
    return FluxImg2ImgPipeline(**{**pipeline.components, **parts})


def matrix_rate(device: torch.device) -> float:
    """Measure products of large random bf16 matrices and return the median of 20 in FLOP/s."""
    size = MATRIX if device.type == "cuda" else 256
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        one @ other
    seconds = []
    for _ in range(20):
        with _timed(device, seconds):
            one @ other
    return 2 * size**3 / median(seconds)


def step_flop(pipeline: Any, width: int, height: int) -> float:
    """Return the FLOP of the transformer in one step: matrix products and attention, counted by torch."""
    source = _source(width, height)
    counter = FlopCounterMode(display=False)
    kept = pipeline.transformer.forward

    def counted(*given: Any, **named: Any) -> Any:
        with counter:
            return kept(*given, **named)

    pipeline.transformer.forward = counted
    try:
        _plain(pipeline, source, strength=0.1, num_inference_steps=10)
    finally:
        del pipeline.transformer.forward
    return float(counter.get_total_flops())


# --- the measurement ------------------------------------------------------------------------------------------


def measure(images: int, seconds: float, report: Callable[[Figures], None]) -> Figures:
    """Measure the stages that start within `seconds`; `report` receives all figures after each stage."""
    began = time.perf_counter()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    size = (1024, 1024) if on_gpu else (256, 256)
    figures: Figures = {
        "meaningful": on_gpu,
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU, tiny model: these times are meaningless",
        "torch": torch.__version__,
        "size": list(size),
        "matrix_flops": matrix_rate(device),
        "stages": {},
    }
    report(figures)
    pipeline = full_size(device) if on_gpu else tiny.build()
    pipeline.set_progress_bar_config(disable=True)
    figures["built_s"] = time.perf_counter() - began
    figures["step_flop"] = step_flop(pipeline, *size)
    reference = None
    for name, prepare, inputs in _stages(pipeline, device):
        if time.perf_counter() - began > seconds:
            figures["stages"][name] = {"left_out": "out of time"}
            continue
        try:
            stage, image = _stage(pipeline, device, size, images, prepare, inputs)
        except Exception as error:  # the next stage may work
            figures["stages"][name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[:1]}"}
            with suppress(Exception):  # the attention backend may be the cause
                pipeline.transformer.reset_attention_backend()
            report(figures)
            continue
        reference = image if reference is None else reference
        stage["difference"] = float(np.abs(image.astype(int) - reference.astype(int)).mean())
        if stage.get("denoising") and inputs["acceleration"] == "none":
            stage["share"] = figures["step_flop"] * stage["steps"] / stage["denoising"] / figures["matrix_flops"]
        figures["stages"][name] = stage
        report(figures)
    return figures


def _stages(pipeline: Any, device: torch.device) -> Iterator[tuple[str, Callable[[], object], dict[str, Any]]]:
    """Yield name, function and inputs of each stage.

    The function enables an optimization, which stays enabled. Empty inputs select plain diffusers.
    """
    ours = {"acceleration": "none"}
    yield "plain diffusers, bf16", lambda: None, {}
    yield "the engine, no optimisation", lambda: None, ours
    yield "+ channels-last VAE", lambda: tuning.channels_last(pipeline.vae), ours
    yield "+ fused QKV", lambda: tuning.fuse_projections(pipeline.transformer), ours
    if device.type == "cuda":
        yield "+ fast attention", lambda: tuning.fast_attention(pipeline.transformer), ours
    yield "+ compiled blocks", lambda: tuning.compile_blocks(pipeline.transformer), ours
    if device.type == "cuda":
        yield "the same at another size, first use", lambda: None, {**ours, "size": OTHER_SIZE}
    yield "acceleration regular (uncompiled)", lambda: None, {"acceleration": "regular"}
    yield "acceleration high (uncompiled)", lambda: None, {"acceleration": "high"}
    if device.type == "cuda":
        yield "+ fp8, compiled", lambda: _quantize(pipeline), ours


def _quantize(pipeline: Any) -> None:
    torch._dynamo.reset()
    tuning.quantize_fp8(pipeline.transformer)


def _stage(
    pipeline: Any,
    device: torch.device,
    size: tuple[int, int],
    images: int,
    prepare: Callable[[], object],
    inputs: dict[str, Any],
) -> tuple[Figures, np.ndarray]:
    """Measure one stage; return the medians without the first image, which warms up, and the first image's pixels."""
    prepare()
    width, height = inputs.get("size", size)
    job = _job(width, height, inputs.get("acceleration", "none"))
    source = _source(width, height)
    model = LoadedModel(pipeline, None, device, tuned=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    whole: list[float] = []
    parts: list[dict[str, float]] = []
    shown = None
    for _ in range(images + 1):
        steps: list[tuple[int, int]] = []
        with _timed(device, whole):
            if inputs:
                result = restyle(model, "benchmark", job, lambda *step, to=steps: to.append(step), lambda: False)
                parts.append(result.timings)
            else:
                image = _plain(pipeline, source)
        if shown is None:
            shown = Image.open(io.BytesIO(result.images[0].data)) if inputs else image
    figures: Figures = {"first_s": whole[0], "image_s": median(whole[1:]), "all_s": whole}
    if inputs:
        figures |= {name: median(part[name] for part in parts[1:]) for name in parts[0]}
        figures["steps"] = steps[-1][1]
    if device.type == "cuda":
        figures["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    assert shown is not None
    return figures, np.asarray(shown.convert("RGB").resize(size))


def _plain(pipeline: Any, source: Image.Image, strength: float = 0.95, num_inference_steps: int = 40) -> Image.Image:
    """Call plain diffusers with the endpoint's defaults."""
    return pipeline(
        prompt=PROMPT,
        image=source,
        width=source.width,
        height=source.height,
        strength=strength,
        num_inference_steps=num_inference_steps,
        guidance_scale=3.5,
        max_sequence_length=PROMPT_TOKENS,
        generator=torch.Generator("cpu").manual_seed(1),
    ).images[0]


def _job(width: int, height: int, acceleration: str) -> EngineJob:
    given = {"prompt": PROMPT, "seed": 1, "output_format": "png", "acceleration": acceleration}
    buffer = io.BytesIO()
    _source(width, height).save(buffer, "PNG")
    return EngineJob("benchmark", ImageToImageInput(image_url="data:,", **given), buffer.getvalue())


def _source(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(noise, "RGB").resize((width, height), Image.Resampling.BICUBIC)


@contextmanager
def _timed(device: torch.device, seconds: list[float]) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds.append(time.perf_counter() - began)


# --- output ---------------------------------------------------------------------------------------------------


def render(figures: Figures) -> str:
    """Format the figures as Markdown."""
    stages = figures["stages"]
    width, height = figures["size"]
    rate, flop = figures["matrix_flops"], figures.get("step_flop", 0.0)
    plain = stages.get("plain diffusers, bf16", {}).get("image_s", 0.0)
    lines = [
        f"{figures['device']}, torch {figures['torch']}; {width}x{height}, strength 0.95, 40 steps (38 executed).",
        f"One step is {flop / 1e12:,.1f} TFLOP; bf16 matrix products run at {rate / 1e12:,.0f} TFLOP/s (measured):",
        f"the floor of 38 steps is {38 * flop / rate:,.2f} s.",
        "",
        "| | s per image | denoising, s | share of the matrix rate | speedup | first, s | peak GB | difference |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, stage in stages.items():
        if "image_s" not in stage:
            lines.append(f"| {name} | {stage.get('failed') or stage.get('left_out')} | | | | | | |")
            continue
        cells = [
            f"{stage['image_s']:.2f}",
            f"{stage['denoising']:.2f}" if "denoising" in stage else "",
            f"{stage['share']:.0%}" if "share" in stage else "",
            f"{plain / stage['image_s']:.2f}x" if plain else "",
            f"{stage['first_s']:.1f}",
            f"{stage['peak_gb']:.1f}" if "peak_gb" in stage else "",
            f"{stage['difference']:.2f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "`speedup` and `difference`: over plain diffusers; mean difference per channel (of 255), same seed."]
    return "\n".join([*lines, *_verdicts(figures, plain)])


def _verdicts(figures: Figures, plain: float) -> list[str]:
    """Compare the figures with the limits; without a GPU return a note instead."""
    if not figures["meaningful"]:
        return [
            "",
            "There is no GPU: the tiny model ran on the CPU as a test of this script; the times are meaningless.",
        ]
    compiled = figures["stages"].get("+ compiled blocks", {})
    fp8 = figures["stages"].get("+ fp8, compiled", {})
    floor = 38 * figures["step_flop"] / figures["matrix_flops"]
    found = (
        f"{plain / compiled['image_s']:.2f}x" if plain and "image_s" in compiled else "not measured",
        f"{compiled['image_s'] / floor:.2f}x" if "image_s" in compiled else "not measured",
        f"{fp8['image_s']:.2f} s" if "image_s" in fp8 else "not measured",
    )
    rows = [f"| {what} | {value} | {bar} |" for (what, bar), value in zip(BARS, found, strict=True)]
    return ["", "| | measured | bar (set for an H200) |", "|---|---:|---:|", *rows]


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=3, help="images measured in each stage")
    parser.add_argument("--seconds", type=float, default=540.0, help="start no stage after this time")
    parser.add_argument("--json", type=Path, help="file to which all figures are written after each stage")
    given = parser.parse_args()

    def report(figures: Figures) -> None:
        name, stage = next(reversed(figures["stages"].items()), ("matrix rate", figures["matrix_flops"]))
        sys.stderr.write(f"{name}: {stage}\n")
        if given.json is not None:
            given.json.write_text(json.dumps(figures, indent=1))

    print(render(measure(given.images, given.seconds, report)))


if __name__ == "__main__":
    main()
