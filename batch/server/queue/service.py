"""The queue at work: broker, store, storage and worker joined together, without HTTP.

Owns the order of things: an acceptance is durable before the broker hears of it, an ending before anybody is told.
What decides is the broker; what is known is in the store; this module only carries it out.
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
"""Inputs of waiting requests kept in memory; of a longer queue the rest is read when its turn comes."""
_LARGE_BODY = 256 * 1024
"""From here on a body is read in a thread: decoding an image would hold up everybody."""
_RETRY_SECONDS = 1.0
"""Between two tries to write an ending on a disk that refuses."""
_LACK_SECONDS = 0.25
"""Between two tries of what needs a descriptor, when none is free."""
_SAY_EVERY = 60.0
"""Seconds between two log lines about that."""


class QueueFull(Exception):
    """More requests wait than the caller is ready to stand behind."""


class SubmitOptions(NamedTuple):
    """What a caller may ask for beside the input."""

    idempotency_key: str | None = None
    priority: Priority = Priority.NORMAL
    start_timeout: float | None = None
    """Seconds from acceptance in which the request has to be started."""
    queue_limit: int | None = None
    """Refuse the request if more than that many wait."""
    webhook: Webhook | None = None
    """Whom to tell when it has ended."""
    keeping: RetentionOptions = DEFAULT_RETENTION
    tags: Mapping[str, str] = MappingProxyType({})
    """Labels for the billing events."""


class RequestState(NamedTuple):
    """A request as it stands."""

    app: AppId
    state: LiveView | CompletedRequest
    owner: str
    """Whose key it came with; empty for a request of a server without keys."""


class Statistics(NamedTuple):
    """For /health."""

    accepted: int
    """Submits accepted ever, durable; repeats with the same idempotency key are not counted."""
    waiting: int
    running: int
    ending: int


class QueueService:
    """Made by `queue_service`. All methods belong to one event loop."""

    def __init__(
        self,
        store: Store,
        storage: Storage,
        worker: Executor,
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
        """Submits seen since the start, accepted or not; the HTTP face counts them."""
        self.tally = ServerStats(store.accepted)
        self.ended = asyncio.Event()
        """Set whenever a request has ended; whoever waits for it clears it."""
        self.disk_refuses: tuple[float, str] | None = None
        """Since when (of the monotonic clock) nothing could be written, and what was said last; None: all is well."""
        self._store = store
        self._worker = worker
        self._broker = Scheduler(slots)
        self._tasks = tasks
        self._clock = clock
        self._retention = retention
        self._retry_seconds = retry_seconds
        self._keeping: dict[RequestId, RetentionOptions] = {}
        """Of those that wish something there."""
        self._start_by: dict[RequestId, float] = {}
        """Of those with a start timeout that have not ended."""
        self._executing: set[asyncio.Task[None]] = set()
        self._bodies: dict[RequestId, bytes] = {}
        self._watchers: dict[RequestId, set[asyncio.Future[None]]] = {}
        self._deadlines: dict[RequestId, asyncio.TimerHandle] = {}
        """Of those that wait and have one."""
        self._stopping = False
        self._lack_said_at = -math.inf

    def new_id(self) -> RequestId:
        """An id for a request, or for an answer that belongs to none."""
        return uuid7(self._clock(), secrets.randbits(74))

    def disk_refused(self, error: StorageError) -> None:
        """Something could not be written: told by whoever was refused, until something is written again."""
        since = self.disk_refuses[0] if self.disk_refuses is not None else time.monotonic()
        self.disk_refuses = since, str(error)

    def lacked_descriptor(self, error: BaseException) -> None:
        """Something waits, or has to come again, because no descriptor is free: logged now and then."""
        now = time.monotonic()
        if now - self._lack_said_at >= _SAY_EVERY:
            self._lack_said_at = now
            _log.warning("too many open files, so that work waits (%s); raise `ulimit -n`", error)

    def statistics(self) -> Statistics:
        """Counts, in O(1)."""
        return Statistics(self._store.accepted, *self._broker.statistics())

    # --- what callers ask ---------------------------------------------------------------------------------

    async def submit(self, app: AppId, body: bytes, wishes: SubmitOptions, owner: str = "") -> AcceptedSubmission:
        """Accept a request; durable when it returns. The input itself is judged when the request is executed.

        Raises:
            Malformed: the body is no JSON object.
            QueueFull: see `SubmitOptions.queue_limit`.
            StorageError: the disk refused; nothing was accepted.
        """
        waiting = self._broker.statistics().waiting
        if wishes.queue_limit is not None and waiting > wishes.queue_limit:
            raise QueueFull(f"{waiting} requests wait, the caller allows {wishes.queue_limit}")
        read = partial(_read_body, app, body, digest=wishes.idempotency_key is not None)
        given = await asyncio.to_thread(read) if len(body) > _LARGE_BODY else read()
        kept, source = body, None
        if given.image is not None:
            path = await self.storage.save(given.image.data, given.image.content_type)
            kept, source = _dumped({**given.value, "image_url": path}), path
        elif isinstance(url := given.value.get("image_url"), str) and "/files/" in url:
            source = self.storage.path_in(url)
        now = self._clock()
        start_by = now + wishes.start_timeout if wishes.start_timeout is not None else None
        submission = Submission(
            self.new_id(),
            app,
            now,
            kept,
            given.digest,
            wishes.idempotency_key,
            wishes.priority,
            start_by,
            owner,
            wishes.webhook,
            wishes.keeping,
            source,
            wishes.tags,
        )
        admission = await self._store.accept(submission)
        self.disk_refuses = None
        if admission.fresh:
            if waiting < _HELD_BODIES:
                self._bodies[submission.request_id] = kept
            self._enqueue(submission.request_id, app, wishes.priority, start_by, owner, wishes.keeping)
            self._start_next()
        return admission

    def position(self, request_id: RequestId) -> int:
        """Place in the queue; 0 for a request that does not wait (any more)."""
        view = self._broker.view(request_id)
        return view.position if view is not None else 0

    async def find(self, request_id: RequestId, *, expired: bool = False) -> RequestState | None:
        """How a request stands; None for an id that was never given out, or whose ending has expired.

        Args:
            request_id: its id.
            expired: report an ending that has expired too, while it is remembered: for a call that waited for it.
        """
        view = self._broker.view(request_id)
        if view is not None:
            app = self._broker.app_of(request_id)
            assert app is not None, "it has a view"
            return RequestState(app, view, self._broker.owner_of(request_id))
        stored = await self._store.find(request_id)
        if stored is None:
            return None
        if stored.ending is not None and not expired and self._is_over(stored.ending):
            return None
        # Accepted and neither live nor ended: its acceptance became durable this very moment.
        state = stored.ending or self._broker.view(request_id) or LiveView(QueueState.IN_QUEUE, 0, ())
        return RequestState(stored.app, state, stored.owner)

    async def latest(self, limit: int, owner: str = "") -> list[tuple[RequestSummary, LiveView | None]]:
        """The newest requests and those around the head of the queue, at most `limit`; how those stand that live.

        Args:
            limit: requests in all, from 4.
            owner: whose; empty: everybody's.
        """
        newest = limit // 4
        listed = await self._store.latest(newest, limit - newest, self.engine.slots + newest, owner)
        return [(one, self._broker.view(one.request_id) if one.ended_at is None else None) for one in listed]

    async def cancel(self, request_id: RequestId) -> CancelOutcome:
        """Take a request out of the queue, or tell its engine to stop."""
        match self._broker.cancel(request_id):
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
        """Return when the request moved on, logged something or ended; after `seconds` in any case."""
        if self._stopping or request_id not in self._broker:
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
        """The server goes down: nobody should wait for anything any more."""
        return self._stopping

    async def inlined(self, ending: CompletedRequest) -> dict[str, str]:
        """Data URIs for an ending whose images are answered inline, by stored path."""
        found: dict[str, str] = {}
        for image in orjson.loads(ending.payload).get("images", []):
            data = await self.storage.read(image["url"])
            if data is not None:
                encoded = base64.b64encode(data).decode()
                found[image["url"]] = f"data:{content_type_of(image['url'])};base64,{encoded}"
        return found

    # --- what is carried out ------------------------------------------------------------------------------

    async def recover(self) -> int:
        """Queue what had not ended when the last server stopped, in the order of acceptance; how many."""
        found = await self._store.to_do()
        for request_id, app, priority, start_by, owner, keeping in found:
            self._enqueue(request_id, app, priority, start_by, owner, keeping)
            if self._is_overdue(request_id):  # its start timeout passed while the server was down
                self._expire(request_id)
        self._start_next()
        return len(found)

    def stop(self) -> None:
        """Start nothing more and let go of what runs: it is still in the store as to be done."""
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
        keeping: RetentionOptions,
    ) -> None:
        self._broker.accept(request_id, app, priority, owner)
        if keeping != DEFAULT_RETENTION:
            self._keeping[request_id] = keeping
        if start_by is not None:
            self._start_by[request_id] = start_by
            delay = max(0.0, start_by - self._clock())
            timer = asyncio.get_running_loop().call_later(delay, self._expire, request_id)
            self._deadlines[request_id] = timer

    def _start_next(self) -> None:
        while not self._stopping and (request_id := self._broker.start()) is not None:
            self._forget_deadline(request_id)
            self._notify(request_id)
            self._spawn(self._execute(request_id))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self._tasks.create_task(work)
        self._executing.add(task)
        task.add_done_callback(self._executing.discard)

    async def _execute(self, request_id: RequestId) -> None:
        started_at = self._clock()
        cancelled = partial(self._broker.is_cancelled, request_id)
        try:
            outcome = await self._made(request_id, cancelled)
        except WorkerCrashed as crash:
            self._log(request_id, "ERROR", f"the worker died: {crash}")
            if self._broker.crash(request_id):
                if self._is_overdue(request_id):  # the start timeout covers retries too
                    self._expire(request_id)
                    self._start_next()
                    return
                _log.warning("the worker of request %s died (%s); it is tried once more", request_id, crash)
                if crash.pause:
                    await asyncio.sleep(crash.pause)
                self._start_next()
                return
            outcome = RequestFailed.of(500, "internal_error", "The worker died twice while it executed this request")
            if cancelled():
                outcome = RequestFailed.of(*answers.CANCELLED)
        except Exception:  # the last boundary: whatever one request does, the others go on
            _log.exception("request %s failed in a way that nobody foresaw", request_id)
            outcome = RequestFailed.of(500, "internal_error", "Internal Server Error")
        logs = self._broker.release(request_id)
        self._start_next()
        await self._end_with(request_id, outcome, started_at, logs)

    async def _made(self, request_id: RequestId, cancelled: Cancelled) -> Rendered | RequestFailed:
        """Execute it. A missing descriptor is nobody's fault: it begins again when there may be one."""
        step = partial(self._step, request_id)
        while True:
            try:
                body = self._bodies.get(request_id) or await self._store.body(request_id)
                return await self._worker.make(request_id, body, step, cancelled)
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
        """Write an ending down, however long the disk refuses, and only then tell of it."""
        app = self._broker.app_of(request_id)
        assert app is not None, "a request that ends is still in the broker"
        keeping = self._keeping.pop(request_id, DEFAULT_RETENTION)
        while True:
            try:
                done = await self._worker.keep(outcome, keeping.file_life) if isinstance(outcome, Rendered) else outcome
                ending = self._ending(request_id, app, outcome, done, started_at, logs, keeping)
                await self._store.end(ending)
                self.disk_refuses = None
                break
            except StorageError as error:
                if lacks_descriptor(error):
                    self.lacked_descriptor(error)
                    await asyncio.sleep(_LACK_SECONDS)
                    continue
                self.disk_refused(error)
                _log.error("request %s is executed but cannot be written down, trying again: %s", request_id, error)
                await asyncio.sleep(self._retry_seconds)
        self.tally.ended(ending)
        self._broker.finish(request_id)
        self._bodies.pop(request_id, None)
        self._start_by.pop(request_id, None)
        self._notify(request_id)
        self.ended.set()
        self._start_next()

    def _ending(
        self,
        request_id: RequestId,
        app: AppId,
        outcome: Rendered | RequestFailed,
        done: StoredResult | RequestFailed,
        started_at: float | None,
        logs: tuple[LogLine, ...],
        keeping: RetentionOptions,
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
            owner=self._broker.owner_of(request_id),
            kept_for=answers.kept_for(done.payload) if keeping.brief else None,
            engine=self.engine.name if started_at is not None else None,
        )

    def _is_over(self, ending: CompletedRequest) -> bool:
        """Whether its time is over, removed already or not."""
        kept_for = self._retention if ending.kept_for is None else ending.kept_for
        return ending.ended_at + kept_for < self._clock()

    def _is_overdue(self, request_id: RequestId) -> bool:
        """Whether its start timeout has passed."""
        return self._start_by.get(request_id, math.inf) <= self._clock()

    def _expire(self, request_id: RequestId) -> None:
        self._deadlines.pop(request_id, None)
        if not self._stopping and self._broker.expire(request_id):
            self._spawn(self._end_with(request_id, RequestFailed.of(*answers.NOT_STARTED)))

    def _step(self, request_id: RequestId, done: int, total: int) -> None:
        if self._broker.step(request_id, done, total, self._clock()):
            self._notify(request_id)

    def _log(self, request_id: RequestId, level: str, message: str) -> None:
        self._broker.log(request_id, LogLine(self._clock(), level, message))
        self._notify(request_id)

    def _forget_watcher(self, request_id: RequestId, watcher: asyncio.Future[None]) -> None:
        """Without it a call that waits for hours would leave one at each sign of life."""
        watchers = self._watchers.get(request_id, set())
        watchers.discard(watcher)
        if not watchers:
            self._watchers.pop(request_id, None)

    def _forget_deadline(self, request_id: RequestId) -> None:
        """It was started, or will not be; its timer would stay for as long as the caller said."""
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
    sources: SourceFetcher,
    clock: Callable[[], float] = time.time,
    retention: float = math.inf,
    *,
    retry_seconds: float = _RETRY_SECONDS,
) -> AsyncIterator[QueueService]:
    """A queue that works until the block is left; then running work goes back to the store's queue."""
    info = engine.info()
    async with asyncio.TaskGroup() as tasks:
        worker = Executor(engine, storage, sources)
        service = QueueService(store, storage, worker, info.slots, info, tasks, clock, retention, retry_seconds)
        count = await service.recover()
        if count:
            _log.info("%d requests of the last server go on", count)
        try:
            yield service
        finally:
            service.stop()


class _CheckedInput(NamedTuple):
    value: JsonObject
    image: DataUri | None
    digest: bytes


def _dumped(value: object, option: int = 0) -> bytes:
    """JSON of what was JSON before.

    Raises:
        Malformed: it is nested deeper than can be written: reading goes down 1024 levels, writing 254.
    """
    try:
        return orjson.dumps(value, option=option)
    except TypeError as error:
        raise Malformed(f"The body is nested too deeply: {error}") from error


def _read_body(app: AppId, body: bytes, *, digest: bool) -> _CheckedInput:
    """The submitted JSON, and the image inside it if there is one."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Malformed(f"The body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Malformed(f"The body has to be a JSON object, not {type(value).__name__}")
    mark = b""
    if digest:
        canonical = _dumped([app, value], orjson.OPT_SORT_KEYS)
        mark = hashlib.blake2b(canonical, digest_size=16).digest()
    image_url = value.get("image_url")
    image = None
    if isinstance(image_url, str) and image_url[:5].lower() == "data:":
        with suppress(ValueError):  # a broken one is kept as it is: the request fails with it when executed
            image = parse_data_uri(image_url)
    return _CheckedInput(value, image, mark)
