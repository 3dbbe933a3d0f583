"""Reading manifests: CSV, TSV, JSONL and Parquet, plain or compressed, in batches of bounded size. Edge.

Owns files, their formats and the numbers of their lines; refuses to know what a column means. A text manifest is
read once from end to end when it is opened, so that a bad line is known before anything is paid for.
"""

from __future__ import annotations

import bz2
import csv
import difflib
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b, file_digest
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import polars as pl

from batch.errors import ManifestError
from batch.manifest.formats import BATCH_BYTES, BATCH_ROWS, Chunk, Format, refuse_twins
from batch.manifest.inputs import shorten
from batch.manifest.jsonl import Jsonl
from batch.manifest.ports import RowBatch

__all__ = ["Manifest", "RowBatch"]

_STEP_ROWS = 16  # between two looks at how long rows are
_LINE_BREAK = re.compile(r"\r\n|\r|\n")
_FIELD_CHARACTERS = 64 * 2**20
_TEXT = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".jsonl": None, ".ndjson": None}
_PARQUET = (".parquet", ".pq")
_KNOWN = "it may end in .csv, .tsv, .jsonl or .ndjson (each also with .gz, .zst, .bz2 or .xz), or in .parquet"


def _unpack_zstd(path: Path) -> BinaryIO:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


_UNPACK: dict[str, Callable[[Path], BinaryIO]] = {
    "": lambda path: path.open("rb"),
    ".gz": lambda path: io.BufferedReader(gzip.GzipFile(path)),
    ".bz2": lambda path: io.BufferedReader(bz2.BZ2File(path)),
    ".xz": lambda path: io.BufferedReader(lzma.LZMAFile(path)),  # noqa: SIM115 - the reader around it closes it
    ".zst": _unpack_zstd,
}


class Manifest:
    """An opened manifest. Columns of CSV and TSV are text, so that `007` stays `007`; an empty field is null.

    Attributes:
        source: as it was given.
        folder: where relative picture paths start: the manifest's own folder.
        columns: their names, in order.
        schema: their types, the same in every batch.
        rows: how many rows `batches` gives.
        has_lines: whether rows have line numbers.
    """

    def __init__(self, source: Path, folder: Path, paths: tuple[Path, ...], content: Format, has_lines: bool) -> None:
        self.source = source
        self.folder = folder
        self.schema = content.schema
        self.columns = tuple(content.schema.names())
        self.rows = content.rows
        self.has_lines = has_lines
        self.files = paths
        self._content = content

    def __repr__(self) -> str:
        return f"Manifest({str(self.source)!r}, rows={self.rows}, columns={self.columns})"

    @classmethod
    def open(cls, source: str | Path, rows: int | None = None) -> Manifest:
        """Open one file, or a folder or glob of Parquet files, or only its first `rows` rows.

        Raises:
            ManifestError: nothing is there, it is empty or unreadable, not UTF-8, a line or a header is wrong.
                The message names the line where there is one.
        """
        if not str(source).strip():
            raise ManifestError("the manifest's name is empty; name a file (is a variable of the shell not set?)")
        source = Path(source)
        paths, folder = _find(source)
        packing, delimiter, parquet = _kind(paths[0])
        with _explained(source, paths):
            content: Format
            if parquet:
                from batch.manifest.parquet import Parquet  # with pyarrow, which text does not wait for

                content = Parquet(paths, rows)
            elif delimiter is not None:
                content = _Csv(paths[0], _UNPACK[packing], delimiter, rows)
            else:
                content = Jsonl(paths[0], _UNPACK[packing], rows)
        return cls(source, folder, paths, content, not parquet)

    def batches(self, size: int = BATCH_ROWS) -> Iterator[RowBatch]:
        """All rows in order, at most `size` at a time; fewer where they are long or carry pictures.

        Raises:
            ManifestError: the file has changed or can no longer be read.
        """
        first_row = 0
        with _explained(self.source, self.files):
            for frame, lines, halves in self._content.chunks(size):
                yield RowBatch(first_row, frame, lines, halves)
                first_row += len(frame)
        if first_row != self.rows:
            raise ManifestError(f"{self.source} had {self.rows} rows and now has {first_row}; run the command again")

    def fingerprint(self) -> str:
        """Hash of the files' bytes, the whole of them: equal for a copy under another name."""
        total = blake2b(digest_size=16)
        for path in self.files:
            with _explained(self.source, (path,)), path.open("rb") as file:
                total.update(file_digest(file, "blake2b").digest())
        return total.hexdigest()


# --- finding ----------------------------------------------------------------------------------------------


def _find(source: Path) -> tuple[tuple[Path, ...], Path]:
    """The files of a source in order, and the folder that relative paths start from."""
    if source.is_dir():
        found = sorted(path for path in source.rglob("*") if _is_parquet(path))
        if not found:
            raise ManifestError(f"the folder {source} has no Parquet file in it; name a manifest file")
        return tuple(found), source
    if source.exists():
        return (source,), source.parent
    if any(character in str(source) for character in "*?["):
        fixed = next(parent for parent in source.parents if not any(c in str(parent) for c in "*?["))
        found = sorted(path for path in fixed.glob(str(source.relative_to(fixed))) if _is_parquet(path))
        if not found:
            raise ManifestError(f"no Parquet file matches {source}; only Parquet may be given as a glob")
        return tuple(found), fixed
    raise ManifestError(f"there is no manifest {source}{_near(source)}")


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in _PARQUET and not path.name.startswith((".", "_")) and path.is_file()


def _near(missing: Path) -> str:
    if not missing.parent.is_dir():
        return f"; the folder {missing.parent} is not there either"
    names = [path.name for path in islice(missing.parent.iterdir(), 10_000)]
    near = difflib.get_close_matches(missing.name, names, 3)
    return f"; did you mean {' or '.join(near)}?" if near else f"; look at what is in {missing.parent.absolute()}"


def _kind(path: Path) -> tuple[str, str | None, bool]:
    """Packing, delimiter (None: not delimited) and whether it is Parquet, from the name alone."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-1] if suffixes else ""
    if last in _PARQUET:
        return "", None, True
    packing = last if last in _UNPACK else ""
    kind = (suffixes[-2] if len(suffixes) > 1 else "") if packing else last
    if kind not in _TEXT:
        raise ManifestError(f"{path} is of no known format ({''.join(suffixes[-2:]) or 'no suffix'}); {_KNOWN}")
    return packing, _TEXT[kind], False


@contextmanager
def _explained(source: Path, paths: Iterable[Path]) -> Iterator[None]:
    """The one place where what the libraries raise becomes a sentence."""
    try:
        yield
    except GeneratorExit:  # closed early, by a run that stops: nothing to explain, and no library to load for it
        raise
    except UnicodeDecodeError as error:
        raise ManifestError(f"{source}{_undecodable(paths)} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except _unreadable() as error:
        raise ManifestError(f"{source} cannot be read: {error}; is it complete, and what its suffix says?") from error


def _unreadable() -> tuple[type[Exception], ...]:
    """What the libraries raise about a file that is not what its suffix says."""
    import pyarrow as pa  # asked for only when something was raised

    return OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, pl.exceptions.PolarsError


def _undecodable(paths: Iterable[Path]) -> str:
    for path in paths:
        with _UNPACK[_kind(path)[0]](path) as stream:
            for number, line in enumerate(stream, 1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    return f", line {number},"
    return ""


# --- formats ----------------------------------------------------------------------------------------------


class _Csv:
    """Delimited text by the standard library's reader: it alone tells on which line a record starts."""

    def __init__(self, path: Path, unpack: Callable[[Path], BinaryIO], delimiter: str, rows: int | None) -> None:
        self._path, self._unpack, self._delimiter, self._limit = path, unpack, delimiter, rows
        # Process-wide, as the csv module has it; its default of 128 KiB is less than a small data URI.
        csv.field_size_limit(max(csv.field_size_limit(), _FIELD_CHARACTERS))
        self._names: list[str] = []
        self.rows = sum(len(lines) for lines, _ in self._blocks(BATCH_ROWS))
        if not self._names:
            raise ManifestError(f"{path} is empty; its first line has to name the columns")
        if not self.rows:
            raise ManifestError(f"{path} has a header and no rows; give at least one")
        self.schema = pl.Schema(dict.fromkeys(self._names, pl.String()))

    def chunks(self, size: int) -> Iterator[Chunk]:
        for lines, records in self._blocks(size):
            columns = dict(zip(self._names, map(list, zip(*records, strict=True)), strict=True))
            records.clear()  # let go of thousands of lists before anything is made of them
            frame = pl.DataFrame(columns, schema=self.schema)
            yield Chunk(frame.with_columns(pl.when(pl.all() != "").then(pl.all())), lines)

    def _blocks(self, size: int) -> Iterator[tuple[list[int], list[list[str]]]]:
        """Records with the lines on which they start. Empty lines are passed over."""
        with self._unpack(self._path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter=self._delimiter, strict=True)
            try:
                self._names = next(filter(None, reader), [])
            except csv.Error as error:
                raise self._broken(1, error) from error
            refuse_twins(self._path, self._names)
            line, left = reader.line_num + 1, sys.maxsize if self._limit is None else self._limit
            while left > 0:
                records, error_after = _take(reader, min(size, left))
                lines = _starts(records, line, reader.line_num)
                self._check_widths(lines, records)
                if error_after is not None:
                    raise self._broken(lines[-1], error_after) from error_after
                line = reader.line_num + 1
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
        line, record = next((line, r) for line, r in zip(lines, records, strict=False) if len(r) not in {0, width})
        raise ManifestError(
            f"{self._path}, line {line}: {_fields(len(record))} where the header has {width}; "
            f"quote fields that hold {self._delimiter!r} ({shorten(self._delimiter.join(record))})"
        )

    def _broken(self, line: int, error: csv.Error) -> ManifestError:
        hint = "is a quote opened and not closed?"
        return ManifestError(f"{self._path}, line {line}: not parseable ({error}); {hint}")


def _take(records: Iterable[list[str]], count: int) -> tuple[list[list[str]], csv.Error | None]:
    """At most `count` records, fewer where they are long, and the error that came after them."""
    taken: list[list[str]] = []
    characters = 0
    try:
        while len(taken) < count and characters < BATCH_BYTES:
            before = len(taken)
            taken.extend(islice(records, min(_STEP_ROWS, count - before)))  # keeps what came before an error
            if len(taken) == before:
                break
            characters += sum(map(len, chain.from_iterable(taken[before:])))
    except csv.Error as error:
        return taken, error
    return taken, None


def _starts(records: list[list[str]], first: int, last: int) -> list[int]:
    """The line on which each record starts, and at the end the one after them; they fill `first` to `last`."""
    if last - first + 1 == len(records):
        return list(range(first, last + 2))
    lines = [first]
    for record in records:
        lines.append(lines[-1] + 1 + sum(len(_LINE_BREAK.findall(field)) for field in record))
    return lines


def _fields(count: int) -> str:
    return f"{count} field" + "s" * (count != 1)
