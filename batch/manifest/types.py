"""What planning sees of the world: a table in batches, images as tokens, facts about files.

`batch.manifest.planner` imports this module and never a file system; `read` and `images` are the edges that fill it.
Pure but for polars types.
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
    """Text with half a character in it, one surrogate of two: no table can hold it, and no request carry it."""

    column: str
    value: str


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Some consecutive manifest rows."""

    first_row: int
    """0-based position of the first of them."""
    frame: pl.DataFrame
    lines: list[int] | None
    """1-based line on which each row starts, a newline inside a quoted CSV field counted; None for Parquet."""
    halves: Mapping[int, LoneSurrogate] = field(default_factory=dict)
    """Rows that cannot work, by place in the batch; the frame has U+FFFD for each half."""


class Rows(Protocol):
    """A manifest that can be read any number of times."""

    @property
    def schema(self) -> pl.Schema:
        """Names and types of the columns, the same in every batch."""

    def batches(self, size: int = ...) -> Iterator[RowBatch]:
        """All rows in order, at most `size` at a time."""


class CellError(NamedTuple):
    """What is wrong with one cell: a stable word, and a sentence with the value and what to do."""

    type: str
    message: str


class Resolved(NamedTuple):
    """An image reference that can be used."""

    token: str
    """What stands in the job's `image_url`: the URL, the data URI, or `sha256:<hex>` of a local image."""
    image: LocalImage | None = None
    megapixels: float | None = None


class ImageResolver(Protocol):
    """Turns the cells of the image column into tokens."""

    def resolve(self, references: Sequence[object]) -> list[Resolved | CellError]:
        """One answer for each reference (text, bytes, a mapping with `bytes` and `path`, or None), in order."""


class FileKey(NamedTuple):
    """A local file as it was when it was looked at; any change to it is another key."""

    path: str
    """Absolute."""
    size_bytes: int
    mtime_ns: int


class FileFact(NamedTuple):
    """What reading an image file told. Only usable images have facts."""

    sha256: str
    megapixels: float


class FileFacts(Protocol):
    """A cache of file facts, so that a resumed run does not read every image again."""

    def get_many(self, keys: Sequence[FileKey]) -> Mapping[FileKey, FileFact]:
        """Those that are known."""

    def put_many(self, facts: Mapping[FileKey, FileFact]) -> None:
        """Remember these; forgetting some is allowed, being wrong is not."""
