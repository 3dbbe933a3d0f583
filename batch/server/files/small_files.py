"""Small files in one SQLite file, so that a thousand of them cost one fsync. Owns `small.db` and its writer thread.

A separate small file costs two fsyncs (its bytes, its folder) and a block; below about 100 KB a row is cheaper
(measured by SQLite's authors, sqlite.org/intern-v-extern-blob.html). The database also stores the expiry of files,
small or large, that have their own.
"""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import orjson

from batch.errors import InputError, StorageError
from batch.system.group_commit import GroupCommit
from batch.system.sql import in_open_database

__all__ = ["SMALL_BYTES", "SmallFile", "SmallFiles"]

SMALL_BYTES = 32 * 1024
"""Maximum size of a small file."""
_REMEMBERED = 1024
"""Files cached in memory, at most 32 MiB: a result is usually downloaded soon after it is finished."""
VERSION = 2
_SCHEMA = """
CREATE TABLE small (
    id INTEGER PRIMARY KEY,  -- appends rows; in the order of the names, which are hashes, they would be scattered
    name TEXT NOT NULL UNIQUE,
    data BLOB NOT NULL,
    saved_at REAL NOT NULL DEFAULT 0
) STRICT;
"""
_SCHEMA_2 = """
CREATE INDEX small_saved ON small (saved_at);
CREATE TABLE life (name TEXT PRIMARY KEY, expires_at REAL NOT NULL) STRICT, WITHOUT ROWID;
CREATE INDEX life_over ON life (expires_at);
"""


class SmallFile(NamedTuple):
    """A file to save."""

    name: str
    data: bytes
    saved_at: float
    """Unix seconds."""
    expires_at: float | None = None
    """Unix seconds; None: the server's retention applies."""


class SmallFiles:
    """Bytes by name. Requires a running event loop; close it with `aclose`.

    Args:
        path: the SQLite file.
        now: Unix seconds; used as the save time of files from version 1, which did not store it.

    Raises:
        InputError: the file is not a database or cannot be opened.
    """

    def __init__(self, path: Path, now: float) -> None:
        try:
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            version = self._database.execute("PRAGMA user_version").fetchone()[0]
            if version < VERSION:
                steps = _steps(self._database, now)
                self._database.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {VERSION}; COMMIT;")
        except sqlite3.Error as error:
            raise InputError(
                f"{path} cannot be used for the server's files: {error}; choose another data dir"
            ) from error
        self._writer: GroupCommit[SmallFile, None]
        self._writer = GroupCommit(self._write, "small-files", attempt=in_open_database)
        self._recent: OrderedDict[str, bytes] = OrderedDict()

    async def aclose(self) -> None:
        """Finish pending writes, then close."""
        await self._writer.aclose()
        self._database.close()

    async def save(self, file: SmallFile) -> None:
        """Save a file; durable on return. An existing name keeps its bytes and gets the new save time.

        Raises:
            StorageError: the write failed.
        """
        await self._writer.put(file)
        self._remember(file.name, file.data)

    async def expire(self, name: str, at: float) -> None:
        """Set the expiry of a file, small or large (Unix seconds).

        Raises:
            StorageError: the write failed.
        """
        await self._writer.call(partial(self._change, "INSERT OR REPLACE INTO life VALUES (?, ?)", (name, at)))

    async def find(self, name: str) -> bytes | None:
        """Return the bytes; None if there is no such file."""
        data = self._recent.get(name)
        if data is None:
            data = await self._writer.call(lambda: self._read(name))
            if data is not None:
                self._remember(name, data)
        return data

    async def old(self, before: float, limit: int) -> list[str]:
        """Return the names of small files last saved before `before` (Unix seconds), oldest first."""
        query = "SELECT name FROM small WHERE saved_at < ? ORDER BY saved_at LIMIT ?"
        return await self._writer.call(lambda: self._names(query, (before, limit)))

    async def renew(self, names: Sequence[str], at: float) -> None:
        """Set the save time of files (Unix seconds).

        Raises:
            StorageError: the write failed.
        """
        which = "name IN (SELECT value FROM json_each(?))"
        renewed = partial(
            self._change,
            f"UPDATE small SET saved_at = ? WHERE {which}",  # noqa: S608 - constants
            (at, orjson.dumps(names).decode()),
        )
        await self._writer.call(renewed)

    async def expired(self, now: float, limit: int) -> list[str]:
        """Return the names of files, small and large, whose own expiry has passed."""
        query = "SELECT name FROM life WHERE expires_at <= ? ORDER BY expires_at LIMIT ?"
        return await self._writer.call(lambda: self._names(query, (now, limit)))

    async def remove(self, names: Sequence[str], before: float) -> int:
        """Remove files not saved again since `before`, and the expiry of all `names`; return the number of files."""
        for name in names:
            self._recent.pop(name, None)
        listed = orjson.dumps(names).decode()
        which = "name IN (SELECT value FROM json_each(?))"
        removed = partial(self._change, f"DELETE FROM small WHERE {which} AND saved_at < ?", (listed, before))  # noqa: S608
        count = await self._writer.call(removed)
        await self._writer.call(partial(self._change, f"DELETE FROM life WHERE {which}", (listed,)))  # noqa: S608
        return count

    def _remember(self, name: str, data: bytes) -> None:
        self._recent[name] = data
        if len(self._recent) > _REMEMBERED:
            self._recent.popitem(last=False)

    def _read(self, name: str) -> bytes | None:
        row = self._database.execute("SELECT data FROM small WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def _names(self, query: str, values: tuple[float, int]) -> list[str]:
        return [row[0] for row in self._database.execute(query, values)]

    def _change(self, statement: str, values: tuple[object, ...]) -> int:
        try:
            return self._database.execute(statement, values).rowcount
        except sqlite3.Error as error:
            raise _unwritable(error) from error

    def _write(self, group: list[SmallFile]) -> list[None]:
        lives = [(file.name, file.expires_at) for file in group if file.expires_at is not None]
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany(
                "INSERT INTO small (name, data, saved_at) VALUES (?, ?, ?)"
                " ON CONFLICT DO UPDATE SET saved_at = excluded.saved_at",
                [file[:3] for file in group],
            )
            if lives:
                self._database.executemany("INSERT OR REPLACE INTO life VALUES (?, ?)", lives)
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise _unwritable(error) from error
        return [None] * len(group)


def _steps(database: sqlite3.Connection, now: float) -> str:
    """Return the upgrade statements for a new file, or for version 1, which had no version number and no save times."""
    if not database.execute("SELECT 1 FROM sqlite_schema WHERE name = 'small'").fetchone():
        return _SCHEMA + _SCHEMA_2
    added = "ALTER TABLE small ADD COLUMN saved_at REAL NOT NULL DEFAULT 0;"
    return f"{added} UPDATE small SET saved_at = {now!r}; {_SCHEMA_2}"  # noqa: S608 - a number, not user input


def _unwritable(error: sqlite3.Error) -> StorageError:
    return StorageError(f"cannot write the server's files: {error}; free space in the data dir")
