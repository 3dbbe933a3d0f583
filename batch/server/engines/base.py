"""The interface that all engines implement. Pure: independent of libraries, processes and HTTP.

An engine runs one job per slot at a time. It returns images or raises one of these errors:

    EngineError
    ├── EngineFailure     the job failed with a model error, which clients see
    │   └── NotReady      the worker cannot run any job: its model or device is unavailable
    ├── EngineCancelled   the job was cancelled and has stopped
    └── WorkerCrashed     the worker process died; the job can be retried
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from batch.fal.endpoint import ImageToImageInput
from batch.types import JsonObject

__all__ = [
    "Cancelled",
    "Engine",
    "EngineCancelled",
    "EngineError",
    "EngineFailure",
    "EngineImage",
    "EngineInfo",
    "EngineJob",
    "EngineResult",
    "NotReady",
    "OnStep",
    "WorkerCrashed",
]

OnStep: TypeAlias = Callable[[int, int], None]
"""Progress callback: (steps done, total steps), called after each completed step of a job."""
Cancelled: TypeAlias = Callable[[], bool]
"""Return whether the job is cancelled; the engine calls it between steps."""


@dataclass(frozen=True, slots=True)
class EngineJob:
    """One request, ready for execution."""

    request_id: str
    input: ImageToImageInput
    """The validated inputs. The seed is always set: the endpoint draws one when the request has none."""
    source: bytes | None = field(default=None, repr=False)
    """The source image as fetched; None for engines that do not read it."""

    def __post_init__(self) -> None:
        if self.input.seed is None:
            raise ValueError(f"job {self.request_id} has no seed; draw one before creating an EngineJob")

    @property
    def seed(self) -> int:
        """The seed of the first image."""
        assert self.input.seed is not None
        return self.input.seed


@dataclass(frozen=True, slots=True)
class EngineImage:
    """One encoded result image."""

    data: bytes = field(repr=False)
    content_type: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class EngineResult:
    """The output of one job."""

    images: tuple[EngineImage, ...]
    seed: int
    """Seed of the first image; image i uses seed + i."""
    has_nsfw_concepts: tuple[bool, ...]
    """One flag per image if a safety checker ran; empty if none did."""
    timings: dict[str, float]
    """Seconds per phase; always contains `inference`."""
    prompt: str


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Description of an engine, for /health and the `engine` column of the results."""

    name: str
    """Value of the `engine` column; printable ASCII. An engine with a model includes the model and its revision."""
    model: str
    """Human-readable model name; engines without a model begin with "none"."""
    revision: str
    """Changes whenever the same input would produce a different image."""
    safety_checker: str | None
    """Name of the safety checker; None: images are not checked."""
    slots: int
    """Number of concurrent jobs."""
    fetches_source: bool
    """Whether the server must fetch the source image and pass it to the engine."""


class EngineError(Exception):
    """Base class of the errors that engines raise on purpose."""


class EngineFailure(EngineError):
    """The job failed with one of fal's model errors.

    Args:
        status: HTTP status of the result: 422 for invalid input, 500 for an engine error.
        type: fal's error type, for example `image_load_error`.
        message: what is wrong, the value, what to do.
        loc: location in the request body that caused the error.
        ctx: exceeded limits, for example `{"max_width": 8192}`.
        retryable: whether a retry of the same job can succeed.
    """

    def __init__(
        self,
        status: int,
        type: str,  # noqa: A002 - the name of the wire field
        message: str,
        loc: tuple[str, ...] = ("body", "image_url"),
        ctx: JsonObject | None = None,
        retryable: bool = False,
    ) -> None:
        # The base class gets all arguments, so that the error can be unpickled in the parent process.
        super().__init__(status, type, message, loc, ctx, retryable)
        self.status = status
        self.type = type
        self.message = message
        self.loc = loc
        self.ctx: JsonObject = ctx or {}
        self.retryable = retryable

    def __str__(self) -> str:
        return self.message


class NotReady(EngineFailure):
    """The worker cannot load its model or use its device, so every job would fail there. A retry may succeed.

    Args:
        message: what is missing, the value, what to do. At startup it is the complete error message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(500, "internal_server_error", message, loc=("body",), retryable=True)
        self.args = (message,)  # pickle passes these to this constructor


class EngineCancelled(EngineError):
    """The job was cancelled and stopped between two steps."""


class WorkerCrashed(EngineError):
    """The worker process died while it ran the job. The pool replaces the process; the job can be retried."""

    pause: float = 0.0
    """Seconds until a replacement is available; the request stays in the queue that long."""


class Engine(Protocol):
    """An image generator that the server drives. Up to `info().slots` tasks may call `generate` concurrently."""

    def info(self) -> EngineInfo:
        """Describe this engine; the result is the same before and after `start`."""

    async def start(self) -> None:
        """Start the engine. Loading may continue in the background after this returns."""

    async def aclose(self) -> None:
        """Stop everything that `start` started. A second call does nothing."""

    async def generate(self, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        """Execute one job.

        Raises:
            EngineFailure: the job failed with a model error.
            EngineCancelled: `cancelled()` returned true between two steps.
            WorkerCrashed: the worker process died.
        """
