"""The server's memory: one SQLite file that says which requests were accepted and how they ended.

Owns the file and its one writer thread. Acceptances and endings are written in groups, one transaction and one
fsync each, and are durable when the awaited call returns. Knows nothing of queues, HTTP or pictures.
"""

from __future__ import annotations

import re
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
from batch.model import AppId, RequestId
from batch.server.grouping import Grouped
from batch.server.records import Admission, Ending, Listed, LogLine, Priority, Recovered, Stored, Submission

__all__ = ["Store"]

VERSION = 1
REMEMBERED = 8192
"""Endings kept in memory: a client that waits for its result asks within seconds of its end."""

_SQL = {
    name: statement.strip()
    for name, statement in re.findall(
        r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)",
        Path(__file__).with_suffix(".sql").read_text("utf-8"),
        re.MULTILINE | re.DOTALL,
    )
}


class Store:
    """Requests on disk. Make it with `await Store.open(path)`; it is an async context manager."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._writer: Grouped[Submission | Ending, Admission | None] = Grouped(self._write, "store")
        self._recent: OrderedDict[RequestId, Ending] = OrderedDict()
        self.accepted: int = database.execute(_SQL["accepted"]).fetchone()[0]
        """Submits accepted ever. Repeats with the same idempotency key are not counted."""

    @classmethod
    async def open(cls, path: Path) -> Self:
        """Open or make the file.

        Raises:
            InputError: it was written by a newer version, or is no database.
        """
        try:
            database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.execute("PRAGMA cache_size = -16000")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                database.executescript(f"BEGIN IMMEDIATE; {_SQL['schema']} PRAGMA user_version = {VERSION}; COMMIT;")
        except sqlite3.Error as error:
            raise InputError(
                f"{path} cannot be used as the server's memory: {error}; choose another data dir"
            ) from error
        if version > VERSION:
            database.close()
            raise InputError(f"{path} is of version {version}, this restyle knows {VERSION}; upgrade restyle")
        return cls(database)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._writer.aclose()
        self._database.close()

    async def accept(self, submission: Submission) -> Admission:
        """Write a submission down; durable when it returns.

        Raises:
            StorageError: the disk refused; nothing was accepted.
        """
        admission = cast(Admission, await self._writer.put(submission))
        self.accepted += admission.fresh
        return admission

    async def end(self, ending: Ending) -> None:
        """Write down how a request ended; durable when it returns. The first ending of a request stands.

        Raises:
            StorageError: the disk refused; the request has not ended.
        """
        await self._writer.put(ending)
        self._remember(ending)

    def recent(self, request_id: RequestId) -> Ending | None:
        """The ending, if it is among the latest ones; costs nothing."""
        return self._recent.get(request_id)

    async def find(self, request_id: RequestId) -> Stored | None:
        """What is known of a request; None for an id that was never given out."""
        ending = self._recent.get(request_id)
        if ending is not None:
            return Stored(ending.app, ending)
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

    async def to_do(self) -> list[Recovered]:
        """Requests that have not ended, the one accepted first coming first."""
        rows = await self._writer.call(lambda: self._database.execute(_SQL["to_do"]).fetchall())
        return [Recovered(RequestId(row[0]), AppId(row[1]), Priority(row[2]), row[3]) for row in rows]

    async def latest(self, waiting: int, limit: int) -> list[Listed]:
        """The newest requests, the newest one first.

        Args:
            waiting: of those that have not ended the first so many, and none that was accepted later.
            limit: requests in all.
        """
        query = partial(self._database.execute, _SQL["latest"], (waiting, limit))
        rows = await self._writer.call(lambda: query().fetchall())
        return [Listed(*row[:9], bool(row[9])) for row in rows]

    def _remember(self, ending: Ending) -> None:
        self._recent[ending.request_id] = ending
        if len(self._recent) > REMEMBERED:
            self._recent.popitem(last=False)

    # --- in the writer's thread ---------------------------------------------------------------------------

    def _row(self, statement: str, *values: object) -> tuple[Any, ...] | None:
        return cast("tuple[Any, ...] | None", self._database.execute(_SQL[statement], values).fetchone())

    def _write(self, group: list[Submission | Ending]) -> Sequence[Admission | None]:
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
        except sqlite3.Error as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise StorageError(f"the server's memory cannot be written: {error}; free space in its data dir") from error

    def _accept(self, item: Submission) -> Admission:
        values = (item.request_id, item.app, item.accepted_at, item.body, item.digest, item.idempotency_key)
        cursor = self._database.execute(_SQL["accept"], (*values, item.priority, item.start_by))
        if cursor.rowcount == 1:
            return Admission(item.request_id, fresh=True)
        earlier = self._row("earlier", item.idempotency_key)
        assert earlier is not None, "only an idempotency key can be in the way"
        return Admission(RequestId(earlier[0]), fresh=False, same_input=earlier[1] == item.digest)

    def _apply(self, item: Submission | Ending) -> Admission | None:
        if isinstance(item, Submission):
            return self._accept(item)
        self._end(item)
        return None

    def _end(self, item: Ending) -> None:
        logs = orjson.dumps([tuple(line) for line in item.logs]) if item.logs else None
        values = (item.ended_at, item.status, item.payload, item.started_at, item.inference_time, item.billable_units)
        self._database.execute(
            _SQL["end"], (*values, item.error_type, item.retryable, item.inline, logs, item.request_id)
        )


def _stored(request_id: RequestId, row: tuple[Any, ...]) -> Stored:
    app, ended_at, status, payload, started_at, inference_time, units, error_type, retryable, inline, logs = row
    if ended_at is None:
        return Stored(app, None)
    return Stored(
        app,
        Ending(
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
        ),
    )
