"""Execute one request: validate the input, fetch the source image, run the engine, store the images.

Every expected error becomes a `RequestFailed`, which the request's result URL returns. Only a crashed worker process is
left to the caller, which may retry.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import dataclass
from typing import TypeAlias

from pydantic import ValidationError

from batch.fal.endpoint import ImageToImageInput
from batch.server.egress.source_images import SourceFetcher
from batch.server.engines.base import (
    Cancelled,
    Engine,
    EngineCancelled,
    EngineFailure,
    EngineJob,
    EngineResult,
    OnStep,
    WorkerCrashed,
)
from batch.server.files.storage import Storage
from batch.server.queue import responses as answers
from batch.system.descriptors import lacks_descriptor
from batch.types import RequestId

__all__ = ["Execution", "Executor", "Rendered", "RequestFailed", "StoredResult"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """A request that ended without images."""

    status: int
    payload: bytes
    error_type: str | None = None
    retryable: bool | None = None

    @classmethod
    def of(cls, status: int, error_type: str, detail: str) -> RequestFailed:
        """Return an infrastructure error."""
        return cls(status, answers.error_payload(error_type, detail), error_type)


@dataclass(frozen=True, slots=True)
class Rendered:
    """The engine's result, in memory."""

    result: EngineResult
    inline: bool
    """`sync_mode`: the response contains the images as data URIs."""


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A result with its images on disk."""

    payload: bytes
    billable_units: float
    inline: bool


Execution: TypeAlias = Rendered | RequestFailed


class Executor:
    """Runs requests on the engine."""

    def __init__(self, engine: Engine, storage: Storage, source_fetcher: SourceFetcher) -> None:
        self._engine = engine
        self._storage = storage
        self._source_fetcher = source_fetcher
        self._fetches_source = engine.info().fetches_source

    async def make(self, request_id: RequestId, body: bytes, on_step: OnStep, cancelled: Cancelled) -> Execution:
        """Execute a request and return its images in memory.

        Raises:
            WorkerCrashed: the engine's worker process died.
            Exception: no file descriptor is free (`lacks_descriptor`); nothing was done.
        """
        image_url = ""
        try:
            given = ImageToImageInput.model_validate_json(body)
            image_url = given.image_url
            if given.seed is None:
                given = given.model_copy(update={"seed": _seed_of(request_id)})
            source = await self._source_fetcher.fetch(image_url) if self._fetches_source else None
            if cancelled():
                return RequestFailed.of(*answers.CANCELLED)
            result = await self._engine.generate(EngineJob(request_id, given, source), on_step, cancelled)
        except ValidationError as error:
            return RequestFailed(422, answers.validation_payload(error), retryable=False)
        except EngineFailure as failure:
            return RequestFailed(
                failure.status, answers.failure_payload(failure, image_url), retryable=failure.retryable
            )
        except EngineCancelled:
            return RequestFailed.of(*answers.CANCELLED)
        except WorkerCrashed:
            raise
        except Exception as error:  # one request's failure must not stop the server
            if lacks_descriptor(error):
                raise
            _log.exception("request %s: unexpected error", request_id)
            return RequestFailed.of(500, "internal_error", "Internal Server Error")
        return Rendered(result, given.sync_mode)

    async def keep(self, made: Rendered, life: float | None = None) -> StoredResult:
        """Store the images, for `life` seconds if given; durable on return.

        Raises:
            StorageError: the write failed.
        """
        images = made.result.images
        if len(images) == 1:
            paths = [await self._storage.save(images[0].data, images[0].content_type, life)]
        else:
            paths = await asyncio.gather(*(self._storage.save(one.data, one.content_type, life) for one in images))
        payload = answers.output_payload(made.result, paths)
        return StoredResult(payload, answers.billable_units(made.result), made.inline)


def _seed_of(request_id: RequestId) -> int:
    """Return a seed derived from the request id, so that a retry after a crash gives the same image."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=4).digest()) >> 1
