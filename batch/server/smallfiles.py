"""Small files in one SQLite file, so that a thousand of them cost one fsync. Owns `small.db` and its writer thread.

A small file on its own costs two fsyncs (its bytes, its folder) and a block; below about 100 KB a row is cheaper
(measured by SQLite's authors, sqlite.org/intern-v-extern-blob.html). Names and types are `storage`'s business.
"""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

from batch.errors import InputError, StorageError
from batch.server.grouping import Grouped

__all__ = ["SMALL_BYTES", "SmallFile", "SmallFiles"]

SMALL_BYTES = 32 * 1024
"""Up to here a file is small."""
_REMEMBERED = 1024
"""Files kept in memory, at most 32 MiB: a result is downloaded soon after it was made."""
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS small (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, data BLOB NOT NULL) STRICT"
)
"""By row id, so that the bytes are appended: names are hashes and would scatter them over the whole file."""


class SmallFile(NamedTuple):
    """A file to keep."""

    name: str
    data: bytes


class SmallFiles:
    """Bytes by name. Needs a running event loop; close it with `aclose`.

    Raises:
        InputError: the file is no database or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.execute(_SCHEMA)
        except sqlite3.Error as error:
            raise InputError(
                f"{path} cannot be used for the server's files: {error}; choose another data dir"
            ) from error
        self._writer: Grouped[SmallFile, None] = Grouped(self._write, "small-files")
        self._recent: OrderedDict[str, bytes] = OrderedDict()

    async def aclose(self) -> None:
        """Write what was handed in, then close."""
        await self._writer.aclose()
        self._database.close()

    async def save(self, name: str, data: bytes) -> None:
        """Keep a file; durable when it returns. A name that is there already keeps its bytes.

        Raises:
            StorageError: the disk refused.
        """
        await self._writer.put(SmallFile(name, data))
        self._remember(name, data)

    async def find(self, name: str) -> bytes | None:
        """The bytes, or None where there is no such file."""
        data = self._recent.get(name)
        if data is None:
            data = await self._writer.call(lambda: self._read(name))
            if data is not None:
                self._remember(name, data)
        return data

    def _remember(self, name: str, data: bytes) -> None:
        self._recent[name] = data
        if len(self._recent) > _REMEMBERED:
            self._recent.popitem(last=False)

    def _read(self, name: str) -> bytes | None:
        row = self._database.execute("SELECT data FROM small WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def _write(self, group: list[SmallFile]) -> list[None]:
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("INSERT INTO small (name, data) VALUES (?, ?) ON CONFLICT DO NOTHING", group)
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise StorageError(f"the server's files cannot be written: {error}; free space in its data dir") from error
        return [None] * len(group)
