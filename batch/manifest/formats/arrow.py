"""Read Arrow manifests: memory-mapped IPC files and streams, in pieces of bounded size. Edge. Imports pyarrow."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from batch.errors import ManifestError
from batch.manifest.formats.base import BATCH_BYTES
from batch.manifest.formats.parquet import Parquet

__all__ = ["Arrow"]

_RELEASE_BATCHES = 64
_FILE_MAGIC, _FEATHER_1_MAGIC = b"ARROW1", b"FEA1"


class Arrow(Parquet):
    """One or more Arrow IPC files or streams; several are one table, as for Parquet."""

    def _look(self, path: Path) -> tuple[Any, int]:
        with _mapped(path) as source:
            return source.schema, source.count()

    def _read(self, path: Path, size: int) -> Iterator[Any]:
        with _mapped(path) as source:
            for batch in map(_plain_values, source.batches()):
                step = max(1, min(size, BATCH_BYTES * len(batch) // max(1, batch.nbytes)))
                for start in range(0, len(batch), step):
                    source.check_unchanged()
                    yield _compact(batch.slice(start, step))
                    source.release()


def _plain_values(batch: Any) -> Any:
    """Convert dictionaries of string views to plain strings: Arrow cannot take from views."""
    return _with_dictionaries(batch, _plain)


def _plain(column: Any) -> Any:
    if not pa.types.is_string_view(column.type.value_type):
        return column
    values = column.dictionary.cast(pa.string())
    return pa.DictionaryArray.from_arrays(column.indices, values, ordered=column.type.ordered)


def _compact(batch: Any) -> Any:
    """Reduce dictionaries to the values of the batch: a slice keeps the dictionary of the whole file."""
    return _with_dictionaries(batch, _own)


def _own(column: Any) -> Any:
    return column if len(column.dictionary) <= len(column) else pc.dictionary_encode(column.dictionary_decode())


def _with_dictionaries(batch: Any, change: Callable[[Any], Any]) -> Any:
    if not any(map(pa.types.is_dictionary, batch.schema.types)):
        return batch
    columns = [_changed(column, change) if pa.types.is_dictionary(column.type) else column for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _changed(column: Any, change: Callable[[Any], Any]) -> Any:
    column.validate(full=True)  # an index out of bounds would read invalid memory
    return change(column)


class _ArrowFile:
    """An open, memory-mapped file."""

    def __init__(self, file: Any, mapped: mmap.mmap) -> None:
        self._file, self._mapped = file, mapped
        self._facts = os.fstat(file.fileno())
        self._is_file = mapped[: len(_FILE_MAGIC)] == _FILE_MAGIC
        self.schema = self._open().schema

    def _open(self, fields: list[int] | None = None) -> Any:
        options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=fields)
        data = pa.py_buffer(self._mapped)
        return (pa.ipc.open_file if self._is_file else pa.ipc.open_stream)(data, options=options)

    def count(self) -> int:
        """Return the number of rows, from the metadata of the record batches."""
        if self._is_file:
            return int(self._open().count_rows())
        total = 0
        for number, batch in enumerate(self._open([0])):
            total += len(batch)
            if number % _RELEASE_BATCHES == 0:  # each batch loads the pages around it
                self.release()
        return total

    def batches(self) -> Iterator[Any]:
        """Yield all record batches, without copying their values."""
        reader = self._open()
        if not self._is_file:
            yield from reader
            return
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)

    def check_unchanged(self) -> None:
        """Check that the file was not overwritten: access to a mapped page beyond its end would kill the process.

        Raises:
            ManifestError: the size or modification time has changed.
        """
        now = os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._facts.st_size, self._facts.st_mtime_ns):
            raise ManifestError(f"{self._file.name} changed while being read; run the command again")

    def release(self) -> None:
        """Release the pages that were read; the kernel reloads a page when it is used again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)


@contextmanager
def _mapped(path: Path) -> Iterator[_ArrowFile]:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ManifestError(f"{path} is empty; give at least one row")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # closed with the last frame that uses it
        if mapped[: len(_FEATHER_1_MAGIC)] == _FEATHER_1_MAGIC:
            raise ManifestError(f"{path}: Feather version 1 is not supported; save it as version 2")
        yield _ArrowFile(file, mapped)
