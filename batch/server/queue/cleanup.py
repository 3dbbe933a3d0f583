"""Forgetting: what was kept long enough goes, in small steps, while the server works.

Owns when something goes and in which order: a request first, its images after it, never the other way round. How
things are removed is the store's and the storage's business. An ending stays for the retention, or as long as its
request wished; a file stays for the retention and an hour after it was last saved, and while it is the source of a
request that is still here; a file with an end of its own goes then; an upload that nobody finishes goes after a day.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from batch.errors import StorageError
from batch.server.files.storage import Storage
from batch.server.queue.store import Store

__all__ = ["DEFAULT_SECONDS", "Cleanup", "cleaning_up"]

_log = logging.getLogger(__name__)

DEFAULT_SECONDS = 30 * 86400.0
"""Precedent: fal stores inputs and outputs for 30 days."""
FILE_MARGIN_SECONDS = 3600.0
"""A result's images are saved shortly before its ending; on a disk that refuses, a good while before."""
LOOK_AGAIN_SECONDS = 86400.0
"""After an old file was found to be in use."""
ABANDONED_SECONDS = 86400.0
ROUND_SECONDS = 30.0
FILES_SECONDS = 3600.0
"""Between two walks over all files."""
STEP = 200
"""Rows or small files in one step: a few milliseconds, in which nothing else is written."""
_PAUSE_SECONDS = 0.05
"""Between two steps, so that callers notice nothing."""


class Cleanup:
    """Removes what is over.

    Args:
        store: requests.
        storage: files.
        seconds: how long endings and files stay, more than 0.
        step: rows or small files in one step.
        pause: seconds between two steps.
        round_seconds: time between two rounds.
    """

    def __init__(
        self,
        store: Store,
        storage: Storage,
        seconds: float,
        *,
        step: int = STEP,
        pause: float = _PAUSE_SECONDS,
        round_seconds: float = ROUND_SECONDS,
    ) -> None:
        self._store = store
        self._storage = storage
        self._seconds = seconds
        self._step, self._pause, self._round_seconds = step, pause, round_seconds

    async def endings(self, now: float) -> int:
        """Remove ended requests whose time is over; how many.

        Raises:
            StorageError: the disk refused.
        """
        count = 0
        while removed := await self._store.forget(now, self._seconds, self._step):
            count += removed
            await asyncio.sleep(self._pause)
        return count

    async def short_lives(self, now: float) -> int:
        """Remove files whose own end has come; how many.

        Raises:
            StorageError: the disk refused.
        """
        count = 0
        while paths := await self._storage.expired(now, self._step):
            count += await self._storage.remove(paths, math.inf)
            await asyncio.sleep(self._pause)
        return count

    async def files(self, now: float) -> int:
        """Remove files that are old and belong to no request, and uploads that nobody finishes; how many files.

        Raises:
            StorageError: the disk refused.
        """
        await self._storage.remove_abandoned_parts(now - ABANDONED_SECONDS)
        before, count = now - self._seconds - FILE_MARGIN_SECONDS, 0
        while paths := await self._storage.old_small(before, self._step):
            count += await self._remove(paths, before)
        for shelf in await self._storage.shelves():
            count += await self._remove(await self._storage.old_large(shelf, before), before)
        return count

    async def _remove(self, paths: list[str], before: float) -> int:
        """Those of them that no request uses; the others are looked at again in a day."""
        if not paths:
            return 0
        used = await self._store.sources(paths)
        await self._storage.renew(sorted(used), before + LOOK_AGAIN_SECONDS)
        count = await self._storage.remove([path for path in paths if path not in used], before)
        await asyncio.sleep(self._pause)
        return count

    async def run(self, clock: Callable[[], float]) -> None:
        """Sweep until cancelled. A disk that refuses is tried again in the next round."""
        files_at = -math.inf
        while True:
            now = clock()
            try:
                gone = await self.endings(now), await self.short_lives(now)
                if any(gone):
                    _log.info("removed %d results and %d files whose time was over", *gone)
                if now - files_at >= FILES_SECONDS:
                    files_at, count = now, await self.files(now)
                    if count:
                        _log.info("removed %d files that were not used any more", count)
            except (StorageError, OSError) as error:
                _log.warning("old results and files cannot be removed, trying again: %s", error)
            await asyncio.sleep(self._round_seconds)


@asynccontextmanager
async def cleaning_up(sweeper: Cleanup, clock: Callable[[], float]) -> AsyncIterator[None]:
    """Sweep in the background while the block lasts."""
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(sweeper.run(clock))
        try:
            yield
        finally:
            task.cancel()
