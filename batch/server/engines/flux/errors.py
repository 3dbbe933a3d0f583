"""Classify torch errors by their effect on the request and on the worker. Runs in a worker process."""

from __future__ import annotations

import re
from enum import Enum

__all__ = ["RenderError", "first_line", "render_error_of"]

_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)
_LOST = re.compile(r"(CUDA|HIP)( driver)? error|device-side assert|CUBLAS_STATUS_|CUDNN_STATUS_")


class RenderError(Enum):
    """The class of a torch error."""

    MEMORY = "memory ran out"
    """The request fails; the worker continues."""
    LOST = "the device is lost"
    """Every further call in this process fails: it must exit, and the pool replaces it."""
    OTHER = "something else"
    """Probably a bug in this engine."""


def render_error_of(error: BaseException) -> RenderError:
    """Classify an error by its type, or by the start of its message if torch has no type for it."""
    import torch

    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return RenderError.MEMORY
    if isinstance(error, RuntimeError):
        if _MEMORY.search(text):
            return RenderError.MEMORY
        if isinstance(error, torch.AcceleratorError) or _LOST.match(text):
            return RenderError.LOST
    return RenderError.OTHER


def first_line(error: BaseException) -> str:
    """Return type and first line, at most 300 characters. Torch appends pages of advice."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:300]
