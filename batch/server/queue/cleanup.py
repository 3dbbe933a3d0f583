"""Remove expired requests and files in small steps while the server runs.

Decides when and in which order: a request is removed before its images, never after them. The store and the storage do
the removing.

- A result is kept for the retention, or for the shorter time that its request asked for.
- A file is kept for the retention plus one hour after it was last saved, and while it is the source image of a stored
  request. A file with its own expiry is removed at that time.
- An unfinished upload is removed after one day.
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
"""Images are saved before their result: usually milliseconds, much longer while disk writes fail."""
LOOK_AGAIN_SECONDS = 86400.0
"""Delay before an old file that is still in use is checked again."""
ABANDONED_SECONDS = 86400.0
ROUND_SECONDS = 30.0
FILES_SECONDS = 3600.0
"""Interval between two scans of all files."""
STEP = 200
"""Rows or small files per step. A step blocks all other writes for a few milliseconds."""
_PAUSE_SECONDS = 0.05
"""Pause between two steps, so that requests are not delayed."""


class Cleanup:
    """Removes expired requests and files.

    Args:
        store: the requests.
        storage: the files.
        seconds: the retention of results and files, > 0.
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

    async def results(self, now: float) -> int:
        """Remove expired results; return their number.

        Raises:
            StorageError: a read or write failed.
        """
        count = 0
        while removed := await self._store.forget(now, self._seconds, self._step):
            count += removed
            await asyncio.sleep(self._pause)
        return count

    async def expired_files(self, now: float) -> int:
        """Remove files whose own expiry has passed; return their number.

        Raises:
            StorageError: a read or write failed.
        """
        count = 0
        while paths := await self._storage.expired(now, self._step):
            count += await self._storage.remove(paths, math.inf)
            await asyncio.sleep(self._pause)
        return count

    async def unused_files(self, now: float) -> int:
        """Remove old files that no request uses, and abandoned uploads; return the number of files.

        Raises:
            StorageError: a read or write failed.
        """
        await self._storage.remove_abandoned_parts(now - ABANDONED_SECONDS)
        before, count = now - self._seconds - FILE_MARGIN_SECONDS, 0
        while paths := await self._storage.old_small(before, self._step):
            count += await self._remove(paths, before)
        for shelf in await self._storage.shelves():
            count += await self._remove(await self._storage.old_large(shelf, before), before)
        return count

    async def _remove(self, paths: list[str], before: float) -> int:
        """Remove the unused files of `paths`; the others are checked again in a day."""
        if not paths:
            return 0
        used = await self._store.sources(paths)
        await self._storage.renew(sorted(used), before + LOOK_AGAIN_SECONDS)
        count = await self._storage.remove([path for path in paths if path not in used], before)
        await asyncio.sleep(self._pause)
        return count

    async def run(self, clock: Callable[[], float]) -> None:
        """Clean up until cancelled. A failed round is retried in the next one."""
        files_at = -math.inf
        while True:
            now = clock()
            try:
                gone = await self.results(now), await self.expired_files(now)
                if any(gone):
                    _log.info("removed %d expired results and %d expired files", *gone)
                if now - files_at >= FILES_SECONDS:
                    files_at, count = now, await self.unused_files(now)
                    if count:
                        _log.info("removed %d unused files", count)
            except (StorageError, OSError) as error:
                _log.warning("cannot remove old results and files, retrying in %.0f s: %s", self._round_seconds, error)
            await asyncio.sleep(self._round_seconds)


@asynccontextmanager
async def cleaning_up(cleanup: Cleanup, clock: Callable[[], float]) -> AsyncIterator[None]:
    """Run the cleanup in the background inside the `async with` block."""
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(cleanup.run(clock))
        try:
            yield
        finally:
            task.cancel()
