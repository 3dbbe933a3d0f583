"""The planner's interfaces: a table in batches, images as tokens, facts about files.

`batch.manifest.planner` uses only these types and no file system; `reader` and `images` implement them.
Pure except for polars types.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import polars as pl

from batch.types import LocalImage

__all__ = [
    "CellError",
    "FileFact",
    "FileFacts",
    "FileKey",
    "ImageResolver",
    "LoneSurrogate",
    "Resolved",
    "RowBatch",
    "Rows",
]


class LoneSurrogate(NamedTuple):
    """A text with an unpaired surrogate, which neither a table nor a request can carry."""

    column: str
    value: str


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Consecutive manifest rows."""

    first_row: int
    """0-based position of the first row."""
    frame: pl.DataFrame
    lines: list[int] | None
    """1-based line on which each row starts, counting newlines inside quoted CSV fields; None for Parquet."""
    surrogates: Mapping[int, LoneSurrogate] = field(default_factory=dict)
    """Rows with an unpaired surrogate, by index in the batch; the frame has U+FFFD in its place."""


class Rows(Protocol):
    """A manifest that can be iterated any number of times."""

    @property
    def schema(self) -> pl.Schema:
        """Names and types of the columns, the same in every batch."""

    def batches(self, size: int = ...) -> Iterator[RowBatch]:
        """Yield all rows in order, at most `size` at a time."""


class CellError(NamedTuple):
    """The error of one cell: a stable type, and a message with the value and the fix."""

    type: str
    message: str


class Resolved(NamedTuple):
    """A valid image reference."""

    token: str
    """The job's `image_url`: the URL, the data URI, or `sha256:<hex>` of a local image."""
    image: LocalImage | None = None
    megapixels: float | None = None


class ImageResolver(Protocol):
    """Resolves the cells of the image column to tokens."""

    def resolve(self, references: Sequence[object]) -> list[Resolved | CellError]:
        """Return one result per reference (text, bytes, a mapping with `bytes` and `path`, or None), in order."""


class FileKey(NamedTuple):
    """A version of a local file: any change of the file gives another key."""

    path: str
    """Absolute path."""
    size_bytes: int
    mtime_ns: int


class FileFact(NamedTuple):
    """Facts from reading an image file. Only usable images have facts."""

    sha256: str
    megapixels: float


class FileFacts(Protocol):
    """A cache of file facts, which spares a resumed run from reading every image again."""

    def get_many(self, keys: Sequence[FileKey]) -> Mapping[FileKey, FileFact]:
        """Return the known facts of the given keys."""

    def put_many(self, facts: Mapping[FileKey, FileFact]) -> None:
        """Store facts; the cache may drop facts but must never return wrong ones."""
