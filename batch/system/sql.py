"""SQL statements by name, read from a `.sql` file next to their module; retries while SQLite lacks a descriptor. Edge.

The file is plain SQL, so that editors and linters understand it:

    -- name: find_job
    -- Comments are allowed anywhere.
    SELECT state FROM jobs WHERE key = ?;

A name is followed by one statement or several; each ends with a semicolon.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from batch.system.descriptors import lacks_descriptor, patiently

__all__ = ["Statements", "cannot_open", "in_open_database", "load_statements"]

Value = TypeVar("Value")

_NAMED = re.compile(r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)", re.MULTILINE | re.DOTALL)


class Statements(dict[str, str]):
    """SQL by name, in the order of the file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        for name, statement in _NAMED.findall(path.read_text("utf-8")):
            if name in self:
                raise ValueError(f"{path} has two statements named {name!r}; rename one of them")
            self[name] = statement.strip()

    def __missing__(self, name: str) -> str:
        raise LookupError(f"{self._path} has no statement named {name!r}; add it, or correct the name")

    def begin_with(self, prefix: str) -> list[str]:
        """Return the statements whose names begin with `prefix`, in the order of the file."""
        return [statement for name, statement in self.items() if name.startswith(prefix)]


def load_statements(module_file: str) -> Statements:
    """Read the statements of a module from `NAME.sql` next to `NAME.py`. `module_file`: the module's `__file__`."""
    return Statements(Path(module_file).with_suffix(".sql"))


def in_open_database(work: Callable[[], Value]) -> Value:
    """Run work on an open database; retry while SQLite has no descriptor for a temporary file.

    Args:
        work: one statement, or a transaction that is rolled back when it raises.
    """
    return patiently(work, time.sleep, lacks=cannot_open)


def cannot_open(error: BaseException) -> bool:
    """Return whether SQLite could not open a file; for an open database this is a temporary file."""
    cause: BaseException | None = error
    while cause is not None:
        code = getattr(cause, "sqlite_errorcode", 0) if isinstance(cause, sqlite3.Error) else 0
        if code & 0xFF == sqlite3.SQLITE_CANTOPEN:
            return True
        cause = cause.__cause__
    return lacks_descriptor(error)
