"""Read Parquet manifests in pieces of bounded size. Imports pyarrow, so it is itself imported only for Parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch.errors import ManifestError
from batch.manifest.formats.arrow_tables import IMAGE_ROWS, check_text, frame_of, holds_bytes, plain_schema
from batch.manifest.formats.base import BATCH_BYTES, Chunk, refuse_duplicate_columns
from batch.manifest.formats.hive import typed
from batch.manifest.formats.shards import Columns, Kind, joint

__all__ = ["Parquet"]

_BROKEN_SHOWN = 5


class Parquet:
    """One or more Parquet files, read with pyarrow: it decodes a few rows at a time, polars decodes whole row groups.

    The table has the columns of all files; each has a type that holds every file's values, and is null in files without
    it. The partition columns (`partitions`: values of each file by its folders) come last.
    """

    def __init__(
        self, paths: tuple[Path, ...], rows: int | None, partitions: Sequence[Mapping[str, str | None]]
    ) -> None:
        self._paths, self._partitions = paths, partitions
        columns, total = _surveyed(paths, self._look)
        if not total:
            raise ManifestError(f"{paths[0] if len(paths) == 1 else paths[0].parent} has no rows; give at least one")
        self.rows = total if rows is None else min(rows, total)
        self._folders = {name: _Folders(name, partitions, columns) for name in _keys(partitions)}
        kinds = columns.kinds | {name: folder.kind for name, folder in self._folders.items()}
        self._schema: Any = pa.schema(list(kinds.items()))
        self.schema = frame_of(pa.Table.from_batches([], self._schema)).schema
        self._has_images = any(holds_bytes(kind) for kind in self.schema.dtypes())
        self.notes = (*_of_folders(self._folders), *columns.notes())

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yield all rows in order, at most `size` at a time; fewer if they contain images."""
        size = min(size, IMAGE_ROWS) if self._has_images else size
        for table in _regrouped(self._tables(size), size):
            yield Chunk(frame_of(table), None)

    def _tables(self, size: int) -> Iterator[Any]:
        left = self.rows
        for path, partition in zip(self._paths, self._partitions, strict=True):
            with _named(path):
                for batch in self._read(path, size):
                    table = pa.Table.from_batches([batch.slice(0, left)])
                    left -= len(table)
                    check_text(path, table)
                    yield self._whole(path, table, partition)
                    if left <= 0:
                        return

    def _look(self, path: Path) -> tuple[Any, int]:
        """Return the schema of a file and its number of rows."""
        with pq.ParquetFile(path) as file:
            return file.schema_arrow, file.metadata.num_rows

    def _read(self, path: Path, size: int) -> Iterator[Any]:
        """Yield the rows of a file in record batches of at most `size`."""
        # Without pre-buffering, memory is a few pages, whatever the size of a row group.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**16) as file:
            yield from file.iter_batches(batch_size=min(size, _rows_of(file.metadata)), use_threads=False)

    def _whole(self, path: Path, table: Any, partition: Mapping[str, str | None]) -> Any:
        """Return rows of one file with all columns of the table, each in its joint type."""
        given = set(table.column_names)
        columns = []
        for field in self._schema:
            folder = self._folders.get(field.name)
            if field.name in given:
                columns.append(_cast(path, table, field))
                if folder is not None and field.name in partition:
                    folder.check(path, columns[-1], partition[field.name])
            elif folder is not None:
                columns.append(pa.repeat(folder.value(partition.get(field.name)), len(table)))
            else:
                columns.append(pa.nulls(len(table), field.type))
        return pa.table(columns, schema=self._schema)


def _surveyed(paths: Iterable[Path], look: Callable[[Path], tuple[Any, int]]) -> tuple[Columns, int]:
    """Return the columns and the number of rows of all files; one file is open at a time."""
    columns, total = Columns(), 0
    broken: list[ManifestError] = []
    places: list[Path] = []
    for path in paths:
        try:
            with _named(path):
                schema, rows = look(path)
        except ManifestError as error:
            broken.append(error)
            places.append(path)
            continue
        refuse_duplicate_columns(path, schema.names)
        if not broken:
            columns.add(path, plain_schema(path, schema))
        total += rows
    if len(broken) > 1:
        more = ", ".join(map(str, places[1 : 1 + _BROKEN_SHOWN])) + (", ..." if len(places) > 1 + _BROKEN_SHOWN else "")
        raise ManifestError(f"{broken[0]}; {len(places) - 1:,} more cannot be read either: {more}") from broken[0]
    if broken:
        raise broken[0]
    return columns, total


def _rows_of(metadata: Any) -> int:
    """Return the number of rows to decode at once: fewer if they are long."""
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    longest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return max(1, BATCH_BYTES // max(1, longest))


def _regrouped(tables: Iterable[Any], size: int) -> Iterator[Any]:
    """Regroup rows into tables of `size`, fewer if they are long: a folder may have thousands of files with one row."""
    waiting: list[Any] = []
    rows = bytes_ = 0
    for table in tables:
        start = 0
        while start < len(table):
            piece = table.slice(start, size - rows)
            if waiting and bytes_ + piece.nbytes > BATCH_BYTES:
                yield pa.concat_tables(waiting)
                waiting, rows, bytes_ = [], 0, 0
                continue
            waiting.append(piece)
            start, rows, bytes_ = start + len(piece), rows + len(piece), bytes_ + piece.nbytes
            if rows >= size:
                yield pa.concat_tables(waiting)
                waiting, rows, bytes_ = [], 0, 0
    if waiting:
        yield pa.concat_tables(waiting)


def _cast(path: Path, table: Any, field: Any) -> Any:
    column = table.column(field.name)
    if column.type == field.type:
        return column
    try:
        return column.cast(field.type)
    except pa.ArrowException as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ManifestError(
            f"{path}: the column {field.name!r} is {column.type} here, but {field.type} in the other files, which"
            f" cannot represent it ({reason}); use one type in all files"
        ) from error


# --- partition columns ------------------------------------------------------------------------------------


class _Folders:
    """A partition column; if files have it too, both values must agree."""

    def __init__(self, name: str, partitions: Sequence[Mapping[str, str | None]], columns: Columns) -> None:
        self._name = name
        texts = dict.fromkeys(text for each in partitions if (text := each.get(name)) is not None)
        own = columns.kinds.get(name)
        values = _as_column(list(texts), own)
        if values is None:
            place, example = columns.place_of(name), next(iter(texts))
            raise ManifestError(
                f"the column {name!r} is {own} in {place}, and a folder is named {name}={example}; rename one of them"
            )
        self.is_owned = own is not None
        self.kind: Kind = values.type
        self._values = dict(zip(texts, values, strict=True))

    def value(self, text: str | None) -> Any:
        """Return the value of a file whose folder has `text`; null for None."""
        return pa.scalar(None, self.kind) if text is None else self._values[text]

    def check(self, path: Path, column: Any, text: str | None) -> None:
        """Refuse rows of a file whose value differs from that of its folder.

        Raises:
            ManifestError: the values differ; the message names both.
        """
        expected = self.value(text)
        alike = pc.is_null(column) if text is None else pc.fill_null(pc.equal(column, expected), fill_value=False)
        if not pc.all(alike, min_count=0).as_py():
            other = column.filter(pc.invert(alike))[0].as_py()
            raise ManifestError(
                f"{path}: the column {self._name!r} holds {other!r} and the folder says {expected.as_py()!r}; correct"
                " one of them, or rename the folder"
            )


def _as_column(texts: list[str], own: Kind | None) -> Any | None:
    """Return folder values in a type that also holds the files' own column; None if there is no such type."""
    if not texts:
        return pa.array([], pa.large_string() if own is None else own)
    for values in (pa.array(typed(texts)), pa.array(texts, pa.large_string())):
        kind = values.type if own is None else joint(own, values.type)
        if kind is not None:
            with suppress(pa.ArrowException):
                return values.cast(pa.large_string() if pa.types.is_string(kind) else kind)
    return None


def _keys(partitions: Iterable[Mapping[str, str | None]]) -> list[str]:
    return list(dict.fromkeys(name for partition in partitions for name in partition))


def _of_folders(folders: Mapping[str, _Folders]) -> Iterator[str]:
    names = ", ".join(repr(name) for name, folder in folders.items() if not folder.is_owned)
    if names:
        yield f"columns from the names of folders: {names}"


# --- single files -----------------------------------------------------------------------------------------


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in the error if it cannot be read."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ManifestError(
            f"{path} cannot be read: {reason}; is it complete, and does its suffix match its format?"
        ) from error
