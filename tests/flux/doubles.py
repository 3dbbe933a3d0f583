"""A renderer whose model raises the torch error that the prompt names."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from batch.server.engines.flux.renderer import FluxRenderer, open_renderer

MARKER = "FLUX_TEST_MARKER"
"""Environment variable with the path of a file that exists after the device has been lost once."""
FAULTY = "tests.flux.doubles:open_faulty"


class _Faulty:
    """The real renderer with a hook in its transformer."""

    def __init__(self, renderer: FluxRenderer) -> None:
        self._renderer = renderer
        self._fault = ""
        self._hooked = False

    def render(self, job, on_step, cancelled):
        if not self._hooked:
            self._renderer.model().pipeline.transformer.register_forward_pre_hook(self._fail)
            self._hooked = True
        self._fault = job.input.prompt
        return self._renderer.render(job, on_step, cancelled)

    def _fail(self, *_):
        marker = Path(os.environ[MARKER])
        if self._fault == "lose the device" or (self._fault == "lose the device once" and not marker.exists()):
            marker.touch()
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nSearch for it somewhere")
        if self._fault == "run out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 GiB.\nSee documentation")
        if self._fault == "bug":
            raise ZeroDivisionError("a bug")


def open_faulty(**setup):
    return _Faulty(open_renderer(**setup))
