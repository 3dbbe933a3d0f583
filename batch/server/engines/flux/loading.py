"""From a checked folder to a pipeline on its device, with a line of progress for each part. In a worker process."""

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

__all__ = ["Model", "Setup", "load"]

_log = logging.getLogger(__name__)
_FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True, slots=True)
class Setup:
    """What one worker process is to load. JSON: it comes on the process's command line."""

    folder: str
    label: str
    """Name and revision, for the notes in the images' files."""
    device: str
    checker: str | None = None
    checker_kind: str = ""
    quantize: str | None = None
    offload: str = "none"
    warm_up: tuple[tuple[int, int], ...] = ()


class Model(NamedTuple):
    """A loaded model."""

    pipeline: Any
    """A FluxImg2ImgPipeline that is never called itself: each request calls a shallow copy."""
    checker: Checker | None
    device: Any
    """torch's."""
    tuned: bool


def load(setup: Setup) -> Model:
    """Load what the setup names.

    Raises:
        NotReady: there is no such device, not enough memory, or the files do not load; one sentence.
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
    except Exception as error:  # the boundary to torch and its friends: every fault becomes a sentence
        raise _not_ready(setup, error) from error
    gc.collect()
    _log.info("%s: %s is loaded, %.1f s", setup.device, setup.label, time.perf_counter() - began)
    return Model(pipeline, checker, device, tuned)


def _device(name: str) -> Any:
    """The device of that name.

    Raises:
        NotReady: it is not here.
    """
    import torch

    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.backends.cuda.is_built():
        raise NotReady(
            f"{name} was named, but torch {torch.__version__} has no GPU support; install torch's build for CUDA"
            " (https://pytorch.org/get-started), or say --devices cpu"
        )
    count = torch.cuda.device_count()
    if count == 0:
        raise NotReady(f"{name} was named, but no GPU is visible (nvidia-smi shows what there is); say --devices cpu")
    if device.index >= count:
        raise NotReady(f"{name} was named, but this machine shows {count} GPUs, cuda:0 to cuda:{count - 1}")
    try:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except RuntimeError as error:
        raise NotReady(f"{name} cannot be used ({first_line(error)}); see nvidia-smi, or name other devices") from error
    return device


def _check_fp8(name: str, device: Any) -> None:
    import torch

    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        model = torch.cuda.get_device_name(device)
        raise NotReady(f"{name}, a {model}, does not compute in fp8 (Ada, Hopper and newer do); leave --quantize out")


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
        library.utils.logging.disable_progress_bar()  # dozens a second in a log that nobody watches
    folder = Path(setup.folder)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    parts = {}
    for number, part in enumerate(PARTS, 1):
        size = sum(file.stat().st_size for file in (folder / part).glob("*.safetensors")) / 1e9
        _log.info("%s: loading %s (%d of %d, %.1f GB)", setup.device, part, number, len(PARTS), size)
        loaded = classes[part].from_pretrained(folder / part, local_files_only=True, dtype=dtype).eval()
        # Part by part, so that main memory holds one at most, and a quantized one has shrunk before the next comes.
        parts[part] = loaded.to(device) if setup.offload == "none" else loaded
        if tuned:
            tune(part, loaded, fp8=setup.quantize == "fp8")
    # The published snapshot names FluxPipeline; the parts are the same.
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
            return NotReady(f"{setup.device} has not enough memory for {setup.label} ({first_line(error)}); {advice}")
        case RenderError.LOST:
            return NotReady(
                f"{setup.device} failed while {setup.label} was loaded ({first_line(error)}); see nvidia-smi"
            )
        case _:
            what = f"{setup.folder} cannot be loaded on {setup.device} ({first_line(error)})"
            return NotReady(f"{what}; download it again, or compare the versions of torch, diffusers and transformers")
