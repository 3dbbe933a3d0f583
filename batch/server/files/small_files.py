"""Small files in one SQLite file, so that a thousand of them cost one fsync. Owns `small.db` and its writer thread.

A small file on its own costs two fsyncs (its bytes, its folder) and a block; below about 100 KB a row is cheaper
(measured by SQLite's authors, sqlite.org/intern-v-extern-blob.html). Names and types are `storage`'s business. It
also remembers which files, small or large, have an end of their own.
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
"""Up to here a file is small."""
_REMEMBERED = 1024
"""Files kept in memory, at most 32 MiB: a result is downloaded soon after it was made."""
VERSION = 2
_SCHEMA = """
CREATE TABLE small (
    id INTEGER PRIMARY KEY,  -- so that the bytes are appended: names are hashes and would scatter them over the file
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
    """A file to keep."""

    name: str
    data: bytes
    saved_at: float
    """Unix seconds."""
    expires_at: float | None = None
    """It has an end of its own."""


class SmallFiles:
    """Bytes by name. Needs a running event loop; close it with `aclose`.

    Args:
        path: of the SQLite file.
        now: Unix seconds; files of the first version, which knew no instants, are as of now.

    Raises:
        InputError: the file is no database or cannot be opened.
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
        """Write what was handed in, then close."""
        await self._writer.aclose()
        self._database.close()

    async def save(self, file: SmallFile) -> None:
        """Keep a file; durable when it returns. A name that is there already keeps its bytes and is as good as new.

        Raises:
            StorageError: the disk refused.
        """
        await self._writer.put(file)
        self._remember(file.name, file.data)

    async def expire(self, name: str, at: float) -> None:
        """Give a file, small or large, an end of its own.

        Raises:
            StorageError: the disk refused.
        """
        await self._writer.call(partial(self._change, "INSERT OR REPLACE INTO life VALUES (?, ?)", (name, at)))

    async def find(self, name: str) -> bytes | None:
        """The bytes, or None where there is no such file."""
        data = self._recent.get(name)
        if data is None:
            data = await self._writer.call(lambda: self._read(name))
            if data is not None:
                self._remember(name, data)
        return data

    async def old(self, before: float, limit: int) -> list[str]:
        """Names of small files that were last saved before an instant, the oldest first."""
        query = "SELECT name FROM small WHERE saved_at < ? ORDER BY saved_at LIMIT ?"
        return await self._writer.call(lambda: self._names(query, (before, limit)))

    async def renew(self, names: Sequence[str], at: float) -> None:
        """Take files as saved at an instant (Unix seconds).

        Raises:
            StorageError: the disk refused.
        """
        which = "name IN (SELECT value FROM json_each(?))"
        renewed = partial(
            self._change,
            f"UPDATE small SET saved_at = ? WHERE {which}",  # noqa: S608 - constants
            (at, orjson.dumps(names).decode()),
        )
        await self._writer.call(renewed)

    async def expired(self, now: float, limit: int) -> list[str]:
        """Names of files, small and large, whose own end has come."""
        query = "SELECT name FROM life WHERE expires_at <= ? ORDER BY expires_at LIMIT ?"
        return await self._writer.call(lambda: self._names(query, (now, limit)))

    async def remove(self, names: Sequence[str], before: float) -> int:
        """Forget files that were not saved again since an instant, and the ends of all that are named; how many."""
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
    """From an empty file, or from version 1, which had no version number and no instants: its files are as of now."""
    if not database.execute("SELECT 1 FROM sqlite_schema WHERE name = 'small'").fetchone():
        return _SCHEMA + _SCHEMA_2
    added = "ALTER TABLE small ADD COLUMN saved_at REAL NOT NULL DEFAULT 0;"
    return f"{added} UPDATE small SET saved_at = {now!r}; {_SCHEMA_2}"  # noqa: S608 - a number of our own


def _unwritable(error: sqlite3.Error) -> StorageError:
    return StorageError(f"the server's files cannot be written: {error}; free space in its data dir")
