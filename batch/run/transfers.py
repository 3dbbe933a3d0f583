"""Image transfers: upload each source once; download, verify and store results.

Retries are safe here (they cost bandwidth only). Uses anyio's clock and the `Service` and `Images` Protocols. Knows
nothing of queues, money or states; an unavailable image is a `JobFailed`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

import anyio

from batch.errors import StorageError
from batch.fal.errors import CallFailed
from batch.journal.answers import shorten_data_uri
from batch.journal.events import Uploaded
from batch.run.admission import StopCause
from batch.run.context import RunContext
from batch.run.interfaces import ImageError
from batch.run.job import JobFailed, RunStopping
from batch.run.retrying import reading
from batch.run.verdicts import Action, Verdict, backoff, failure_of, final
from batch.system.descriptors import lacks_descriptor
from batch.types import Failed, Job, LocalImage, StoredImage

__all__ = ["Transfers"]

T = TypeVar("T")

_UPLOAD_VALID = 3 * 86400.0
"""Seconds for which an uploaded source image is reused; fal promises to keep files for seven days."""
_DOWNLOAD_TRIES = 16
_DOWNLOAD_PAUSE = 2.0
"""Longest pause between two downloads, in seconds."""
_DESCRIPTOR_PAUSE = 2.0
"""Longest pause, in seconds, before a file is opened again after a lack of descriptors."""
_DOWNLOADS_AT_ONCE = 16
_UPLOADS_AT_ONCE = 16
"""Limits the source images in memory, from reading to the end of the upload."""


class Transfers:
    """Transfers the images of one run."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._uploads: dict[str, anyio.Event] = {}
        self._downloads = anyio.Semaphore(_DOWNLOADS_AT_ONCE)
        self._late_downloads = anyio.Semaphore(_DOWNLOADS_AT_ONCE)
        self._uploading = anyio.Semaphore(_UPLOADS_AT_ONCE)
        self.fetched = 0
        """Number of downloaded files."""

    async def uploaded(self, job: Job) -> str:
        """Return the image's URL at the target; uploaded once, however many jobs need it."""
        image = job.image
        assert image is not None, "only a local image is uploaded"
        name = f"{self._context.policy.target} {image.sha256}"
        while (other := self._uploads.get(image.sha256)) is not None:
            await other.wait()
        ready = self._uploads[image.sha256] = anyio.Event()
        try:
            known = await self._context.journal.uploaded(name, self._context.now() - _UPLOAD_VALID)
            if known is not None:
                return known
            url = await self._upload(image)
            await self._context.journal.record(Uploaded(name, self._context.now(), url))
        except ImageError as error:
            raise JobFailed(Failed(error.type, str(error))) from error
        except CallFailed as error:
            verdict = final(error.trouble)
            failure = failure_of(error.trouble, verdict)
            if verdict.action is Action.STOP_ACCOUNT:
                self._context.admission.stop(StopCause.ACCOUNT, failure.message)
                raise RunStopping from error
            raise JobFailed(failure) from error
        finally:
            del self._uploads[image.sha256]
            ready.set()
        return url

    async def _upload(self, image: LocalImage) -> str:
        """Upload an image and return its URL. A refused image is freed and gives its place to others before a retry."""

        async def once() -> str:
            async with self._uploading:
                loaded = await self._with_descriptor(lambda: self._context.images.load(image))
                return await self._context.service.upload(loaded.data, loaded.content_type, image.name)

        return await self._unless_stopped(
            lambda: reading(once, self._context.rng, notice=self._context.read_failed, now=self._context.now)
        )

    async def _unless_stopped(self, call: Callable[[], Awaitable[str]]) -> str:
        """Run an upload; a stop ends it, because its job was never submitted.

        Raises:
            RunStopping: the run is stopping.
        """
        url: str | None = None
        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                await self._context.admission.stopped()
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch)
            try:
                url = await call()
            except (CallFailed, ImageError) as error:  # the task group would wrap it in an exception group
                failure = error
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if url is None:
            raise RunStopping
        return url

    async def stored(self, reported: StoredImage) -> StoredImage:
        """Download an image, decode it and store it. A damaged file is downloaded again.

        A failed download moves to a second queue, so it blocks no other and does not wait behind the others again.
        """
        with suppress(CallFailed, ImageError):
            return await self._download_once(reported, self._downloads)
        tries, since = 1, self._context.now()

        def notice(verdict: Verdict) -> None:
            self._context.read_failed(verdict)
            self._context.warn(self._context.expiry.undownloaded(since, self._context.now()))

        async def once_more() -> StoredImage:
            return await self._download_once(reported, self._late_downloads)

        while True:
            await anyio.sleep(backoff(tries, self._context.rng, cap=_DOWNLOAD_PAUSE))
            tries += 1
            try:
                return await reading(once_more, self._context.rng, notice=notice, now=self._context.now)
            except CallFailed as error:
                is_large = error.trouble.transport == "oversize"
                word = "result_file_too_large" if is_large else "result_file_gone"
                reason = error.trouble.detail or final(error.trouble).reason
                failure = Failed(word, f"{reported.url[:200]}: {reason}")
                raise JobFailed(failure, collectable=True) from error
            except ImageError as error:
                if tries >= _DOWNLOAD_TRIES:
                    failure = Failed("result_file_damaged", f"{reported.url[:200]}: {error}")
                    raise JobFailed(failure, collectable=True) from error

    async def _download_once(self, reported: StoredImage, slots: anyio.Semaphore) -> StoredImage:
        async with slots:
            data = await self._context.service.download(reported.url)
            self.fetched += 1
            return _merged(reported, await self._with_descriptor(lambda: self._context.images.store(data)))

    async def _with_descriptor(self, work: Callable[[], Awaitable[T]]) -> T:
        """Read or write a file, retrying without limit while no descriptor is free."""
        tries = 0
        while True:
            try:
                return await work()
            except (ImageError, StorageError) as error:
                if not lacks_descriptor(error):
                    raise
            tries += 1
            self._context.read_failed(Verdict(Action.READ_AGAIN, "too many open files (raise `ulimit -n`)"))
            await anyio.sleep(backoff(tries, self._context.rng, cap=_DESCRIPTOR_PAUSE))


def _merged(reported: StoredImage, kept: StoredImage) -> StoredImage:
    """Combine what the endpoint said of an image with what its bytes show."""
    return StoredImage(
        url=shorten_data_uri(reported.url),
        width=kept.width,
        height=kept.height,
        content_type=reported.content_type or kept.content_type,
        file_name=reported.file_name,
        file_size=kept.file_size,
        path=kept.path,
        sha256=kept.sha256,
    )
