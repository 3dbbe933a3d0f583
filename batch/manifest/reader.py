"""Read manifests of every format, plain or compressed, in batches of bounded size. Edge.

This module handles files, formats and line numbers, but not the meaning of columns. Opening a text manifest reads all
of it, so a bad line is found before anything is paid for.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b, file_digest
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, TextIO

import polars as pl

from batch.errors import ManifestError
from batch.manifest.discovery import FoundManifest, find, local
from batch.manifest.formats.base import (
    BATCH_BYTES,
    BATCH_ROWS,
    Chunk,
    Dialect,
    Format,
    refuse_duplicate_columns,
    refuse_nul,
)
from batch.manifest.formats.csv_text import (
    Encoding,
    Separator,
    Unpack,
    as_utf8,
    encoding_of,
    named,
    separator_of,
    undecodable,
)
from batch.manifest.formats.hive import partitions_of
from batch.manifest.formats.image_folder import FILE_NAME, ImageFiles, ImageFilesWithMetadata
from batch.manifest.formats.json_file import open_json
from batch.manifest.formats.jsonl import Jsonl
from batch.manifest.inputs import shorten
from batch.manifest.types import RowBatch

__all__ = ["Manifest", "RowBatch"]

_STEP_ROWS = 16  # rows between two checks of the batch size
_LINE_BREAK = re.compile(r"\r\n|\r|\n")
_FIELD_CHARACTERS = 64 * 2**20
_ANY = Dialect()
_SEPARATORS = {"csv": ",", "tsv": "\t"}
_JSON = {"json": open_json, "jsonl": Jsonl}


def _unpack_zstd(path: Path) -> BinaryIO:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


_UNPACK: dict[str, Unpack] = {
    "": lambda path: path.open("rb"),
    ".gz": lambda path: io.BufferedReader(gzip.GzipFile(path)),
    ".bz2": lambda path: io.BufferedReader(bz2.BZ2File(path)),
    ".xz": lambda path: io.BufferedReader(lzma.LZMAFile(path)),  # noqa: SIM115 - closed by the BufferedReader
    ".zst": _unpack_zstd,
}


class Manifest:
    """An opened manifest. CSV and TSV columns are text, so `007` stays `007`; an empty field is null.

    Attributes:
        source: the source as given.
        folder: base folder of relative image paths; default: the manifest's folder.
        columns: column names in order.
        schema: column types, the same in every batch.
        rows: number of rows in `batches`.
        has_lines: whether rows have line numbers.
        notes: detected properties for the user, such as `separator ';' (found in the header)`.
        place: the file that line numbers refer to, if not the source; else None.
        has_images: whether the manifest is a folder of images.
    """

    def __init__(
        self,
        source: Path,
        folder: Path,
        found: FoundManifest,
        content: Format,
        dialect: Dialect,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.source = source
        self.folder = folder
        self.schema = content.schema
        self.columns = tuple(content.schema.names())
        self.rows = content.rows
        self.has_lines = bool(getattr(content, "has_lines", found.kind.has_lines))
        self.files = found.paths
        self.notes = (*found.notes, *notes)
        self.place = found.paths[0] if found.has_images else None
        self.has_images = found.has_images or isinstance(content, ImageFiles)
        self._content = content
        self._root = found.folder
        self._unpack = _UNPACK[found.kind.packing]
        self._dialect = dialect

    def __repr__(self) -> str:
        return f"Manifest({str(self.source)!r}, rows={self.rows}, columns={self.columns})"

    @classmethod
    def open(
        cls, source: str | Path, rows: int | None = None, dialect: Dialect = _ANY, folder: Path | None = None
    ) -> Manifest:
        """Open a file, a folder or a glob.

        Args:
            source: the file, folder or glob.
            rows: read only the first rows; None: all.
            dialect: the settings for reading it.
            folder: base folder of relative image paths; None: the manifest's folder.

        Raises:
            ManifestError: the manifest is missing, empty or unreadable; its format is unknown; its encoding is wrong; a
                line or the header is invalid. The message names the line if there is one.
        """
        path = local(source)
        found = find(path, dialect.format)
        with _explained(path, found.paths, _UNPACK[found.kind.packing], dialect):
            if found.has_images:
                dialect = dialect._replace(needed=dialect.needed | {FILE_NAME, "text"})
            content, notes = _content(found, rows, dialect)
            if found.has_images:
                content = ImageFilesWithMetadata(found.paths[0], content, dialect.image)
                if rows is None:
                    content.require_all(found.paths[0], path)
        return cls(path, found.folder if folder is None else folder, found, content, dialect, notes)

    def batches(self, size: int = BATCH_ROWS) -> Iterator[RowBatch]:
        """Yield all rows in order, at most `size` at a time; fewer if they are long or contain images.

        Raises:
            ManifestError: the file has changed or can no longer be read.
        """
        first_row = 0
        with _explained(self.source, self.files, self._unpack, self._dialect):
            for frame, lines, surrogates in self._content.chunks(size):
                yield RowBatch(first_row, frame, lines, surrogates)
                first_row += len(frame)
        if first_row != self.rows:
            raise ManifestError(f"{self.source} had {self.rows} rows and now has {first_row}; run the command again")

    def fingerprint(self) -> str:
        """Return a hash of the complete contents of the files and of their partition columns.

        A copy under another name has the same hash. For a folder of images it is the hash of their names.
        """
        if isinstance(self._content, ImageFiles):
            return self._content.fingerprint()
        total = blake2b(digest_size=16)
        for path, partition in zip(self.files, _partitions(self.files, self._root), strict=True):
            with _explained(self.source, (path,), self._unpack, self._dialect), path.open("rb") as file:
                total.update(file_digest(file, "blake2b").digest())
            if partition:
                total.update(repr(sorted(partition.items())).encode())
        return total.hexdigest()


def _content(found: FoundManifest, rows: int | None, dialect: Dialect) -> tuple[Format, tuple[str, ...]]:
    """Return the reader of the files, and notes on how it reads them."""
    name, unpack = found.kind.name, _UNPACK[found.kind.packing]
    if name == "parquet":
        from batch.manifest.formats.parquet import Parquet  # imports pyarrow, which text formats do not need

        table = Parquet(found.paths, rows, _partitions(found.paths, found.folder))
        return table, table.notes
    if name == "arrow":
        from batch.manifest.formats.arrow import Arrow

        table = Arrow(found.paths, rows, _partitions(found.paths, found.folder))
        return table, table.notes
    if not found.paths:
        return ImageFiles(found.folder, dialect.image, rows), ()
    (path,) = found.paths
    encoding = encoding_of(path, unpack, dialect.encoding)
    if name in _SEPARATORS:
        content = _Csv(path, unpack, _SEPARATORS[name], rows, encoding, dialect)
        return content, (*content.notes, *_noted(encoding))
    return _JSON[name](path, as_utf8(unpack, encoding), rows), _noted(encoding)


def _partitions(paths: Sequence[Path], folder: Path) -> list[Mapping[str, str | None]]:
    """Return each file's partition columns, from the folders between the table's folder and the file.

    Raises:
        ManifestError: a folder name cannot be parsed.
    """
    found: list[Mapping[str, str | None]] = []
    for path in paths:
        try:
            found.append(partitions_of(path.relative_to(folder).parts[:-1]))
        except ValueError as error:
            raise ManifestError(f"{str(path)!r}: {error}; rename it") from error
    return found


def _said(separator: Separator) -> tuple[str, ...]:
    return (f"separator {named(separator.character)} ({separator.origin})",) if separator.origin else ()


def _noted(encoding: Encoding) -> tuple[str, ...]:
    return () if encoding.is_utf8 else (f"encoding {encoding.name} ({encoding.origin})",)


@contextmanager
def _explained(source: Path, paths: Sequence[Path], unpack: Unpack, dialect: Dialect) -> Iterator[None]:
    """Convert exceptions of the libraries to `ManifestError`."""
    try:
        yield
    except GeneratorExit:  # closed early: do not load pyarrow just for the check below
        raise
    except UnicodeError as error:
        raise ManifestError(undecodable(paths[0], unpack, encoding_of(paths[0], unpack, dialect.encoding))) from error
    except _unreadable() as error:
        raise ManifestError(
            f"{source} cannot be read: {error}; is it complete, and does its suffix match its format?"
        ) from error


def _unreadable() -> tuple[type[Exception], ...]:
    """Return the exceptions that libraries raise for damaged or mislabelled files."""
    import pyarrow as pa  # imported only after an exception

    return OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, pl.exceptions.PolarsError


# --- formats ----------------------------------------------------------------------------------------------


class _Csv:
    """Delimited text, parsed by the standard library: only its reader reports the line of each record."""

    def __init__(
        self, path: Path, unpack: Unpack, usual: str, rows: int | None, encoding: Encoding, dialect: Dialect
    ) -> None:
        self._path, self._unpack, self._encoding, self._limit = path, unpack, encoding, rows
        # The limit is process-wide; the default of 128 KiB is too small for data URIs.
        csv.field_size_limit(max(csv.field_size_limit(), _FIELD_CHARACTERS))
        found = separator_of(self._text, usual, dialect)
        self._delimiter, self._above = found.character, found.lines_above
        self._names: list[str] = []
        self._joined: list[int] = []
        self.rows = sum(len(lines) for lines, _ in self._blocks(BATCH_ROWS))
        if not self._names:
            raise ManifestError(f"{path} is empty; the first line must name the columns")
        if not self.rows:
            raise ManifestError(f"{path} has a header and no rows; give at least one")
        self.schema = pl.Schema(dict.fromkeys(self._names, pl.String()))
        self.notes = (*_said(found), *self._unquoted())

    def chunks(self, size: int) -> Iterator[Chunk]:
        for lines, records in self._blocks(size):
            columns = dict(zip(self._names, map(list, zip(*records, strict=True)), strict=True))
            records.clear()  # free thousands of lists before building the frame
            frame = pl.DataFrame(columns, schema=self.schema)
            yield Chunk(frame.with_columns(pl.when(pl.all() != "").then(pl.all())), lines)

    @contextmanager
    def _text(self) -> Iterator[TextIO]:
        with self._unpack(self._path) as raw, io.TextIOWrapper(raw, self._encoding.codec, newline="") as text:
            yield text

    def _blocks(self, size: int) -> Iterator[tuple[list[int], list[list[str]]]]:
        """Yield records with the lines on which they start. Empty lines are skipped."""
        with self._text() as text:
            above = sum(1 for _ in islice(text, self._above))
            reader = csv.reader(text, delimiter=self._delimiter, strict=True)
            try:
                self._names = next(filter(None, reader), [])
            except csv.Error as error:
                raise self._broken(above + 1, error) from error
            refuse_nul(self._path, self._names)
            refuse_duplicate_columns(self._path, self._names)
            line, left = above + reader.line_num + 1, sys.maxsize if self._limit is None else self._limit
            while left > 0:
                records, error_after = _take(reader, min(size, left))
                lines = _starts(records, line, above + reader.line_num)
                self._check_widths(lines, records)
                if error_after is not None:
                    raise self._broken(lines[-1], error_after) from error_after
                line = above + reader.line_num + 1
                if not records:
                    return
                lines = [start for start, record in zip(lines, records, strict=False) if record]
                records = [record for record in records if record]
                left -= len(records)
                if records:
                    yield lines, records

    def _check_widths(self, lines: list[int], records: list[list[str]]) -> None:
        width = len(self._names)
        if set(map(len, records)) <= {0, width}:
            return
        for index, (line, record) in enumerate(zip(lines, records, strict=False)):
            if len(record) in {0, width}:
                continue
            joined = self._join(record)
            if len(joined) != width:
                raise self._ragged(line, record)
            records[index] = joined
            self._joined.append(line)

    def _join(self, record: list[str]) -> list[str]:
        """Join fields that an unquoted separator split: `a.jpg;a cat; with a hat`.

        A field that begins with a space continues the previous one. Exports with `;` often lack quotes; in files with
        commas, which usually have quotes, a line with too many fields remains an error.
        """
        if self._delimiter == ",":
            return record
        joined = record[:1]
        for field in record[1:]:
            if field.startswith(" "):
                joined[-1] += self._delimiter + field
            else:
                joined.append(field)
        return joined

    def _unquoted(self) -> Iterator[str]:
        count = len(self._joined)
        if count:
            rows = "1 row has" if count == 1 else f"{count:,} rows have"
            place = f"line {self._joined[0]}" if count == 1 else f"the first on line {self._joined[0]}"
            yield f"{rows} an unquoted {self._delimiter!r} before a space, read as text ({place})"

    def _ragged(self, line: int, record: list[str]) -> ManifestError:
        separator = "" if self._delimiter == "," else f" (separator {named(self._delimiter)})"
        return ManifestError(
            f"{self._path}, line {line}: {_fields(len(record))} where the header has {len(self._names)}{separator}; "
            f"quote fields that contain {self._delimiter!r} ({shorten(self._delimiter.join(record))})"
        )

    def _broken(self, line: int, error: csv.Error) -> ManifestError:
        hint = "check for an unclosed quote"
        return ManifestError(f"{self._path}, line {line}: not parseable ({error}); {hint}")


def _take(records: Iterable[list[str]], count: int) -> tuple[list[list[str]], csv.Error | None]:
    """Return at most `count` records, fewer if they are long, and the error after them, if any."""
    taken: list[list[str]] = []
    characters = 0
    try:
        while len(taken) < count and characters < BATCH_BYTES:
            before = len(taken)
            taken.extend(islice(records, min(_STEP_ROWS, count - before)))  # keeps the records before an error
            if len(taken) == before:
                break
            characters += sum(map(len, chain.from_iterable(taken[before:])))
    except csv.Error as error:
        return taken, error
    return taken, None


def _starts(records: list[list[str]], first: int, last: int) -> list[int]:
    """Return the line on which each record starts, then the line after them; they cover lines `first` to `last`."""
    if last - first + 1 == len(records):
        return list(range(first, last + 2))
    lines = [first]
    for record in records:
        lines.append(lines[-1] + 1 + sum(len(_LINE_BREAK.findall(field)) for field in record))
    return lines


def _fields(count: int) -> str:
    return f"{count} field" + "s" * (count != 1)
