"""Repair of stored images: downloads missing or damaged files again, free. Assembly.

Owns the search for them and the list of unavailable images. A file is replaced only by equal bytes: an image that the
target serves with other bytes is reported, not stored under the old hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from random import Random

import anyio
import anyio.to_thread
from tenacity import stop_after_attempt

from batch.audit.report import Repair
from batch.config import Settings
from batch.directory import RunDirectory
from batch.fal.answer import images_of
from batch.fal.client import FalClient
from batch.fal.errors import CallFailed
from batch.journal.database import AuditedJob, JournalDatabase
from batch.journal.states import State
from batch.run.images import ImageFolder, sum_of
from batch.run.interfaces import ImageError
from batch.run.retrying import reading
from batch.targets import open_target
from batch.types import JobKey, RequestId, StoredImage, Ticket

__all__ = ["repaired"]

_PAGE = 500
_READS = 4
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class _Damage:
    """An image of a finished job whose file is missing or damaged."""

    key: JobKey
    request_id: RequestId | None
    place: int
    """Index in the answer."""
    image: StoredImage


async def repaired(directory: RunDirectory, settings: Settings, *, version: str, rng: Random) -> Repair:
    """Download every missing or damaged image of a finished job again. The caller holds the lock of the run directory.

    Raises:
        RunDirectoryError: the journal is missing or not a restyle journal. StorageError: a disk refused.
        ConfigError: there is no key.
    """
    found = Repair()
    in_thread = anyio.to_thread.run_sync
    file = await in_thread(JournalDatabase.open_read_only, directory.journal)
    try:
        pages = _damages(directory, file)
        page = await in_thread(next, pages, None)
        if page is None:
            return found
        async with open_target(settings, directory.endpoint, version=version) as target:
            images = ImageFolder(directory.root, limit_megapixels=settings.limits.max_image_megapixels)
            fetcher = _Fetcher(target.client, directory, images, found, rng)
            while page is not None:
                await fetcher.fetch(page)
                page = await in_thread(next, pages, None)
    finally:
        await in_thread(file.close)
    return found


def _damages(directory: RunDirectory, file: JournalDatabase) -> Iterator[list[_Damage]]:
    """Yield pages of missing or damaged images; each file is checked once, however many jobs show it."""
    seen: set[bytes] = set()
    last = 0
    while jobs := file.jobs_after(last, _PAGE):
        last = jobs[-1].id
        damaged = [damage for job in jobs if job.state is State.DONE for damage in _damages_of(directory, job, seen)]
        if damaged:
            yield damaged


def _damages_of(directory: RunDirectory, job: AuditedJob, seen: set[bytes]) -> Iterator[_Damage]:
    for place, image in enumerate(job.images or ()):
        if image.path is None or image.sha256 is None or (digest := bytes.fromhex(image.sha256)) in seen:
            continue
        seen.add(digest)
        on_disk = sum_of(directory.root / image.path)
        if on_disk is None or on_disk[1] != image.sha256:
            yield _Damage(job.key, job.request_id, place, image)


class _Fetcher:
    """Downloads a page of images concurrently."""

    def __init__(
        self, client: FalClient, directory: RunDirectory, images: ImageFolder, found: Repair, rng: Random
    ) -> None:
        self._client, self._root, self._images = client, directory.root, images
        self._found, self._rng = found, rng
        self._free = anyio.Semaphore(_AT_ONCE)

    async def fetch(self, page: list[_Damage]) -> None:
        async with anyio.create_task_group() as tasks:
            for damage in page:
                tasks.start_soon(self._one, damage)

    async def _one(self, damage: _Damage) -> None:
        async with self._free:
            why = await self._from(damage.image.url, damage.image)
            if why and damage.request_id is not None:
                url = await self._fresh_url(damage.request_id, damage.place)
                why = why if url in {"", damage.image.url} else await self._from(url, damage.image)
        if why:
            self._found.unavailable.append(f"{damage.image.path} of job {damage.key}: {why}")
        else:
            self._found.fetched += 1

    async def _from(self, url: str, image: StoredImage) -> str:
        """Download the image. Return an empty string, or the reason why that failed."""
        try:
            data = await reading(partial(self._client.download, url), self._rng, stop=stop_after_attempt(_READS))
        except CallFailed as error:
            return f"{url[:200]}: {error.trouble.detail or error}"
        if hashlib.sha256(data).hexdigest() != image.sha256:
            return f"{url[:200]}: the target serves different bytes"
        assert image.path is not None, "damages have a path"
        await anyio.Path(self._root / image.path).unlink(missing_ok=True)  # `store` keeps a file of that size
        try:
            await self._images.store(data)
        except ImageError as error:
            return f"{url[:200]}: {error}"
        return ""

    async def _fresh_url(self, request_id: RequestId, place: int) -> str:
        """Return the image's URL in the current result of the target, or an empty string."""
        try:
            read = partial(self._client.result, Ticket(request_id))
            answer = await reading(read, self._rng, stop=stop_after_attempt(1))
        except CallFailed:
            return ""
        images = images_of(answer.output)
        return images[place].url if place < len(images) else ""
