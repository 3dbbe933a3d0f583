"""The server's side of the preview engine: a pool of processes, by default one per core. Does not import OpenCV."""

from __future__ import annotations

from batch.server.engines.base import Cancelled, EngineInfo, EngineJob, EngineResult, OnStep
from batch.server.engines.process_pool import WorkerPool, WorkerStatistics

__all__ = ["PreviewEngine"]

_RENDERER = "batch.server.engines.preview.renderer:open_renderer"


class PreviewEngine:
    """Renders previews with filters; see the package.

    Args:
        slots: number of processes, which each render one job at a time; None: one per core.
    """

    def __init__(self, slots: int | None = None) -> None:
        self._pool = WorkerPool(_RENDERER, size=slots)

    def info(self) -> EngineInfo:
        """Describe the engine."""
        return EngineInfo(
            name="preview",
            model="none (OpenCV filters that show how a batch will look)",
            revision="2",
            safety_checker=None,
            slots=self._pool.size,
            fetches_source=True,
        )

    def statistics(self) -> WorkerStatistics:
        """Return the counts of worker processes."""
        return self._pool.statistics()

    async def start(self) -> None:
        """Start one worker and return while it loads; more start as jobs need them."""
        await self._pool.start()

    async def aclose(self) -> None:
        """End all workers."""
        await self._pool.aclose()

    async def generate(self, job: EngineJob, on_step: OnStep, cancelled: Cancelled) -> EngineResult:
        """Render one job's previews; see `Engine.generate` for the errors."""
        return await self._pool.run(job, on_step, cancelled)
