"""The server's side of the flux engine: one worker process per device, each with the whole model. No torch here."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import replace

from batch.errors import InputError
from batch.fal.endpoint import ImageToImageInput
from batch.server.engines.base import (
    Cancelled,
    EngineFailure,
    EngineInfo,
    EngineJob,
    EngineResult,
    OnStep,
    WorkerCrashed,
)
from batch.server.engines.flux.folder import CheckedFolder, check_checker, check_model
from batch.server.engines.flux.hub import CHECKER_FILES, MODEL_FILES, located
from batch.server.engines.flux.options import FluxOptions
from batch.server.engines.process_pool import WorkerPool, WorkerStatistics
from batch.types import JsonObject

__all__ = ["LIBRARIES", "PREPARATION", "FluxEngine", "open_engine"]

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
PREPARATION = EngineJob("preparation", ImageToImageInput(image_url="data:,", prompt="", seed=0))
"""A job without a source image: the worker only loads the model and warms up."""
_RENDERER = "batch.server.engines.flux.renderer:open_renderer"
_log = logging.getLogger(__name__)


def open_engine(options: FluxOptions) -> FluxEngine:
    """Find and check the model, and create the engine. Downloads a missing hub model, which can take an hour.

    Raises:
        InputError: a library is not installed, the download failed, or a folder is invalid.
    """
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"the engine flux needs {', '.join(missing)}: pip install 'restyle-batch[flux]'")
    if options.quantize and importlib.util.find_spec("torchao") is None:
        raise InputError("--quantize fp8 needs torchao: pip install torchao")
    model = located(options.model, MODEL_FILES, check_model)
    checker = None
    if options.safety_checker is not None:
        checker = located(options.safety_checker, CHECKER_FILES, check_checker)
    return FluxEngine(options, model, checker)


class FluxEngine:
    """FLUX.1 [dev] image-to-image with diffusers.

    Args:
        options: the validated flags.
        model: the model folder, checked.
        checker: the folder of the safety checker, checked; None: images are not checked.
        renderer: `module:function` that creates the renderer inside each worker process.
    """

    def __init__(
        self, options: FluxOptions, model: CheckedFolder, checker: CheckedFolder | None, renderer: str = _RENDERER
    ) -> None:
        self._options = options
        self._model = model
        self._checker = checker
        self._revision = f"{model.revision}+{_precision(options)}"
        self._pool = WorkerPool(renderer, [self._arguments(device) for device in options.devices])

    def info(self) -> EngineInfo:
        """Describe the engine."""
        checker = self._checker
        return EngineInfo(
            name=f"flux {self._model.name}@{self._revision}",
            model=f"FLUX.1 [dev]: {self._model.name}",
            revision=self._revision,
            safety_checker=None if checker is None else f"{checker.kind}: {checker.name}@{checker.revision}",
            slots=self._pool.size,
            fetches_source=True,
        )

    def statistics(self) -> WorkerStatistics:
        """Return the counts of worker processes."""
        return self._pool.statistics()

    def pids(self) -> list[int]:
        """Return the process ids of the live workers."""
        return self._pool.pids()

    async def start(self) -> None:
        """Load the model on every device and warm up. Returns when all workers are ready, which can take minutes.

        Raises:
            InputError: a worker failed; the message gives the cause.
        """
        info = self.info()
        _log.info("engine %s on %s", info.name, ", ".join(self._options.devices))
        if info.safety_checker is None:
            _log.warning("no safety checker is loaded: images are not checked")
        try:
            await self._pool.prepare(PREPARATION)
        except EngineFailure as failure:
            raise InputError(failure.message) from failure
        except WorkerCrashed as crash:
            message = f"a worker died while it loaded {self._model.path}: {crash}; see the log lines above"
            raise InputError(message) from crash

    async def aclose(self) -> None:
        """End all workers."""
        await self._pool.aclose()

    async def generate(self, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        """Restyle one image; see `Engine.generate` for the errors."""
        # A job with source None would only prepare the worker.
        return await self._pool.run(replace(job, source=job.source or b""), on_step, cancelled)

    def _arguments(self, device: str) -> JsonObject:
        """Return the arguments of a worker; see `batch.server.engines.flux.loading.Setup`."""
        options, checker = self._options, self._checker
        warm_up = options.warm_up
        if warm_up is None:
            warm_up = () if device == "cpu" else ((1024, 1024),)
        return {
            "folder": str(self._model.path.absolute()),
            "label": f"{self._model.name}, revision {self._revision}",
            "device": device,
            "checker": None if checker is None else str(checker.path.absolute()),
            "checker_kind": "" if checker is None else checker.kind,
            "quantize": options.quantize,
            "offload": options.offload,
            "warm_up": [list(size) for size in warm_up],
        }


def _precision(options: FluxOptions) -> str:
    """Return the precision of the transformer. It is part of the revision, because it changes images slightly."""
    if options.quantize:
        return options.quantize
    return "fp32" if set(options.devices) == {"cpu"} else "bf16"
