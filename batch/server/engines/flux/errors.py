"""What an error of torch means for the request and for the worker. Runs inside a worker process."""

from __future__ import annotations

import re
from enum import Enum

__all__ = ["RenderError", "first_line", "render_error_of"]

_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)
_LOST = re.compile(r"(CUDA|HIP)( driver)? error|device-side assert|CUBLAS_STATUS_|CUDNN_STATUS_")


class RenderError(Enum):
    """What follows."""

    MEMORY = "memory ran out"
    """This request fails; the worker goes on with others."""
    LOST = "the device is lost"
    """Nothing works in this process any more: it leaves, and another one takes its place."""
    OTHER = "something else"
    """A defect, most likely ours."""


def render_error_of(error: BaseException) -> RenderError:
    """The meaning of an error. By its type where torch has one for it, else by the words that torch begins it with."""
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
    """Type and first line, 300 characters at most: torch appends pages of advice."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:300]
