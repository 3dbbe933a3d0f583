"""Load a checked folder as a pipeline on a device, and log progress per part. Runs in a worker process."""

from __future__ import annotations

import gc
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from batch.server.engines.base import NotReady
from batch.server.engines.flux.errors import RenderError, first_line, render_error_of
from batch.server.engines.flux.folder import PARTS
from batch.server.engines.flux.safety import Checker, open_checker
from batch.server.engines.flux.tuning import tune

__all__ = ["LoadedModel", "Setup", "load"]

_log = logging.getLogger(__name__)
_FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True, slots=True)
class Setup:
    """Configuration of one worker process. It arrives as JSON on the command line."""

    folder: str
    label: str
    """Model name and revision, for the metadata of the images."""
    device: str
    checker: str | None = None
    checker_kind: str = ""
    quantize: str | None = None
    offload: str = "none"
    warm_up: tuple[tuple[int, int], ...] = ()


class LoadedModel(NamedTuple):
    """A loaded model."""

    pipeline: Any
    """A FluxImg2ImgPipeline. Requests call a shallow copy of it, never the pipeline itself."""
    checker: Checker | None
    device: Any
    """A `torch.device`."""
    tuned: bool
    """Whether the optimizations of `batch.server.engines.flux.tuning` are active."""


def load(setup: Setup) -> LoadedModel:
    """Load the model and the safety checker.

    Raises:
        NotReady: the device is unavailable, memory ran out, or the files cannot be loaded.
    """
    began = time.perf_counter()
    device = _device(setup.device)
    if setup.quantize == "fp8":
        _check_fp8(setup.device, device)
    tuned = device.type != "cpu" and setup.offload == "none"
    try:
        pipeline = _pipeline(setup, device, tuned=tuned)
        checker = None
        if setup.checker is not None:
            checker = open_checker(Path(setup.checker), setup.checker_kind, device)
    except Exception as error:  # the boundary to torch, diffusers and transformers: any error becomes one message
        raise _not_ready(setup, error) from error
    gc.collect()
    _log.info("%s: %s is loaded, %.1f s", setup.device, setup.label, time.perf_counter() - began)
    return LoadedModel(pipeline, checker, device, tuned)


def _device(name: str) -> Any:
    """Return the device with that name.

    Raises:
        NotReady: it is unavailable.
    """
    import torch

    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.backends.cuda.is_built():
        raise NotReady(
            f"device {name} is unavailable: torch {torch.__version__} has no GPU support; install the CUDA build of"
            " torch (https://pytorch.org/get-started), or use --devices cpu"
        )
    count = torch.cuda.device_count()
    if count == 0:
        raise NotReady(f"device {name} is unavailable: no GPU is visible; check nvidia-smi, or use --devices cpu")
    if device.index >= count:
        raise NotReady(f"device {name} is unavailable: this machine has {count} GPUs, cuda:0 to cuda:{count - 1}")
    try:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except RuntimeError as error:
        reason = first_line(error)
        raise NotReady(f"device {name} is unavailable: {reason}; check nvidia-smi, or use other --devices") from error
    return device


def _check_fp8(name: str, device: Any) -> None:
    import torch

    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        model = torch.cuda.get_device_name(device)
        raise NotReady(f"{name} ({model}) does not support fp8 (Ada, Hopper or newer required); omit --quantize")


def _pipeline(setup: Setup, device: Any, *, tuned: bool) -> Any:
    import diffusers
    import torch
    import transformers

    classes = {
        "transformer": diffusers.FluxTransformer2DModel,
        "text_encoder_2": transformers.T5EncoderModel,
        "text_encoder": transformers.CLIPTextModel,
        "vae": diffusers.AutoencoderKL,
    }
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # it would fill the log
    folder = Path(setup.folder)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    parts = {}
    for number, part in enumerate(PARTS, 1):
        size = sum(file.stat().st_size for file in (folder / part).glob("*.safetensors")) / 1e9
        _log.info("%s: loading %s (%d of %d, %.1f GB)", setup.device, part, number, len(PARTS), size)
        loaded = classes[part].from_pretrained(folder / part, local_files_only=True, dtype=dtype).eval()
        # Move and quantize each part before the next one is loaded: main memory then holds one part at a time.
        parts[part] = loaded.to(device) if setup.offload == "none" else loaded
        if tuned:
            tune(part, loaded, fp8=setup.quantize == "fp8")
    # The published snapshot names FluxPipeline, which has the same parts.
    pipeline = diffusers.FluxImg2ImgPipeline.from_pretrained(folder, local_files_only=True, dtype=dtype, **parts)
    pipeline.set_progress_bar_config(disable=True)
    if setup.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif setup.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    return pipeline


def _not_ready(setup: Setup, error: Exception) -> NotReady:
    match render_error_of(error):
        case RenderError.MEMORY:
            advice = "use a machine with more memory"
            if setup.device != "cpu":
                advice = "free the GPU, or try --quantize fp8, --offload model or --offload sequential"
            problem = f"{setup.device} has too little memory for {setup.label} ({first_line(error)})"
        case RenderError.LOST:
            problem = f"{setup.device} failed while it loaded {setup.label} ({first_line(error)})"
            advice = "check nvidia-smi"
        case _:
            problem = f"cannot load {setup.folder} on {setup.device} ({first_line(error)})"
            advice = "download it again, or check the versions of torch, diffusers and transformers"
    return NotReady(f"{problem}; {advice}")
