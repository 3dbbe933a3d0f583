"""The server's request database: accepted requests and their results in one SQLite file.

One thread writes. Acceptances and results are committed in groups, with one transaction and one fsync per group, and
are durable when the awaited call returns.
"""

from __future__ import annotations

import math
import sqlite3
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import orjson

from batch.errors import InputError, StorageError
from batch.server.queue.records import (
    AcceptedSubmission,
    CompletedRequest,
    Delivery,
    DeliveryOutcome,
    LogLine,
    Priority,
    RecoveredRequest,
    RequestSummary,
    RetentionOptions,
    StoredRequest,
    Submission,
    Webhook,
)
from batch.system.group_commit import GroupCommit
from batch.system.sql import in_open_database, load_statements
from batch.types import AppId, RequestId

__all__ = ["Store"]

VERSION = 4
_STEPS = (
    ("schema", "schema_2"),
    ("upgrade_1", "upgrade_2", "schema_2"),
    ("upgrade_2", "upgrade_3"),
    ("upgrade_3",),
)
"""Statements that upgrade a file of each earlier version; the index is the version, 0 is a new file."""
REMEMBERED = 8192
"""Results cached in memory: waiting clients fetch theirs within seconds."""
KEY_SECONDS = 86400.0
"""Lifetime of an idempotency key after acceptance, if its request has ended. Its result may expire earlier."""

_SQL = load_statements(__file__)


class Store:
    """Requests on disk, an async context manager; open it with `await Store.open(path)`."""

    def __init__(self, database: sqlite3.Connection, retention: float, remembered: int) -> None:
        self._database = database
        self._retention = retention
        self._remembered = remembered
        self._writer: GroupCommit[Submission | CompletedRequest | DeliveryOutcome, AcceptedSubmission | None]
        self._writer = GroupCommit(self._write, "store", attempt=in_open_database)
        self._recent: OrderedDict[RequestId, CompletedRequest] = OrderedDict()
        self.accepted: int = database.execute(_SQL["accepted"]).fetchone()[0]
        """Requests accepted since the file was created; repeated idempotency keys are not counted."""
        self.webhooks: int = database.execute(_SQL["webhooks"]).fetchone()[0]
        """Pending callbacks, including those of unfinished requests and those that expired since the start."""

    @classmethod
    async def open(cls, path: Path, retention: float = math.inf, *, remembered: int = REMEMBERED) -> Self:
        """Open or create the file.

        Args:
            path: the file.
            retention: seconds that a result is available, unless its request set a shorter time.
            remembered: number of latest results kept in memory.

        Raises:
            InputError: a newer version wrote the file, or it is not a database.
            StorageError: the disk is full.
        """
        try:
            database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.execute("PRAGMA cache_size = -16000")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version < VERSION:
                steps = "".join(_SQL[name] for name in _STEPS[version])
                database.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {VERSION}; COMMIT;")
            if version <= VERSION:
                database.executescript(_SQL["schema_tags"])
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise StorageError(f"cannot write {path}: {error}; free disk space and restart") from error
            raise InputError(f"cannot use {path} as the request database: {error}; change --data-dir") from error
        if version > VERSION:
            database.close()
            raise InputError(f"{path} has version {version}, this restyle supports up to {VERSION}; upgrade restyle")
        return cls(database, retention, remembered)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._writer.aclose()
        self._database.close()

    async def accept(self, submission: Submission) -> AcceptedSubmission:
        """Store a submission; durable on return.

        Raises:
            StorageError: the write failed; nothing was accepted.
        """
        admission = cast(AcceptedSubmission, await self._writer.put(submission))
        self.accepted += admission.fresh
        self.webhooks += admission.fresh and submission.webhook is not None
        return admission

    async def end(self, completed: CompletedRequest) -> None:
        """Store the result of a request; durable on return. Later results of the same request are ignored.

        Raises:
            StorageError: the write failed; the request is still unfinished.
        """
        await self._writer.put(completed)
        self._remember(completed)

    def recent(self, request_id: RequestId) -> CompletedRequest | None:
        """Return the result from the in-memory cache; None if it is not cached."""
        return self._recent.get(request_id)

    async def find(self, request_id: RequestId) -> StoredRequest | None:
        """Return a request; None if the id is unknown."""
        completed = self._recent.get(request_id)
        if completed is not None:
            return StoredRequest(completed.app, completed, completed.owner)
        row = await self._writer.call(partial(self._row, "find", request_id))
        if row is None:
            return None
        stored = _stored(request_id, row)
        if stored.completed is not None:
            self._remember(stored.completed)
        return stored

    async def body(self, request_id: RequestId) -> bytes:
        """Return the input of an accepted request."""
        row = await self._writer.call(partial(self._row, "body", request_id))
        assert row is not None, f"{request_id} was accepted"
        return cast(bytes, row[0])

    async def to_do(self) -> list[RecoveredRequest]:
        """Return the unfinished requests in the order of acceptance."""
        rows = await self._writer.call(lambda: self._database.execute(_SQL["to_do"]).fetchall())
        return [
            RecoveredRequest(
                RequestId(row[0]),
                AppId(row[1]),
                Priority(row[2]),
                row[3],
                row[4],
                RetentionOptions(bool(row[5]), row[6]),
            )
            for row in rows
        ]

    async def forget(self, now: float, retention: float, limit: int) -> int:
        """Remove expired requests, at most 2 x `limit`; return their number. Durable on return.

        Args:
            now: Unix seconds.
            retention: seconds that a result is available, unless its request set a shorter time.
            limit: bounds the step, which blocks all other writes.

        Raises:
            StorageError: the write failed.
        """
        return await self._writer.call(partial(self._forget, now, retention, limit))

    async def sources(self, paths: Sequence[str]) -> set[str]:
        """Return those of `paths` that are source images of stored requests.

        Raises:
            StorageError: the read failed.
        """
        rows = await self._writer.call(partial(self._rows, "sources", orjson.dumps(paths).decode()))
        return {row[0] for row in rows}

    async def latest(self, newest: int, around: int, ahead: int, owner: str = "") -> list[RequestSummary]:
        """Return the newest requests and those around the head of the queue, newest first.

        Args:
            newest: number of requests accepted last.
            around: number of requests around the head of the queue: ended last, running or next to start.
            ahead: how many of `around` are unfinished.
            owner: only this owner's requests; empty: all.

        Raises:
            StorageError: the read failed.
        """
        values: dict[str, int | str] = {"newest": newest, "around": around, "ahead": ahead, "owner": owner}
        rows = await self._writer.call(partial(self._latest, "latest_of" if owner else "latest", values))
        return [RequestSummary._make((*row[:-1], bool(row[-1]))) for row in rows]

    async def webhooks_due(
        self, now: float, limit: int, *, busy_hosts: Sequence[str], under_way: Sequence[RequestId]
    ) -> list[Delivery]:
        """Return due callbacks, oldest first, except those to `busy_hosts` and those `under_way`.

        Raises:
            StorageError: the read failed.
        """
        values = (now, orjson.dumps(busy_hosts).decode(), orjson.dumps(under_way).decode(), limit)
        rows = await self._writer.call(partial(self._rows, "webhooks_due", *values))
        return [Delivery(RequestId(row[0]), Webhook(*row[1:4]), row[4]) for row in rows]

    async def webhook_next(self, now: float) -> float | None:
        """Return when the next callback after `now` is due; None without one.

        Raises:
            StorageError: the read failed.
        """
        rows = await self._writer.call(partial(self._rows, "webhook_next", now))
        return cast("float | None", rows[0][0])

    async def settle(self, outcome: DeliveryOutcome) -> None:
        """Store the outcome of a delivery attempt; durable on return.

        Raises:
            StorageError: the write failed.
        """
        await self._writer.put(outcome)
        self.webhooks -= outcome.due_at is None

    def _remember(self, completed: CompletedRequest) -> None:
        self._recent[completed.request_id] = completed
        if len(self._recent) > self._remembered:
            self._recent.popitem(last=False)

    # --- run in the writer thread -------------------------------------------------------------------------

    def _latest(self, statement: str, values: dict[str, int | str]) -> list[tuple[Any, ...]]:
        try:
            found = [row[0] for row in self._database.execute(_SQL[statement], values)]
        except sqlite3.Error as error:
            raise StorageError(f"cannot read the request database: {error}; check the data dir") from error
        return self._rows("listed", orjson.dumps(found).decode())

    def _row(self, statement: str, *values: object) -> tuple[Any, ...] | None:
        return cast("tuple[Any, ...] | None", self._database.execute(_SQL[statement], values).fetchone())

    def _rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            return self._database.execute(_SQL[statement], values).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"cannot read the request database: {error}; check the data dir") from error

    def _write(
        self, group: list[Submission | CompletedRequest | DeliveryOutcome]
    ) -> Sequence[AcceptedSubmission | None]:
        with self._atomic():
            gains = [self._apply(item) for item in group]
            fresh = sum(gain is not None and gain.fresh for gain in gains)
            if fresh:
                self._database.execute(_SQL["count"], (fresh,))
        return gains

    @contextmanager
    def _atomic(self) -> Iterator[None]:
        try:
            self._database.execute("BEGIN IMMEDIATE")
            yield
            self._database.execute("COMMIT")
        except BaseException as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            if not isinstance(error, sqlite3.Error):
                raise
            raise StorageError(f"cannot write the request database: {error}; free space in the data dir") from error

    def _accept(self, item: Submission) -> AcceptedSubmission:
        # A header value contains no line break, so that the keys of two owners never collide.
        key = f"{item.owner}\n{item.idempotency_key}" if item.owner and item.idempotency_key else item.idempotency_key
        values = (item.request_id, item.app, item.accepted_at, item.body, item.digest, key, item.priority)
        options = (item.start_by, item.owner, *item.retention, item.source)
        cursor = self._database.execute(_SQL["accept"], (*values, *options))
        if cursor.rowcount == 1:
            if item.webhook is not None:
                self._database.execute(_SQL["webhook"], (item.request_id, *item.webhook))
            if item.tags:
                self._database.execute(_SQL["tags"], (item.request_id, orjson.dumps(dict(item.tags)).decode()))
            return AcceptedSubmission(item.request_id, fresh=True)
        now = item.accepted_at
        earlier = self._row("earlier", now - KEY_SECONDS, self._retention, now, now, key)
        assert earlier is not None, "only an idempotency key can conflict"
        request_id, digest, is_over = earlier
        if is_over:
            self._database.execute(_SQL["free_key"], (key,))
            return self._accept(item)
        return AcceptedSubmission(RequestId(request_id), fresh=False, same_input=digest == item.digest)

    def _apply(self, item: Submission | CompletedRequest | DeliveryOutcome) -> AcceptedSubmission | None:
        match item:
            case Submission():
                return self._accept(item)
            case CompletedRequest():
                self._end(item)
            case DeliveryOutcome(request_id, None):
                self._database.execute(_SQL["webhook_over"], (request_id,))
            case DeliveryOutcome(request_id, due_at):
                self._database.execute(_SQL["webhook_again"], (due_at, request_id))
        return None

    def _end(self, item: CompletedRequest) -> None:
        logs = orjson.dumps([tuple(line) for line in item.logs]) if item.logs else None
        values = (item.ended_at, item.status, item.payload, item.started_at, item.inference_time, item.billable_units)
        self._database.execute(
            _SQL["end"],
            (*values, item.error_type, item.retryable, item.inline, logs, item.kept_for, item.engine, item.request_id),
        )

    def _forget(self, now: float, retention: float, limit: int) -> int:
        with self._atomic():
            query = {"now": now, "before": now - retention, "limit": limit}
            seqs = [row[0] for row in self._database.execute(_SQL["over"], query)]
            listed = orjson.dumps(seqs).decode()
            self._database.execute(_SQL["forget"], (listed,))
        return len(seqs)


def _stored(request_id: RequestId, row: tuple[Any, ...]) -> StoredRequest:
    app, ended_at, status, payload, started_at, inference_time, units, error_type, retryable, inline, logs = row[:-3]
    owner, kept_for, engine = row[-3:]
    if ended_at is None:
        return StoredRequest(app, None, owner)
    return StoredRequest(
        app,
        CompletedRequest(
            request_id=request_id,
            app=app,
            ended_at=ended_at,
            status=status,
            payload=payload,
            started_at=started_at,
            inference_time=inference_time,
            billable_units=units,
            error_type=error_type,
            retryable=None if retryable is None else bool(retryable),
            inline=bool(inline),
            logs=tuple(LogLine(*line) for line in orjson.loads(logs)) if logs else (),
            owner=owner,
            kept_for=kept_for,
            engine=engine,
        ),
        owner,
    )
