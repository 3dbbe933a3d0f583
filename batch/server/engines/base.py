"""The one small interface that all engines share. Pure: knows no library, no process, no HTTP.

An engine gets one job at a time per slot and gives images, or raises one of three errors:

    EngineError
    ├── EngineFailure     the job cannot work; a model error as the wire shows it
    │   └── NotReady      no job can work on this worker: its model or its device cannot be had
    ├── EngineCancelled   the job was told to stop, and did
    └── WorkerCrashed     the process that did the work died; the job may be tried again
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
"""Told (steps done, steps in all) after each true step of a job."""
Cancelled: TypeAlias = Callable[[], bool]
"""Whether the job was told to stop; asked between steps."""


@dataclass(frozen=True, slots=True)
class EngineJob:
    """One request, ready to be executed."""

    request_id: str
    input: ImageToImageInput
    """Its seed is always set: whoever accepted the request drew one where none was given."""
    source: bytes | None = field(default=None, repr=False)
    """The source image as fetched; None for engines that do not look at it."""

    def __post_init__(self) -> None:
        if self.input.seed is None:
            raise ValueError(f"job {self.request_id} has no seed; draw one before it reaches an engine")

    @property
    def seed(self) -> int:
        """The seed, as the integer that it always is."""
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
    """What a job gave."""

    images: tuple[EngineImage, ...]
    seed: int
    """Of the first image; image i was made with seed + i."""
    has_nsfw_concepts: tuple[bool, ...]
    """One per image where a checker looked at them; empty where none did. Never a guess."""
    timings: dict[str, float]
    """Seconds; `inference` at least."""
    prompt: str


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says of itself, for /health and the results' `engine` column."""

    name: str
    """The `engine` column of the results; printable ASCII. An engine with a model tells it here, with its revision."""
    model: str
    """What ran, in words; an engine without a model says so."""
    revision: str
    """Changes when the same input would give another image."""
    safety_checker: str | None
    """None: nothing is checked."""
    slots: int
    """Jobs that it executes at once."""
    fetches_source: bool
    """Whether it needs the source image, which the server then fetches and hands over."""


class EngineError(Exception):
    """Base of what an engine raises on purpose."""


class EngineFailure(EngineError):
    """The job cannot work: one of fal's model errors, as a value.

    Args:
        status: HTTP status of the result, 422 where the input is at fault, 500 where the engine is.
        type: the wire's word, for instance `image_load_error`.
        message: what happened, the value, what to do next.
        loc: the part of the body at fault.
        ctx: limits that were passed, for instance `{"max_width": 8192}`.
        retryable: whether the same job may work another time.
    """

    def __init__(
        self,
        status: int,
        type: str,  # noqa: A002 - the wire's own word
        message: str,
        loc: tuple[str, ...] = ("body", "image_url"),
        ctx: JsonObject | None = None,
        retryable: bool = False,
    ) -> None:
        # All arguments go to the base, so that the error survives the way back from a worker process.
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
    """The worker could not get what every job of it needs. Another worker, or another time, may do better.

    Args:
        message: what is missing, the value, what to do next. It is the whole of an error at the start.
    """

    def __init__(self, message: str) -> None:
        super().__init__(500, "internal_server_error", message, loc=("body",), retryable=True)
        self.args = (message,)  # what a pickle hands to this constructor


class EngineCancelled(EngineError):
    """The job was told to stop, and stopped between two steps."""


class WorkerCrashed(EngineError):
    """The worker process died under the job. Another one takes its place; the job may be tried again."""

    pause: float = 0.0
    """Seconds until another one is there: as long a request that is alone stays in its queue."""


class Engine(Protocol):
    """What the server drives. `generate` may be called from up to `info().slots` tasks at once."""

    def info(self) -> EngineInfo:
        """What this engine is; the same before and after `start`."""

    async def start(self) -> None:
        """Get ready; returns quickly where that is possible."""

    async def aclose(self) -> None:
        """End everything that was started. Calling it twice is no error."""

    async def generate(self, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        """Execute one job.

        Raises:
            EngineFailure: the job cannot work.
            EngineCancelled: `cancelled()` was true between two steps.
            WorkerCrashed: the process that did the work died.
        """
