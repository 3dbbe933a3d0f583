"""Read JSONL manifests with polars, and with a stricter parser where polars would change a value. Edge.

polars parses a group of lines at once. It is fast, but mishandles lone surrogates, duplicate keys, numbers beyond its
types and values of mixed types. Cheap checks detect groups that may contain these; such groups are parsed line by
line.
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
"""Integers up to here are exact as floats; beyond, a float may differ from the number as written."""


_DEEPEST = 32
"""Maximum nesting depth; deeper values cannot be written to Parquet and read back."""
_LIST = "a list of objects needs the suffix .json or --format json"
_NON_FINITE = re.compile(rb"[:\[,]\s*-?(NaN|Infinity)\b")


class _RowGroup(NamedTuple):
    """Consecutive non-empty lines; the last one has a line break."""

    first: int
    """Row number of the first line."""
    numbers: list[int]
    lines: list[bytes]
    text: bytes
    """All lines together."""
    surrogates: dict[int, LoneSurrogate]
    """Lone surrogates by index in the group; the lines have U+FFFD in their place."""


class Jsonl:
    """A JSONL file. A column has the common type of all its values, or else is text.

    A column is also text if its type would change a number: beyond 64 bits, or an integer beyond 2^53 among fractions.
    """

    _EMPTY = "is empty; give at least one line with a JSON object"
    _ONE = "each line must hold one object"

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
        """Yield all rows in order, at most `size` at a time."""
        for group in self._groups(size):
            try:
                frame = pl.read_ndjson(group.text, schema=self.schema)
            except pl.exceptions.PolarsError:
                frame = self._frame(group, self.schema)
            self._check_length(group, frame)
            yield Chunk(frame, self._lines(group.numbers), group.surrogates)

    # --- lines ---

    def _groups(self, size: int) -> Iterator[_RowGroup]:
        first = 0
        for numbers, lines in _grouped(self._numbered(), size):
            if not lines[-1].endswith(b"\n"):
                lines[-1] += b"\n"
            group = _RowGroup(first, numbers, lines, b"".join(lines), {})
            if MAY_BE_LONE.search(group.text) is not None:
                surrogates = self._replace_surrogates(group)
                group = group._replace(text=b"".join(lines), surrogates=surrogates)
            yield group
            first += len(numbers)

    def _numbered(self) -> Iterator[tuple[int, bytes]]:
        with self._unpack(self._path) as stream:
            numbered = enumerate(stream, 1)
            filled = ((number, line) for number, line in numbered if line.strip(b" \t\r\n\xef\xbb\xbf"))
            for number, line in islice(filled, self._limit):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line

    def _lines(self, numbers: list[int]) -> list[int] | None:
        """Return the line numbers of rows; None if they have none."""
        return numbers

    def _replace_surrogates(self, group: _RowGroup) -> dict[int, LoneSurrogate]:
        """Replace lone surrogates, which polars would turn into other characters; return them by row."""
        surrogates: dict[int, LoneSurrogate] = {}
        for index, line in enumerate(group.lines):
            surrogate = find_lone_surrogate(line) if MAY_BE_LONE.search(line) else None
            if surrogate is None:
                continue
            try:
                surrogate.column.encode()
            except UnicodeEncodeError as error:
                what = f"the key {surrogate.column!r} contains an unpaired surrogate (invalid Unicode)"
                raise self._wrong(group, index, what) from error
            surrogates[index] = surrogate
            group.lines[index] = replace_lone_surrogates(line)
        return surrogates

    # --- first pass: schema and validation ---

    def _take_in(self, group: _RowGroup) -> None:
        try:
            frame = pl.read_ndjson(group.text, infer_schema_length=None)
        except pl.exceptions.PolarsError:
            frame = self._frame(group)
        if _may_be_changed(frame):
            frame = self._frame(group)
        self._check_length(group, frame)
        self._refuse_duplicate_keys(group, frame)
        for name, kind in frame.schema.items():
            self._kinds[name] = _joint(self._kinds.get(name, kind), kind)
            if kind == pl.Int64 and _beyond_floats(frame[name]):
                self._large.add(name)
        self.rows += len(group.lines)

    def _refuse_duplicate_keys(self, group: _RowGroup, frame: pl.DataFrame) -> None:
        """Refuse duplicate keys, which are ambiguous: polars uses the first, other parsers use the last."""
        cells = sum(len(column) - column.null_count() for column in frame.get_columns())
        spaced = b'" :' in group.text
        if group.text.count(b'":') == cells and not spaced:
            return
        for index, line in enumerate(group.lines):
            record = self._object(group, index)
            written = line.count(b'":')
            if not spaced and (written == len(record) or written == count_keys(record)):
                continue
            if (duplicate := find_duplicate_key(line)) is not None:
                raise self._wrong(group, index, f"duplicate key {duplicate!r} in one object; remove one")

    def _final(self, name: str, kind: pl.DataType) -> pl.DataType:
        changed = kind == pl.Float64 and name in self._large
        nothing = kind == pl.Null or _EMPTY in str(kind)  # Parquet has no empty structs
        return pl.String() if changed or nothing or _depth(kind) > _DEEPEST else kind

    # --- strict parsing, line by line ---

    def _frame(self, group: _RowGroup, schema: pl.Schema | None = None) -> pl.DataFrame:
        """Parse a group strictly, keeping all digits of its numbers; without a schema, infer it from the values.

        Raises:
            ManifestError: a line is invalid; the message names it.
        """
        group.lines[:] = map(exact, group.lines)
        records = [self._object(group, index) for index in range(len(group.lines))]
        try:
            return pl.read_ndjson(b"".join(group.lines), schema=schema or self._schema_of(records))
        except pl.exceptions.PolarsError as error:
            where = f"{self._path}, lines {group.numbers[0]} to {group.numbers[-1]}"
            raise ManifestError(f"{where}: cannot be parsed together ({str(error).splitlines()[0]})") from error

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
            line.decode()  # raises for text that is not UTF-8, which the caller explains
            what = f"not parseable as JSON ({error.msg}, at character {error.colno})"
            hint = self._ONE
            if _NON_FINITE.search(line):
                hint = "JSON has no NaN and no Infinity; write null"
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
            raise ManifestError(
                f"{self._path}, lines {group.numbers[0]} to {group.numbers[-1]}: expected one object per line"
            )


def _may_be_changed(frame: pl.DataFrame) -> bool:
    """Return whether a number exceeds 64 bits, or an integer may have been rounded to a float."""
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
    """Return the type that holds values of both types unchanged (except that integers may become floats)."""
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
    """Return an instance of a polars type, which may be given as a class."""
    made: pl.DataType = kind() if isinstance(kind, type) else kind
    return made


def _grouped(records: Iterable[tuple[int, bytes]], size: int) -> Iterator[tuple[list[int], list[bytes]]]:
    """Group numbered lines, at most `size` per group, fewer if they are long."""
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
