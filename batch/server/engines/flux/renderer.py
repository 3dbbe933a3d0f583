"""The blocking part of the flux engine: one worker process with one model on one device.

Decides when the model is loaded, and how an error affects the request and this process. Importing this module needs no
torch and no diffusers.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import sys
import time
import traceback
from dataclasses import replace
from typing import Any, NoReturn

from PIL import Image

from batch.fal.endpoint import ImageToImageInput
from batch.server.engines.base import (
    Cancelled,
    EngineError,
    EngineFailure,
    EngineJob,
    EngineResult,
    NotReady,
    OnStep,
)
from batch.server.engines.flux.errors import RenderError, first_line, render_error_of
from batch.server.engines.flux.loading import LoadedModel, Setup, load
from batch.server.engines.flux.restyle import restyle
from batch.server.engines.flux.tuning import untune

__all__ = ["LOST", "FluxRenderer", "open_renderer"]

LOST = 70
"""Exit status of a process that lost its device."""
_log = logging.getLogger(__name__)


class FluxRenderer:
    """Renders requests. The first job loads the model.

    At startup the engine sends a job without a source, which only loads the model and warms up; its result shows
    whether this worker can work. A replacement worker loads the model with its first request.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._model: LoadedModel | None = None

    def render(self, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        """Render the images of one request. A job without a source only loads the model and warms up.

        Raises:
            EngineFailure: the source image cannot be used, memory ran out, or the model failed.
            NotReady: the model cannot be loaded, or the warm-up failed.
            EngineCancelled: the job was cancelled.
        """
        began, loads = time.perf_counter(), self._model is None
        model = self.model()
        loading = {"loading": time.perf_counter() - began} if loads else {}
        if job.source is None:
            return EngineResult((), job.seed, (), {"inference": 0.0, **loading}, "")
        result = self._restyle(model, job, on_step, cancelled)
        return replace(result, timings={**result.timings, **loading})

    def model(self) -> LoadedModel:
        """Return the model; load it and warm up on the first call.

        Raises:
            NotReady: the model cannot be loaded, or the warm-up failed.
        """
        if self._model is None:
            self._model = self._warm(load(self._setup))
        return self._model

    def _warm(self, model: LoadedModel) -> LoadedModel:
        """Render each size once, because the first image of a size triggers compilation, planning and allocation."""
        for width, height in self._setup.warm_up:
            began = time.perf_counter()
            job = _blank(width, height)
            try:
                restyle(model, self._setup.label, job, lambda *_: None, lambda: False)
            except Exception as error:
                if render_error_of(error) is not RenderError.OTHER or not model.tuned:
                    raise NotReady(self._message(error, "the warm-up")) from error
                # The compiler or a kernel does not work on this machine: continue without it, more slowly.
                _log.warning("%s: running without compiled blocks: %s", self._setup.device, first_line(error))
                untune(model.pipeline.transformer)
                return self._warm(model._replace(tuned=False))
            seconds = time.perf_counter() - began
            _log.info("%s: warm-up at %dx%d took %.1f s", self._setup.device, width, height, seconds)
        return model

    def _restyle(self, model: LoadedModel, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        """Render one request and convert errors of torch."""
        try:
            return restyle(model, self._setup.label, job, on_step, cancelled)
        except EngineError:
            raise
        except Exception as error:  # the boundary to torch
            kind = render_error_of(error)
            if kind is RenderError.LOST:
                self._exit(error)
            if kind is RenderError.OTHER:
                traceback.print_exc()  # probably a bug: the traceback belongs in the log, not in the response
            message = self._message(error, "a request")
        # After the except block, because the frames of the error hold references to the memory to be freed.
        _free(model)
        retryable = kind is RenderError.MEMORY
        raise EngineFailure(500, "internal_server_error", message, loc=("body",), retryable=retryable)

    def _message(self, error: Exception, phase: str) -> str:
        """Describe an error of torch for users."""
        device = self._setup.device
        match render_error_of(error):
            case RenderError.MEMORY:
                offload = device != "cpu" and self._setup.offload == "none"
                advice = "use a smaller image" + (" or --offload model" if offload else "")
                return f"{device} ran out of memory during {phase} ({first_line(error)}); {advice}"
            case RenderError.LOST:
                return f"{device} was lost during {phase} ({first_line(error)}); check nvidia-smi"
            case _:
                return f"the model failed during {phase} ({first_line(error)})"

    def _exit(self, error: Exception) -> NoReturn:
        """End this process, because every further call on a lost device fails. The pool starts another process."""
        sys.stderr.write(f"{self._message(error, 'a request')}; this worker exits and is replaced\n")
        sys.stderr.flush()
        os._exit(LOST)


def open_renderer(**setup: Any) -> FluxRenderer:
    """Create the renderer of one worker process. The arguments are the fields of `Setup`."""
    # Set before the libraries are imported. All files are local, so the worker must not depend on the hub.
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ[name] = "1"
    # For the CPU: otherwise MKL's rounding depends on buffer alignment, and a seed does not reproduce its image.
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    sizes = tuple((int(width), int(height)) for width, height in setup.pop("warm_up", ()))
    return FluxRenderer(Setup(**setup, warm_up=sizes))


def _free(model: LoadedModel) -> None:
    model.pipeline.maybe_free_model_hooks()
    gc.collect()
    if model.device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def _blank(width: int, height: int) -> EngineJob:
    """Return a request of two steps for a grey image."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "grey").save(buffer, "PNG")
    inputs = ImageToImageInput(image_url="data:,", prompt="", strength=0.2, num_inference_steps=10, seed=0)
    return EngineJob("warm-up", inputs, buffer.getvalue())
