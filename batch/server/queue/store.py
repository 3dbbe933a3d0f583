"""The server's memory: one SQLite file that says which requests were accepted and how they ended.

Owns the file and its one writer thread. Acceptances and endings are written in groups, one transaction and one
fsync each, and are durable when the awaited call returns. Knows nothing of queues, HTTP or images.
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
"""Statements that bring a file of each earlier version to this one."""
REMEMBERED = 8192
"""Endings kept in memory: a client that waits for its result asks within seconds of its end."""
KEY_SECONDS = 86400.0
"""How long an idempotency key outlives the acceptance of a request that has ended; its answer may expire sooner."""

_SQL = load_statements(__file__)


class Store:
    """Requests on disk. Make it with `await Store.open(path)`; it is an async context manager."""

    def __init__(self, database: sqlite3.Connection, retention: float, remembered: int) -> None:
        self._database = database
        self._retention = retention
        self._remembered = remembered
        self._writer: GroupCommit[Submission | CompletedRequest | DeliveryOutcome, AcceptedSubmission | None]
        self._writer = GroupCommit(self._write, "store", attempt=in_open_database)
        self._recent: OrderedDict[RequestId, CompletedRequest] = OrderedDict()
        self.accepted: int = database.execute(_SQL["accepted"]).fetchone()[0]
        """Submits accepted ever. Repeats with the same idempotency key are not counted."""
        self.webhooks: int = database.execute(_SQL["webhooks"]).fetchone()[0]
        """Callbacks that are owed, now or when their request ends; those that expired since the start included."""

    @classmethod
    async def open(cls, path: Path, retention: float = math.inf, *, remembered: int = REMEMBERED) -> Self:
        """Open or make the file.

        Args:
            path: the file.
            retention: seconds that an ending is told, where the request itself wished nothing else.
            remembered: endings kept in memory.

        Raises:
            InputError: it was written by a newer version, or is no database. StorageError: there is no room for it.
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
                raise StorageError(f"{path} cannot be written: {error}; make room and start again") from error
            raise InputError(
                f"{path} cannot be used as the server's memory: {error}; choose another data dir"
            ) from error
        if version > VERSION:
            database.close()
            raise InputError(f"{path} is of version {version}, this restyle knows {VERSION}; upgrade restyle")
        return cls(database, retention, remembered)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._writer.aclose()
        self._database.close()

    async def accept(self, submission: Submission) -> AcceptedSubmission:
        """Write a submission down; durable when it returns.

        Raises:
            StorageError: the disk refused; nothing was accepted.
        """
        admission = cast(AcceptedSubmission, await self._writer.put(submission))
        self.accepted += admission.fresh
        self.webhooks += admission.fresh and submission.webhook is not None
        return admission

    async def end(self, ending: CompletedRequest) -> None:
        """Write down how a request ended; durable when it returns. The first ending of a request stands.

        Raises:
            StorageError: the disk refused; the request has not ended.
        """
        await self._writer.put(ending)
        self._remember(ending)

    def recent(self, request_id: RequestId) -> CompletedRequest | None:
        """The ending, if it is among the latest ones; costs nothing."""
        return self._recent.get(request_id)

    async def find(self, request_id: RequestId) -> StoredRequest | None:
        """What is known of a request; None for an id that was never given out."""
        ending = self._recent.get(request_id)
        if ending is not None:
            return StoredRequest(ending.app, ending, ending.owner)
        row = await self._writer.call(partial(self._row, "find", request_id))
        if row is None:
            return None
        stored = _stored(request_id, row)
        if stored.ending is not None:
            self._remember(stored.ending)
        return stored

    async def body(self, request_id: RequestId) -> bytes:
        """The input of an accepted request."""
        row = await self._writer.call(partial(self._row, "body", request_id))
        assert row is not None, f"{request_id} was accepted"
        return cast(bytes, row[0])

    async def to_do(self) -> list[RecoveredRequest]:
        """Requests that have not ended, the one accepted first coming first."""
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
        """Remove ended requests whose time is over, at most 2 x `limit`; how many. Durable when it returns.

        Args:
            now: Unix seconds.
            retention: seconds that an ending is told, where the request itself wished nothing else.
            limit: keeps the step short: the writer does nothing else meanwhile.

        Raises:
            StorageError: the disk refused.
        """
        return await self._writer.call(partial(self._forget, now, retention, limit))

    async def sources(self, paths: Sequence[str]) -> set[str]:
        """Which of these files are source images of requests that are still here.

        Raises:
            StorageError: the disk refused.
        """
        rows = await self._writer.call(partial(self._rows, "sources", orjson.dumps(paths).decode()))
        return {row[0] for row in rows}

    async def latest(self, newest: int, around: int, ahead: int, owner: str = "") -> list[RequestSummary]:
        """The newest requests and those around the head of the queue, the newest one first.

        Args:
            newest: how many of those accepted last.
            around: how many of those that ended last, run, or are the next in line.
            ahead: how many of these have not ended.
            owner: whose; empty: everybody's.

        Raises:
            StorageError: the disk refused.
        """
        values: dict[str, int | str] = {"newest": newest, "around": around, "ahead": ahead, "owner": owner}
        rows = await self._writer.call(partial(self._latest, "latest_of" if owner else "latest", values))
        return [RequestSummary._make((*row[:-1], bool(row[-1]))) for row in rows]

    async def webhooks_due(
        self, now: float, limit: int, *, busy_hosts: Sequence[str], under_way: Sequence[RequestId]
    ) -> list[Delivery]:
        """Callbacks whose time has come, the one that has waited longest first, and none of those named.

        Raises:
            StorageError: the disk refused.
        """
        values = (now, orjson.dumps(busy_hosts).decode(), orjson.dumps(under_way).decode(), limit)
        rows = await self._writer.call(partial(self._rows, "webhooks_due", *values))
        return [Delivery(RequestId(row[0]), Webhook(*row[1:4]), row[4]) for row in rows]

    async def webhook_next(self, now: float) -> float | None:
        """When the next callback comes due after `now`; None where none is waited for.

        Raises:
            StorageError: the disk refused.
        """
        rows = await self._writer.call(partial(self._rows, "webhook_next", now))
        return cast("float | None", rows[0][0])

    async def settle(self, settlement: DeliveryOutcome) -> None:
        """Write down what a try at a callback left; durable when it returns.

        Raises:
            StorageError: the disk refused.
        """
        await self._writer.put(settlement)
        self.webhooks -= settlement.due_at is None

    def _remember(self, ending: CompletedRequest) -> None:
        self._recent[ending.request_id] = ending
        if len(self._recent) > self._remembered:
            self._recent.popitem(last=False)

    # --- in the writer's thread ---------------------------------------------------------------------------

    def _latest(self, statement: str, values: dict[str, int | str]) -> list[tuple[Any, ...]]:
        try:
            found = [row[0] for row in self._database.execute(_SQL[statement], values)]
        except sqlite3.Error as error:
            raise StorageError(f"the server's memory cannot be read: {error}; check its data dir") from error
        return self._rows("listed", orjson.dumps(found).decode())

    def _row(self, statement: str, *values: object) -> tuple[Any, ...] | None:
        return cast("tuple[Any, ...] | None", self._database.execute(_SQL[statement], values).fetchone())

    def _rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            return self._database.execute(_SQL[statement], values).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"the server's memory cannot be read: {error}; check its data dir") from error

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
            raise StorageError(f"the server's memory cannot be written: {error}; free space in its data dir") from error

    def _accept(self, item: Submission) -> AcceptedSubmission:
        # A header holds no line break: no two owners' keys can come to the same.
        key = f"{item.owner}\n{item.idempotency_key}" if item.owner and item.idempotency_key else item.idempotency_key
        values = (item.request_id, item.app, item.accepted_at, item.body, item.digest, key, item.priority)
        wishes = (item.start_by, item.owner, *item.keeping, item.source)
        cursor = self._database.execute(_SQL["accept"], (*values, *wishes))
        if cursor.rowcount == 1:
            if item.webhook is not None:
                self._database.execute(_SQL["webhook"], (item.request_id, *item.webhook))
            if item.tags:
                self._database.execute(_SQL["tags"], (item.request_id, orjson.dumps(dict(item.tags)).decode()))
            return AcceptedSubmission(item.request_id, fresh=True)
        now = item.accepted_at
        earlier = self._row("earlier", now - KEY_SECONDS, self._retention, now, now, key)
        assert earlier is not None, "only an idempotency key can be in the way"
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
