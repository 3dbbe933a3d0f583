"""Read JSON manifests: a list of objects, parsed one by one, or JSON lines in a file named .json. Edge.

The JSONL reader parses each object, so the rules for duplicate keys, unpaired surrogates and long numbers are the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import orjson

from batch.errors import ManifestError
from batch.manifest.formats.base import Format, utf16_hint
from batch.manifest.formats.json_items import LONGEST, BadJson, NotRows, split
from batch.manifest.formats.jsonl import Jsonl

__all__ = ["open_json"]

_CHUNK_BYTES = 2**20
_BLANK = b" \t\r\n\xef\xbb\xbf"


def open_json(path: Path, unpack: Callable[[Path], BinaryIO], rows: int | None) -> Format:
    """Open a .json file as a list, or as JSONL if its first line is a complete object and not the last line.

    Raises:
        ManifestError: the file is neither, or malformed.
    """
    with unpack(path) as stream:
        is_lines = _is_lines(stream)
    return Jsonl(path, unpack, rows) if is_lines else _JsonList(path, unpack, rows)


def _is_lines(stream: BinaryIO) -> bool:
    """Return whether the first non-blank line is a complete object, and another line follows."""
    first = _filled(stream, 2)
    if not first.startswith(b"{"):
        return False
    first += stream.readline(LONGEST)
    try:
        orjson.loads(first)
    except orjson.JSONDecodeError:
        return False
    return first.endswith(b"\n") and bool(_filled(stream, _CHUNK_BYTES))


def _filled(stream: BinaryIO, size: int) -> bytes:
    """Return up to `size` bytes of the stream's first non-blank line; empty at the end."""
    pieces = iter(partial(stream.readline, size), b"")
    return next(filter(None, (piece.lstrip(_BLANK) for piece in pieces)), b"")


class _JsonList(Jsonl):
    """The objects of one file. They have line numbers if no two objects share a line."""

    _EMPTY = "has no rows; give at least one object"
    _ONE = "each item of the list must be one object"

    def __init__(self, path: Path, unpack: Callable[[Path], BinaryIO], rows: int | None) -> None:
        self.has_lines = True
        super().__init__(path, unpack, rows)

    def _numbered(self) -> Iterator[tuple[int, bytes]]:
        last = 0
        try:
            with self._unpack(self._path) as stream:
                for item in islice(split(partial(stream.read, _CHUNK_BYTES)), self._limit):
                    if item.line == last:
                        self.has_lines = False
                    last = item.last_line
                    yield item.line, item.text + b"\n"
        except BadJson as error:
            hint = f"; {utf16_hint(big_endian=False)}" if error.has_nul else ""
            raise ManifestError(f"{self._path}, {self._place(error.line, error.row)}: {error}{hint}") from error
        except NotRows as error:
            advice = "save the list of rows alone, as [{...}, {...}], or one object a line as .jsonl"
            raise ManifestError(f"{self._path} is {error}, not a list of rows; {advice}") from error

    def _lines(self, numbers: list[int]) -> list[int] | None:
        return numbers if self.has_lines else None

    def _place(self, number: int, row: int) -> str:
        return f"line {number}, row {row}"
