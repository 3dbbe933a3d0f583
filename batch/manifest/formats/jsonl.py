"""JSONL manifests: one JSON object a line, parsed by polars, with care where polars would change a value. Edge.

polars reads a group of lines in one go, and is quick and mostly right. It is not trusted with halves of characters,
keys that stand twice, numbers that its types cannot hold, and values that do not fit together: groups in which there
may be some are found by cheap signs, and looked at line by line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson
import polars as pl

from batch.errors import ManifestError
from batch.manifest.formats.base import BATCH_BYTES, BATCH_ROWS, Chunk, utf16_hint
from batch.manifest.formats.json_text import (
    MAY_BE_LONE,
    count_keys,
    exact,
    find_duplicate_key,
    find_lone_surrogate,
    replace_lone_surrogates,
)
from batch.manifest.inputs import shorten
from batch.manifest.types import LoneSurrogate

__all__ = ["Jsonl"]

_FLOAT_EXACT = 2**53
"""Up to here every whole number is a float; beyond it a float may be another number than was written."""


_DEEPEST = 32
"""Lists and objects in one another; a Parquet file of deeper ones cannot be written, or read again."""
_LIST = "a list of objects is read from a file with the ending .json, or with --format json"
_NO_NUMBER = re.compile(rb"[:\[,]\s*-?(NaN|Infinity)\b")


class _RowGroup(NamedTuple):
    """Some consecutive lines that are not empty, the last one ended."""

    first: int
    """Row of the first of them."""
    numbers: list[int]
    lines: list[bytes]
    text: bytes
    """All of them."""
    halves: dict[int, LoneSurrogate]
    """By place in the group; the lines hold U+FFFD instead."""


class Jsonl:
    """A column's type is the one that fits all of its values; where they are of several kinds, it is text.

    So is a column with a number that its type would change: beyond 64 bits, or beyond 2^53 among fractions.
    """

    _EMPTY = "is empty; give at least one line with a JSON object"
    _ONE = "each line holds one object"

    def __init__(self, path: Path, unpack: Callable[[Path], BinaryIO], rows: int | None) -> None:
        self._path, self._unpack, self._limit = path, unpack, rows
        self.rows = 0
        self._kinds: dict[str, pl.DataType] = {}
        self._large: set[str] = set()
        for group in self._groups(BATCH_ROWS):
            self._take_in(group)
        if not self.rows:
            raise ManifestError(f"{path} {self._EMPTY}")
        if not self._kinds:
            raise ManifestError(f"{path} names no columns: its objects are empty")
        self.schema = pl.Schema({name: self._final(name, kind) for name, kind in self._kinds.items()})

    def chunks(self, size: int) -> Iterator[Chunk]:
        """All rows in order, at most `size` at a time."""
        for group in self._groups(size):
            try:
                frame = pl.read_ndjson(group.text, schema=self.schema)
            except pl.exceptions.PolarsError:
                frame = self._frame(group, self.schema)
            self._check_length(group, frame)
            yield Chunk(frame, self._lines(group.numbers), group.halves)

    # --- lines ---

    def _groups(self, size: int) -> Iterator[_RowGroup]:
        first = 0
        for numbers, lines in _grouped(self._numbered(), size):
            if not lines[-1].endswith(b"\n"):
                lines[-1] += b"\n"
            group = _RowGroup(first, numbers, lines, b"".join(lines), {})
            if MAY_BE_LONE.search(group.text) is not None:
                halves = self._mend(group)
                group = group._replace(text=b"".join(lines), halves=halves)
            yield group
            first += len(numbers)

    def _numbered(self) -> Iterator[tuple[int, bytes]]:
        with self._unpack(self._path) as stream:
            numbered = enumerate(stream, 1)
            filled = ((number, line) for number, line in numbered if line.strip(b" \t\r\n\xef\xbb\xbf"))
            for number, line in islice(filled, self._limit):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line

    def _lines(self, numbers: list[int]) -> list[int] | None:
        """The lines of rows, where they have some."""
        return numbers

    def _mend(self, group: _RowGroup) -> dict[int, LoneSurrogate]:
        """Replace halves of characters, which polars would make into others, and tell in which rows there were some."""
        halves: dict[int, LoneSurrogate] = {}
        for index, line in enumerate(group.lines):
            half = find_lone_surrogate(line) if MAY_BE_LONE.search(line) else None
            if half is None:
                continue
            try:
                half.column.encode()
            except UnicodeEncodeError as error:
                what = f"the key {half.column!r} holds half a character; write it again"
                raise self._wrong(group, index, what) from error
            halves[index] = half
            group.lines[index] = replace_lone_surrogates(line)
        return halves

    # --- the first time through: what the columns are ---

    def _take_in(self, group: _RowGroup) -> None:
        try:
            frame = pl.read_ndjson(group.text, infer_schema_length=None)
        except pl.exceptions.PolarsError:
            frame = self._frame(group)
        if _may_be_changed(frame):
            frame = self._frame(group)
        self._check_length(group, frame)
        self._refuse_twins(group, frame)
        for name, kind in frame.schema.items():
            self._kinds[name] = _joint(self._kinds.get(name, kind), kind)
            if kind == pl.Int64 and _beyond_floats(frame[name]):
                self._large.add(name)
        self.rows += len(group.lines)

    def _refuse_twins(self, group: _RowGroup, frame: pl.DataFrame) -> None:
        """Of two equal keys polars takes the first, others the last: nobody can tell which one was meant."""
        cells = sum(len(column) - column.null_count() for column in frame.get_columns())
        spaced = b'" :' in group.text
        if group.text.count(b'":') == cells and not spaced:
            return
        for index, line in enumerate(group.lines):
            record = self._object(group, index)
            written = line.count(b'":')
            if not spaced and (written == len(record) or written == count_keys(record)):
                continue
            if (twin := find_duplicate_key(line)) is not None:
                raise self._wrong(
                    group, index, f"the key {twin!r} stands twice in one object; keep the one that is meant"
                )

    def _final(self, name: str, kind: pl.DataType) -> pl.DataType:
        changed = kind == pl.Float64 and name in self._large
        nothing = kind == pl.Null or _EMPTY in str(kind)  # the results, a Parquet file, know no object without fields
        return pl.String() if changed or nothing or _depth(kind) > _DEEPEST else kind

    # --- line by line, where polars alone will not do ---

    def _frame(self, group: _RowGroup, schema: pl.Schema | None = None) -> pl.DataFrame:
        """Parse a group in which polars alone stumbles, or changes a number; without a schema, by that of its values.

        Raises:
            ManifestError: a line is wrong; it is named.
        """
        group.lines[:] = map(exact, group.lines)
        records = [self._object(group, index) for index in range(len(group.lines))]
        try:
            return pl.read_ndjson(b"".join(group.lines), schema=schema or self._schema_of(records))
        except pl.exceptions.PolarsError as error:
            where = f"{self._path}, lines {group.numbers[0]} to {group.numbers[-1]}"
            raise ManifestError(f"{where}: cannot be read together ({str(error).splitlines()[0]})") from error

    def _schema_of(self, records: list[dict[str, Any]]) -> pl.Schema:
        kinds: dict[str, pl.DataType] = {}
        for record in records:
            for name, value in record.items():
                kinds[name] = _joint(kinds.get(name, _NULL), _kind_of(value))
                if type(value) is int and int(float(value)) != value:
                    self._large.add(name)
        return pl.Schema(kinds)

    def _object(self, group: _RowGroup, index: int) -> dict[str, Any]:
        line = group.lines[index]
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            line.decode()  # the caller knows what to say of text that is not UTF-8
            what = f"not parseable as JSON ({error.msg}, at character {error.colno})"
            hint = self._ONE
            if _NO_NUMBER.search(line):
                hint = "JSON has no NaN and no Infinity, write null"
            elif b"\0" in line:
                hint = utf16_hint(line.startswith(b"\0"))
            elif line.lstrip().startswith(b"["):
                hint = f"{hint}; {_LIST}"
            raise self._wrong(group, index, f"{what}; {hint}") from error
        if not isinstance(record, dict):
            shown = shorten(line.decode().strip(), 40)
            hint = f"{self._ONE}; {_LIST}" if isinstance(record, list) else self._ONE
            raise self._wrong(group, index, f"{shown} is not a JSON object; {hint}")
        return record

    def _wrong(self, group: _RowGroup, index: int, what: str) -> ManifestError:
        return ManifestError(f"{self._path}, {self._place(group.numbers[index], group.first + index)}: {what}")

    def _place(self, number: int, row: int) -> str:  # noqa: ARG002 - for formats in which rows share lines
        return f"line {number}"

    def _check_length(self, group: _RowGroup, frame: pl.DataFrame) -> None:
        if len(frame) != len(group.lines):
            raise ManifestError(f"{self._path}, lines {group.numbers[0]} to {group.numbers[-1]}: not one object a line")


def _may_be_changed(frame: pl.DataFrame) -> bool:
    """Whether there is a number beyond 64 bits, or a whole one that may have been rounded to a float."""
    if "Int128" in str(frame.schema):
        return True
    floats = (column for column in frame.get_columns() if column.dtype == pl.Float64)
    return any(bool((column.abs() >= _FLOAT_EXACT).any()) for column in floats)


def _beyond_floats(column: pl.Series) -> bool:
    return bool((column.cast(pl.Float64).cast(pl.Int64, strict=False).ne_missing(column)).any())


# --- kinds of values --------------------------------------------------------------------------------------

_NULL = pl.Null()
_EMPTY = str(pl.Struct({}))
_PLAIN: dict[type, pl.DataType] = {
    type(None): _NULL, bool: pl.Boolean(), int: pl.Int64(), float: pl.Float64(), str: pl.String(),
}  # fmt: skip


def _kind_of(value: Any) -> pl.DataType:
    plain = _PLAIN.get(type(value))
    if plain is not None:
        return plain
    if isinstance(value, list):
        inner: pl.DataType = _NULL
        for item in value:
            inner = _joint(inner, _kind_of(item))
        return pl.List(inner)
    return pl.Struct({name: _kind_of(item) for name, item in value.items()})


def _joint(left: pl.DataType, right: pl.DataType) -> pl.DataType:
    """The type that values of both fit in without being changed, floats for whole numbers aside."""
    if right in {left, _NULL}:
        return left
    if left == _NULL:
        return right
    if left.is_numeric() and right.is_numeric():
        return pl.Float64()
    if isinstance(left, pl.List) and isinstance(right, pl.List):
        return pl.List(_joint(_value(left.inner), _value(right.inner)))
    if isinstance(left, pl.Struct) and isinstance(right, pl.Struct):
        fields = {field.name: _value(field.dtype) for field in left.fields}
        for field in right.fields:
            kind = _value(field.dtype)
            fields[field.name] = _joint(fields.get(field.name, kind), kind)
        return pl.Struct(fields)
    return pl.String()


def _depth(kind: pl.DataType) -> int:
    if isinstance(kind, pl.List):
        return 1 + _depth(_value(kind.inner))
    if isinstance(kind, pl.Struct):
        return 1 + max((_depth(_value(field.dtype)) for field in kind.fields), default=0)
    return 0


def _value(kind: Any) -> pl.DataType:
    """A type as its value: the class itself says the same in polars."""
    made: pl.DataType = kind() if isinstance(kind, type) else kind
    return made


def _grouped(records: Iterable[tuple[int, bytes]], size: int) -> Iterator[tuple[list[int], list[bytes]]]:
    """Numbered lines in groups of at most `size`, fewer where they are long."""
    lines: list[int] = []
    group: list[bytes] = []
    total = 0
    for line, record in records:
        lines.append(line)
        group.append(record)
        total += len(record)
        if len(group) >= size or total >= BATCH_BYTES:
            yield lines, group
            lines, group, total = [], [], 0
    if group:
        yield lines, group
