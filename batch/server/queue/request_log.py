"""List past requests and their cost, read-only.

Uses its own connection and thread, so that a scan of a million requests blocks neither the queue nor its writer.
`batch.fal.platform` defines the wire format.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import quote

import orjson

from batch.fal.platform_queries import BillingQuery, ListingQuery, RequestOutcome, SortBy
from batch.server.limits import DEFAULT_LIMITS
from batch.server.queue.records import ListingRules, ListingWindow
from batch.system.sql import in_open_database, load_statements
from batch.types import AppId, RequestId

__all__ = ["LoggedCharge", "LoggedRequest", "RequestLog"]

_STATUSES = {
    RequestOutcome.SUCCESS: (200, 299),
    RequestOutcome.USER_ERROR: (400, 499),
    RequestOutcome.ERROR: (500, 599),
}

Value = TypeVar("Value")

_SQL = load_statements(__file__)


class LoggedRequest(NamedTuple):
    """A request in the listing. Times are Unix seconds."""

    request_id: RequestId
    app: AppId
    accepted_at: float
    started_at: float | None
    ended_at: float | None
    """None: unfinished, as far as the listing knows."""
    status: int | None
    body: bytes | None
    """The stored input; None if payloads were not requested."""
    payload: bytes | None
    """The stored result; None if payloads were not requested or the request used `sync_mode`."""


class LoggedCharge(NamedTuple):
    """A billed request."""

    request_id: RequestId
    app: AppId
    at: float
    units: float
    tags: dict[str, str] | None = None
    """None if tags were not requested."""


class RequestLog:
    """The past requests of one server; an async context manager.

    Args:
        path: the existing file of the store.
        rules: which requests the listing contains, and when.
        clock: Unix seconds.
        listed_bytes: larger inputs and results are not listed.
    """

    def __init__(
        self,
        path: Path,
        rules: ListingRules | None = None,
        clock: Callable[[], float] = time.time,
        *,
        listed_bytes: int = DEFAULT_LIMITS.listed_bytes,
    ) -> None:
        self._rules = rules or ListingRules()
        self._clock = clock
        self._listed_bytes = listed_bytes
        self._database = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="request_log")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        self._database.close()

    async def page(self, query: ListingQuery, owner: str | None = None) -> tuple[list[LoggedRequest], bool]:
        """Return one page of requests, and whether there is another page.

        Args:
            query: the filters; `apps` is ignored, because a store holds the requests of one app.
            owner: only this owner's requests; None: all.
        """
        return await self._call(partial(self._page, query, owner))

    async def charges(self, query: BillingQuery, owner: str | None = None) -> tuple[list[LoggedCharge], bool]:
        """Return one page of billed requests, newest first, and whether there is another page."""
        return await self._call(partial(self._charges, query, owner))

    async def units_a_call(self, owner: str | None = None) -> float | None:
        """Return the average units of the last 1000 billed requests; None without any."""
        query = partial(self._database.execute, _SQL["units_a_call"], {"owner": owner})
        found = await self._call(lambda: query().fetchone())
        return None if found[0] is None else float(found[0])

    # --- run in the thread --------------------------------------------------------------------------------

    def _page(self, query: ListingQuery, owner: str | None) -> tuple[list[LoggedRequest], bool]:
        known = self._clock() - self._rules.lag
        low, high = _STATUSES[query.outcome] if query.outcome is not None else (None, None)
        values = {
            "start": query.start,
            "end": query.end,
            "known": known,
            "waiting": self._rules.show_waiting,
            "low": low,
            "high": high,
            "owner": owner,
            "longest": query.sort_by is SortBy.DURATION,
            "of_ends": self._rules.window is ListingWindow.ENDED_AT,
            "request_id": query.request_id,
            "limit": query.limit + 1,
            "offset": query.offset,
        }
        found = self._database.execute(_SQL[self._way(query)], values).fetchall()
        seqs = [row[0] for row in found[: query.limit]]
        asked = {"seqs": orjson.dumps(seqs), "payloads": query.payloads, "most": self._listed_bytes}
        rows = {row[0]: _past(row, known) for row in self._database.execute(_SQL["rows"], asked)}
        # The second statement does not find a request that was removed after the first.
        return [rows[seq] for seq in seqs if seq in rows], len(found) > query.limit

    def _way(self, query: ListingQuery) -> str:
        """Return the name of the statement for a query."""
        if query.request_id is not None:
            return "by_id"
        if self._rules.show_waiting:
            return "with_waiting"
        return "by_duration" if query.sort_by is SortBy.DURATION else "by_end"

    def _charges(self, query: BillingQuery, owner: str | None) -> tuple[list[LoggedCharge], bool]:
        values = {
            "start": query.start,
            "end": query.end,
            "owner": owner,
            "request_ids": orjson.dumps(query.request_ids) if query.request_ids else None,
            "tags": orjson.dumps(query.tags),
            "limit": query.limit + 1,
            "offset": query.offset,
        }
        rows = self._database.execute(_SQL["tagged_charges" if query.tagged else "charges"], values).fetchall()
        return [_charged(*row) for row in rows[: query.limit]], len(rows) > query.limit

    async def _call(self, function: Callable[[], Value]) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._thread, in_open_database, function)


def _charged(request_id: RequestId, app: AppId, at: float, units: float, tags: str | None) -> LoggedCharge:
    return LoggedCharge(request_id, app, at, units, None if tags is None else orjson.loads(tags))


def _past(row: tuple[Any, ...], known: float) -> LoggedRequest:
    _, request_id, app, accepted_at, started_at, ended_at, status, body, payload = row
    if ended_at is None or ended_at > known:
        started_at = ended_at = status = payload = None
    return LoggedRequest(request_id, app, accepted_at, started_at, ended_at, status, body, payload)
