"""Temporary database of an audit, so that a million jobs need no more memory than a hundred.

Owns `tables.sql`. Nothing persists: SQLite deletes the file itself, even after a kill. An edge; it knows only the few
fields of journals, results and bills that are compared.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import orjson

from batch.errors import StorageError
from batch.system.sql import load_statements

__all__ = ["AuditRequest", "AuditTables"]

_CACHE_KIB = 8_000
_SQL = load_statements(__file__)


class AuditRequest(NamedTuple):
    """One request of the journal. `ended_at` is None until the request has ended."""

    request_id: str
    job_key: str
    counted_usd: float = 0.0
    units: float | None = None
    ended_at: float | None = None


class AuditTables:
    """A context manager. Methods may be called from any thread, one call at a time; all raise `StorageError`."""

    def __init__(self) -> None:
        # The empty name means a temporary database that spills from its cache to disk.
        self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for pragma in (f"cache_size = -{_CACHE_KIB}", "journal_mode = OFF", "synchronous = OFF"):
            self._connection.execute(f"PRAGMA {pragma}")
        for statement in _SQL.begin_with("create_"):
            self._connection.execute(statement)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def add_requests(self, seen: Iterable[AuditRequest]) -> None:
        """Add requests. Costs of a repeated request id add up; other jobs with the same id are counted."""
        names = ("id", "job", "usd", "units", "at")
        self._many("add_request", [dict(zip(names, one, strict=True)) for one in seen])

    def add_bills(self, bills: Iterable[tuple[str, float, float, float]]) -> None:
        """Add bills: request id, Unix seconds, units, US dollars."""
        self._many("add_bill", list(bills))

    def add_shown(self, keys: Iterable[str]) -> None:
        """Add the keys of jobs that have a row in the results."""
        self._many("add_shown", [(key,) for key in keys])

    def shown(self, keys: Sequence[str]) -> set[str]:
        """Return the given keys that were added."""
        return {key for (key,) in self.rows("find_shown", [orjson.dumps(keys).decode()])}

    def add_files(self, paths: Iterable[str]) -> None:
        """Add the paths of files that a job refers to."""
        self._many("add_file", [(path,) for path in paths])

    def files(self, paths: Sequence[str]) -> set[str]:
        """Return the given paths that were added."""
        return {path for (path,) in self.rows("find_files", [orjson.dumps(paths).decode()])}

    def rows(self, statement: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Return all rows of a statement of `tables.sql`; statements with many rows have a limit."""
        try:
            return self._connection.execute(_SQL[statement], parameters).fetchall()
        except sqlite3.OperationalError as error:
            raise _refused(error) from error

    def _many(self, statement: str, parameters: Sequence[Any]) -> None:
        try:
            self._connection.execute("BEGIN")
            self._connection.executemany(_SQL[statement], parameters)
            self._connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise _refused(error) from error


def _refused(error: sqlite3.Error) -> StorageError:
    return StorageError(
        f"cannot use the folder for temporary files ({error}); free some space, or set SQLITE_TMPDIR to another folder"
    )
