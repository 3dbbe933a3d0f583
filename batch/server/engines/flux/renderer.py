"""The flux engine's blocking part: one worker process with one model on one device.

Owns when the model is loaded, and what an error of it means to the request and to this process. Importing it needs
no library of the model's own.
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
from batch.server.engines.flux.loading import Model, Setup, load
from batch.server.engines.flux.restyle import restyle
from batch.server.engines.flux.tuning import untune

__all__ = ["LOST", "FluxRenderer", "open_renderer"]

LOST = 70
"""Exit status of a process whose device is lost."""
_log = logging.getLogger(__name__)


class FluxRenderer:
    """Renders requests on a model that the first of them loads.

    The engine sends a job without a source ahead of all others: it only loads and warms up, and so tells the engine
    whether this worker can work. A worker that replaces another loads with its first request.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._model: Model | None = None

    def render(self, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        """Make the images of one request, or, without a source, get ready.

        Raises:
            EngineFailure: the source is no usable image, or memory ran out.
            NotReady: the model cannot be loaded, or not be used.
            EngineCancelled: the job was told to stop.
        """
        began, loads = time.perf_counter(), self._model is None
        model = self.model()
        loading = {"loading": time.perf_counter() - began} if loads else {}
        if job.source is None:
            return EngineResult((), job.seed, (), {"inference": 0.0, **loading}, "")
        result = self._guarded(model, job, on_step, cancelled)
        return replace(result, timings={**result.timings, **loading})

    def model(self) -> Model:
        """The loaded and warm model; loads it where it is not.

        Raises:
            NotReady: it cannot be loaded, or not be used.
        """
        if self._model is None:
            self._model = self._warm(load(self._setup))
        return self._model

    def _warm(self, model: Model) -> Model:
        """Render each size once, for what is compiled, planned and allocated at the first image."""
        for width, height in self._setup.warm_up:
            began = time.perf_counter()
            job = _blank(width, height)
            try:
                restyle(model, self._setup.label, job, lambda *_: None, lambda: False)
            except Exception as error:
                if render_error_of(error) is not RenderError.OTHER or not model.tuned:
                    raise NotReady(self._said(error, "the warm-up")) from error
                # A compiler or a kernel that does not suit this machine: slower is better than not at all.
                _log.warning("%s: without compiled blocks: %s", self._setup.device, first_line(error))
                untune(model.pipeline.transformer)
                return self._warm(model._replace(tuned=False))
            _log.info("%s: warm at %dx%d, %.1f s", self._setup.device, width, height, time.perf_counter() - began)
        return model

    def _guarded(self, model: Model, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        try:
            return restyle(model, self._setup.label, job, on_step, cancelled)
        except EngineError:
            raise
        except Exception as error:  # the boundary to torch: what it means is decided here
            trouble = render_error_of(error)
            if trouble is RenderError.LOST:
                self._leave(error)
            if trouble is RenderError.OTHER:
                traceback.print_exc()  # a defect: its trace belongs into the log, not into the answer
            message = self._said(error, "a request")
        # Outside of the except block: the error's frames held what is to be freed.
        _free(model)
        retryable = trouble is RenderError.MEMORY
        raise EngineFailure(500, "internal_server_error", message, loc=("body",), retryable=retryable)

    def _said(self, error: Exception, what: str) -> str:
        """The sentence that a person reads."""
        device = self._setup.device
        match render_error_of(error):
            case RenderError.MEMORY:
                offload = device != "cpu" and self._setup.offload == "none"
                advice = "a smaller image needs less" + (", and so does --offload model" if offload else "")
                return f"{device} ran out of memory in {what} ({first_line(error)}); {advice}"
            case RenderError.LOST:
                return f"{device} was lost in {what} ({first_line(error)}); see nvidia-smi"
            case _:
                return f"the model failed in {what} ({first_line(error)})"

    def _leave(self, error: Exception) -> NoReturn:
        """End this process: after such an error every further call fails. The pool starts another one."""
        sys.stderr.write(f"{self._said(error, 'a request')}; this worker leaves, another one is tried\n")
        sys.stderr.flush()
        os._exit(LOST)


def open_renderer(**setup: Any) -> FluxRenderer:
    """The renderer of one worker process; see `Setup` for what it takes."""
    # Before anything imports them. All that is needed lies on the disk: a hub that cannot be reached must not matter.
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ[name] = "1"
    # On the CPU: MKL else rounds by how a buffer is aligned, and one seed gives one image on the next try, not on this.
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    sizes = tuple((int(width), int(height)) for width, height in setup.pop("warm_up", ()))
    return FluxRenderer(Setup(**setup, warm_up=sizes))


def _free(model: Model) -> None:
    model.pipeline.maybe_free_model_hooks()
    gc.collect()
    if model.device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def _blank(width: int, height: int) -> EngineJob:
    """A request of two steps for a grey image."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "grey").save(buffer, "PNG")
    asked = ImageToImageInput(image_url="data:,", prompt="", strength=0.2, num_inference_steps=10, seed=0)
    return EngineJob("warm-up", asked, buffer.getvalue())
