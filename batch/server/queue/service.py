"""The queue service: scheduler, store, storage and executor combined, without HTTP.

Guarantees the order of writes: an acceptance is durable before the request enters the scheduler, a result before any
client sees it. The scheduler decides, the store remembers, this module executes.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import orjson

from batch.errors import StorageError
from batch.fal.protocol import CancelOutcome, Malformed
from batch.server.egress.source_images import DataUri, SourceFetcher, parse_data_uri
from batch.server.engines.base import Cancelled, Engine, EngineInfo, WorkerCrashed
from batch.server.files.storage import Storage, content_type_of
from batch.server.queue import responses as answers
from batch.server.queue.executor import Executor, Rendered, RequestFailed, StoredResult
from batch.server.queue.records import (
    DEFAULT_RETENTION,
    AcceptedSubmission,
    CompletedRequest,
    LogLine,
    Priority,
    RequestSummary,
    RetentionOptions,
    Submission,
    Webhook,
    uuid7,
)
from batch.server.queue.scheduler import Cancellation, LiveView, Scheduler
from batch.server.queue.stats import ServerStats
from batch.server.queue.store import Store
from batch.system.descriptors import lacks_descriptor
from batch.types import AppId, JsonObject, QueueState, RequestId

__all__ = ["QueueFull", "QueueService", "RequestState", "Statistics", "SubmitOptions", "queue_service"]

_log = logging.getLogger(__name__)
_HELD_BODIES = 10_000
"""Maximum number of waiting inputs in memory; those of later requests are read from the store when they start."""
_LARGE_BODY = 256 * 1024
"""Bodies larger than this are parsed in a thread: decoding an image would block the event loop."""
_RETRY_SECONDS = 1.0
"""Delay before a failed write of a result is retried."""
_LACK_SECONDS = 0.25
"""Delay before work that found no free file descriptor is retried."""
_SAY_EVERY = 60.0
"""Minimum interval between two warnings about missing descriptors."""


class QueueFull(Exception):
    """More requests are waiting than the caller's limit."""


class SubmitOptions(NamedTuple):
    """Options of a submit, from its headers and query."""

    idempotency_key: str | None = None
    priority: Priority = Priority.NORMAL
    start_timeout: float | None = None
    """Seconds from acceptance within which the request must start."""
    queue_limit: int | None = None
    """Reject the request if more than this number are waiting."""
    webhook: Webhook | None = None
    """Receiver of the result."""
    retention: RetentionOptions = DEFAULT_RETENTION
    tags: Mapping[str, str] = MappingProxyType({})
    """Labels for the billing events."""


class RequestState(NamedTuple):
    """The current state of a request."""

    app: AppId
    state: LiveView | CompletedRequest
    owner: str
    """Owner of the API key; empty on a server without keys."""


class Statistics(NamedTuple):
    """Counts for `/health`."""

    accepted: int
    """Requests accepted since the store was created; repeated idempotency keys are not counted."""
    waiting: int
    running: int
    ending: int


class QueueService:
    """The queue; create it with `queue_service`. Not thread-safe: use one event loop."""

    def __init__(
        self,
        store: Store,
        storage: Storage,
        executor: Executor,
        slots: int,
        info: EngineInfo,
        tasks: asyncio.TaskGroup,
        clock: Callable[[], float],
        retention: float,
        retry_seconds: float,
    ) -> None:
        self.storage = storage
        self.engine = info
        self.submit_posts = 0
        """Submits received since the start, accepted or not; the HTTP layer counts them."""
        self.tally = ServerStats(store.accepted)
        self.ended = asyncio.Event()
        """Set whenever a request ends; the waiting task clears it."""
        self.disk_refuses: tuple[float, str] | None = None
        """Start of the current write failure (monotonic clock) and its last error; None: writes succeed."""
        self._store = store
        self._executor = executor
        self._scheduler = Scheduler(slots)
        self._tasks = tasks
        self._clock = clock
        self._retention = retention
        self._retry_seconds = retry_seconds
        self._retention_options: dict[RequestId, RetentionOptions] = {}
        """Live requests with retention options."""
        self._start_by: dict[RequestId, float] = {}
        """Start deadlines of live requests."""
        self._executing: set[asyncio.Task[None]] = set()
        self._bodies: dict[RequestId, bytes] = {}
        self._watchers: dict[RequestId, set[asyncio.Future[None]]] = {}
        self._deadlines: dict[RequestId, asyncio.TimerHandle] = {}
        """Timers of waiting requests with a start deadline."""
        self._stopping = False
        self._lack_said_at = -math.inf

    def new_id(self) -> RequestId:
        """Return a new id, for a request or for a response without one."""
        return uuid7(self._clock(), secrets.randbits(74))

    def disk_refused(self, error: StorageError) -> None:
        """Record a failed write; the next successful one clears it."""
        since = self.disk_refuses[0] if self.disk_refuses is not None else time.monotonic()
        self.disk_refuses = since, str(error)

    def lacked_descriptor(self, error: BaseException) -> None:
        """Log, at most once per `_SAY_EVERY`, that work waits for a free file descriptor."""
        now = time.monotonic()
        if now - self._lack_said_at >= _SAY_EVERY:
            self._lack_said_at = now
            _log.warning("too many open files, work is waiting (%s); raise `ulimit -n`", error)

    def statistics(self) -> Statistics:
        """Return the counts in O(1)."""
        return Statistics(self._store.accepted, *self._scheduler.statistics())

    # --- called by clients --------------------------------------------------------------------------------

    async def submit(self, app: AppId, body: bytes, options: SubmitOptions, owner: str = "") -> AcceptedSubmission:
        """Accept a request; durable on return. The input is validated when the request is executed.

        Raises:
            Malformed: the body is not a JSON object.
            QueueFull: see `SubmitOptions.queue_limit`.
            StorageError: the write failed; nothing was accepted.
        """
        waiting = self._scheduler.statistics().waiting
        if options.queue_limit is not None and waiting > options.queue_limit:
            raise QueueFull(f"{waiting} requests are waiting; the caller allows {options.queue_limit}")
        read = partial(_read_body, app, body, digest=options.idempotency_key is not None)
        given = await asyncio.to_thread(read) if len(body) > _LARGE_BODY else read()
        kept, source = body, None
        if given.image is not None:
            path = await self.storage.save(given.image.data, given.image.content_type)
            kept, source = _dumped({**given.value, "image_url": path}), path
        elif isinstance(url := given.value.get("image_url"), str) and "/files/" in url:
            source = self.storage.path_in(url)
        now = self._clock()
        start_by = now + options.start_timeout if options.start_timeout is not None else None
        submission = Submission(
            self.new_id(),
            app,
            now,
            kept,
            given.digest,
            options.idempotency_key,
            options.priority,
            start_by,
            owner,
            options.webhook,
            options.retention,
            source,
            options.tags,
        )
        admission = await self._store.accept(submission)
        self.disk_refuses = None
        if admission.fresh:
            if waiting < _HELD_BODIES:
                self._bodies[submission.request_id] = kept
            self._enqueue(submission.request_id, app, options.priority, start_by, owner, options.retention)
            self._start_next()
        return admission

    def position(self, request_id: RequestId) -> int:
        """Return the position in the queue; 0 for a request that is not waiting."""
        view = self._scheduler.view(request_id)
        return view.position if view is not None else 0

    async def find(self, request_id: RequestId, *, expired: bool = False) -> RequestState | None:
        """Return the state of a request; None if the id is unknown or the result has expired.

        Args:
            request_id: the id of the request.
            expired: also return an expired result that is still stored, for a client that waited for it.
        """
        view = self._scheduler.view(request_id)
        if view is not None:
            app = self._scheduler.app_of(request_id)
            assert app is not None, "it has a view"
            return RequestState(app, view, self._scheduler.owner_of(request_id))
        stored = await self._store.find(request_id)
        if stored is None:
            return None
        if stored.completed is not None and not expired and self._is_over(stored.completed):
            return None
        # Neither live nor ended: the acceptance is durable, but not yet in the scheduler.
        state = stored.completed or self._scheduler.view(request_id) or LiveView(QueueState.IN_QUEUE, 0, ())
        return RequestState(stored.app, state, stored.owner)

    async def latest(self, limit: int, owner: str = "") -> list[tuple[RequestSummary, LiveView | None]]:
        """Return the newest requests and those around the head of the queue, with the state of live ones.

        Args:
            limit: maximum number of requests, >= 4.
            owner: only this owner's requests; empty: all.
        """
        newest = limit // 4
        listed = await self._store.latest(newest, limit - newest, self.engine.slots + newest, owner)
        return [(one, self._scheduler.view(one.request_id) if one.ended_at is None else None) for one in listed]

    async def cancel(self, request_id: RequestId) -> CancelOutcome:
        """Remove a request from the queue, or ask the engine to stop it."""
        match self._scheduler.cancel(request_id):
            case Cancellation.REMOVED:
                self._forget_deadline(request_id)
                await self._end_with(request_id, RequestFailed.of(*answers.CANCELLED))
                return CancelOutcome.REQUESTED
            case Cancellation.SIGNALLED:
                return CancelOutcome.REQUESTED
            case Cancellation.TOO_LATE:
                return CancelOutcome.ALREADY_COMPLETED
            case Cancellation.UNKNOWN:
                known = await self._store.find(request_id)
                return CancelOutcome.NOT_FOUND if known is None else CancelOutcome.ALREADY_COMPLETED

    async def changed(self, request_id: RequestId, seconds: float) -> None:
        """Return when the request's state or log changes, at the latest after `seconds`."""
        if self._stopping or request_id not in self._scheduler:
            return
        watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers.setdefault(request_id, set()).add(watcher)
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(watcher, seconds)
        finally:
            self._forget_watcher(request_id, watcher)

    @property
    def stopping(self) -> bool:
        """Whether the server is shutting down; waiting calls must return."""
        return self._stopping

    async def inlined(self, completed: CompletedRequest) -> dict[str, str]:
        """Return data URIs by stored path, for a request with `sync_mode`."""
        found: dict[str, str] = {}
        for image in orjson.loads(completed.payload).get("images", []):
            data = await self.storage.read(image["url"])
            if data is not None:
                encoded = base64.b64encode(data).decode()
                found[image["url"]] = f"data:{content_type_of(image['url'])};base64,{encoded}"
        return found

    # --- execution ----------------------------------------------------------------------------------------

    async def recover(self) -> int:
        """Queue the unfinished requests of the previous run, in the order of acceptance; return their number."""
        found = await self._store.to_do()
        for request_id, app, priority, start_by, owner, retention in found:
            self._enqueue(request_id, app, priority, start_by, owner, retention)
            if self._is_overdue(request_id):  # its start timeout passed while the server was down
                self._expire(request_id)
        self._start_next()
        return len(found)

    def stop(self) -> None:
        """Start no more requests and cancel the running ones; the store still has them as unfinished."""
        self._stopping = True
        for task in self._executing:
            task.cancel()
        for request_id in list(self._watchers):
            self._notify(request_id)

    def _enqueue(
        self,
        request_id: RequestId,
        app: AppId,
        priority: Priority,
        start_by: float | None,
        owner: str,
        retention: RetentionOptions,
    ) -> None:
        self._scheduler.accept(request_id, app, priority, owner)
        if retention != DEFAULT_RETENTION:
            self._retention_options[request_id] = retention
        if start_by is not None:
            self._start_by[request_id] = start_by
            delay = max(0.0, start_by - self._clock())
            timer = asyncio.get_running_loop().call_later(delay, self._expire, request_id)
            self._deadlines[request_id] = timer

    def _start_next(self) -> None:
        while not self._stopping and (request_id := self._scheduler.start()) is not None:
            self._forget_deadline(request_id)
            self._notify(request_id)
            self._spawn(self._execute(request_id))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self._tasks.create_task(work)
        self._executing.add(task)
        task.add_done_callback(self._executing.discard)

    async def _execute(self, request_id: RequestId) -> None:
        started_at = self._clock()
        cancelled = partial(self._scheduler.is_cancelled, request_id)
        try:
            outcome = await self._made(request_id, cancelled)
        except WorkerCrashed as crash:
            self._log(request_id, "ERROR", f"the worker process died: {crash}")
            if self._scheduler.crash(request_id):
                if self._is_overdue(request_id):  # the start timeout covers retries too
                    self._expire(request_id)
                    self._start_next()
                    return
                _log.warning("request %s: the worker process died (%s); retrying once", request_id, crash)
                if crash.pause:
                    await asyncio.sleep(crash.pause)
                self._start_next()
                return
            outcome = RequestFailed.of(500, "internal_error", "The worker process died twice on this request")
            if cancelled():
                outcome = RequestFailed.of(*answers.CANCELLED)
        except Exception:  # one request's failure must not stop the others
            _log.exception("request %s: unexpected error", request_id)
            outcome = RequestFailed.of(500, "internal_error", "Internal Server Error")
        logs = self._scheduler.release(request_id)
        self._start_next()
        await self._end_with(request_id, outcome, started_at, logs)

    async def _made(self, request_id: RequestId, cancelled: Cancelled) -> Rendered | RequestFailed:
        """Execute a request; retry while no file descriptor is free."""
        step = partial(self._step, request_id)
        while True:
            try:
                body = self._bodies.get(request_id) or await self._store.body(request_id)
                return await self._executor.make(request_id, body, step, cancelled)
            except Exception as error:
                if not lacks_descriptor(error):
                    raise
                self.lacked_descriptor(error)
            if cancelled():
                return RequestFailed.of(*answers.CANCELLED)
            await asyncio.sleep(_LACK_SECONDS)

    async def _end_with(
        self,
        request_id: RequestId,
        outcome: Rendered | RequestFailed,
        started_at: float | None = None,
        logs: tuple[LogLine, ...] = (),
    ) -> None:
        """Store the outcome, retrying until the write succeeds, and then publish it."""
        app = self._scheduler.app_of(request_id)
        assert app is not None, "a request that ends is still live"
        retention = self._retention_options.pop(request_id, DEFAULT_RETENTION)
        while True:
            try:
                done = (
                    await self._executor.keep(outcome, retention.file_life)
                    if isinstance(outcome, Rendered)
                    else outcome
                )
                completed = self._completed_request(request_id, app, outcome, done, started_at, logs, retention)
                await self._store.end(completed)
                self.disk_refuses = None
                break
            except StorageError as error:
                if lacks_descriptor(error):
                    self.lacked_descriptor(error)
                    await asyncio.sleep(_LACK_SECONDS)
                    continue
                self.disk_refused(error)
                _log.error("request %s: cannot store the result, retrying: %s", request_id, error)
                await asyncio.sleep(self._retry_seconds)
        self.tally.ended(completed)
        self._scheduler.finish(request_id)
        self._bodies.pop(request_id, None)
        self._start_by.pop(request_id, None)
        self._notify(request_id)
        self.ended.set()
        self._start_next()

    def _completed_request(
        self,
        request_id: RequestId,
        app: AppId,
        outcome: Rendered | RequestFailed,
        done: StoredResult | RequestFailed,
        started_at: float | None,
        logs: tuple[LogLine, ...],
        retention: RetentionOptions,
    ) -> CompletedRequest:
        inference = outcome.result.timings.get("inference") if isinstance(outcome, Rendered) else None
        kept, fault = (done, None) if isinstance(done, StoredResult) else (None, done)
        return CompletedRequest(
            request_id=request_id,
            app=app,
            ended_at=self._clock(),
            status=fault.status if fault else 200,
            payload=done.payload,
            started_at=started_at,
            inference_time=inference,
            billable_units=kept.billable_units if kept else 0.0,
            error_type=fault.error_type if fault else None,
            retryable=fault.retryable if fault else None,
            inline=kept.inline if kept else False,
            logs=logs,
            owner=self._scheduler.owner_of(request_id),
            kept_for=answers.kept_for(done.payload) if retention.brief else None,
            engine=self.engine.name if started_at is not None else None,
        )

    def _is_over(self, completed: CompletedRequest) -> bool:
        """Whether a result has expired, even if it is not removed yet."""
        kept_for = self._retention if completed.kept_for is None else completed.kept_for
        return completed.ended_at + kept_for < self._clock()

    def _is_overdue(self, request_id: RequestId) -> bool:
        """Whether a request's start deadline has passed."""
        return self._start_by.get(request_id, math.inf) <= self._clock()

    def _expire(self, request_id: RequestId) -> None:
        self._deadlines.pop(request_id, None)
        if not self._stopping and self._scheduler.expire(request_id):
            self._spawn(self._end_with(request_id, RequestFailed.of(*answers.NOT_STARTED)))

    def _step(self, request_id: RequestId, done: int, total: int) -> None:
        if self._scheduler.step(request_id, done, total, self._clock()):
            self._notify(request_id)

    def _log(self, request_id: RequestId, level: str, message: str) -> None:
        self._scheduler.log(request_id, LogLine(self._clock(), level, message))
        self._notify(request_id)

    def _forget_watcher(self, request_id: RequestId, watcher: asyncio.Future[None]) -> None:
        """Remove a watcher; otherwise a call that waits for hours leaves one behind per wake-up."""
        watchers = self._watchers.get(request_id, set())
        watchers.discard(watcher)
        if not watchers:
            self._watchers.pop(request_id, None)

    def _forget_deadline(self, request_id: RequestId) -> None:
        """Cancel the start deadline of a request that has left the queue."""
        timer = self._deadlines.pop(request_id, None)
        if timer is not None:
            timer.cancel()

    def _notify(self, request_id: RequestId) -> None:
        for watcher in self._watchers.pop(request_id, ()):
            if not watcher.done():
                watcher.set_result(None)


@asynccontextmanager
async def queue_service(
    store: Store,
    storage: Storage,
    engine: Engine,
    source_fetcher: SourceFetcher,
    clock: Callable[[], float] = time.time,
    retention: float = math.inf,
    *,
    retry_seconds: float = _RETRY_SECONDS,
) -> AsyncIterator[QueueService]:
    """Run a queue inside the `async with` block. Requests that run at its end are executed by the next server."""
    info = engine.info()
    async with asyncio.TaskGroup() as tasks:
        executor = Executor(engine, storage, source_fetcher)
        service = QueueService(store, storage, executor, info.slots, info, tasks, clock, retention, retry_seconds)
        count = await service.recover()
        if count:
            _log.info("resumed %d unfinished requests", count)
        try:
            yield service
        finally:
            service.stop()


class _CheckedInput(NamedTuple):
    value: JsonObject
    image: DataUri | None
    digest: bytes


def _dumped(value: object, option: int = 0) -> bytes:
    """Serialise parsed JSON.

    Raises:
        Malformed: it is nested deeper than 254 levels, orjson's limit for writing (1024 for reading).
    """
    try:
        return orjson.dumps(value, option=option)
    except TypeError as error:
        raise Malformed(f"The body is nested too deeply: {error}") from error


def _read_body(app: AppId, body: bytes, *, digest: bool) -> _CheckedInput:
    """Parse a submitted body; decode the image in it, if any."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Malformed(f"The body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Malformed(f"The body must be a JSON object, not {type(value).__name__}")
    mark = b""
    if digest:
        canonical = _dumped([app, value], orjson.OPT_SORT_KEYS)
        mark = hashlib.blake2b(canonical, digest_size=16).digest()
    image_url = value.get("image_url")
    image = None
    if isinstance(image_url, str) and image_url[:5].lower() == "data:":
        with suppress(ValueError):  # an invalid data URI is stored as it is; the request fails when executed
            image = parse_data_uri(image_url)
    return _CheckedInput(value, image, mark)
