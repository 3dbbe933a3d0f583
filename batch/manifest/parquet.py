"""Parquet manifests, in pieces of bounded size. Loads pyarrow: imported only where a manifest is Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from batch.errors import ManifestError
from batch.manifest.formats import Chunk, refuse_twins

__all__ = ["Parquet"]

_PICTURE_ROWS = 64  # of one that carries the pictures themselves


class Parquet:
    """One or more Parquet files, by pyarrow: it decodes a few rows at a time where polars takes a row group."""

    def __init__(self, paths: tuple[Path, ...], rows: int | None) -> None:
        self._paths = paths
        schemas, total = [], 0
        for path in paths:
            with _named(path), pq.ParquetFile(path) as file:
                schemas.append(file.schema_arrow.remove_metadata())
                total += file.metadata.num_rows
            refuse_twins(path, schemas[-1].names)
            if set(schemas[-1].names) != set(schemas[0].names):
                odd = ", ".join(sorted(set(schemas[-1].names) ^ set(schemas[0].names)))
                raise ManifestError(f"{path} and {paths[0]} differ in columns: {odd}")
        if not total:
            raise ManifestError(f"{paths[0] if len(paths) == 1 else paths[0].parent} has no rows; give at least one")
        self.rows = total if rows is None else min(rows, total)
        self._schema: Any = pa.unify_schemas(schemas, promote_options="permissive")
        self.schema = _frame(pa.Table.from_batches([], self._schema)).schema
        self._has_pictures = any(_holds_bytes(kind) for kind in self.schema.dtypes())

    def chunks(self, size: int) -> Iterator[Chunk]:
        """All rows in order, at most `size` at a time; fewer where they carry pictures."""
        left = self.rows
        size = min(size, _PICTURE_ROWS) if self._has_pictures else size
        for path in self._paths:
            # Unbuffered ahead and read in pieces: memory is a few pages, whatever the size of a row group.
            with _named(path), pq.ParquetFile(path, pre_buffer=False, buffer_size=2**16) as file:
                for batch in file.iter_batches(batch_size=size, use_threads=False):
                    if left <= 0:
                        return
                    table = pa.Table.from_batches([batch.slice(0, left)]).select(self._schema.names)
                    left -= len(table)
                    _check_text(path, table)
                    if len(table):
                        yield Chunk(_frame(table.cast(self._schema)), None)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say which file of a folder it is that cannot be read."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise ManifestError(f"{path} cannot be read: {reason}; is it complete, and what its suffix says?") from error


def _check_text(path: Path, table: Any) -> None:
    """Nobody else does, and polars ends the process over text that is none."""
    for name, column in zip(table.schema.names, table.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            what = f"the column {name!r} holds what its type does not allow ({str(error).splitlines()[0]})"
            raise ManifestError(f"{path}: {what}; write it again, text as UTF-8") from error


def _frame(table: Any) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _holds_bytes(kind: pl.DataType) -> bool:
    if isinstance(kind, pl.Struct):
        return any(_holds_bytes(field.dtype) for field in kind.fields if isinstance(field.dtype, pl.DataType))
    return kind == pl.Binary
