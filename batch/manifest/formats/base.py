"""What every format of a manifest has for its reader. Pure but for polars types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

import polars as pl

from batch.errors import ManifestError
from batch.manifest.types import LoneSurrogate

__all__ = ["BATCH_BYTES", "BATCH_ROWS", "Chunk", "Dialect", "Format", "refuse_nul", "refuse_twins", "utf16_hint"]

BATCH_ROWS = 4096
BATCH_BYTES = 32 * 2**20
"""Of text; rows with data URIs are long."""


class Dialect(NamedTuple):
    """What the settings say about how to read a manifest."""

    separator: str | None = None
    """Of CSV and TSV; None: it is found."""
    encoding: str | None = None
    """A codec of Python's; None: UTF-8. A byte order mark decides before it."""
    needed: frozenset[str] = frozenset()
    """Names of the columns that the settings need."""
    format: str | None = None
    """Of the file or folder; None: what the names of the files say."""
    image: str = "image_url"
    """The column that holds the images, where they are a folder's."""


class Chunk(NamedTuple):
    """Some consecutive rows, the lines on which they start where the format has lines, and what no frame can hold."""

    frame: pl.DataFrame
    lines: list[int] | None
    halves: Mapping[int, LoneSurrogate] = MappingProxyType({})


class Format(Protocol):
    """What a manifest holds, and its rows again and again."""

    schema: pl.Schema
    rows: int

    def chunks(self, size: int) -> Iterator[Chunk]:
        """All rows in order, at most `size` at a time."""


def refuse_twins(path: Path, names: list[str]) -> None:
    """Two columns of one name cannot be told apart.

    Raises:
        ManifestError: there are some.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ManifestError(f"{path} has more than one column {', '.join(map(repr, twice))}; rename all but one")


def refuse_nul(path: Path, names: list[str]) -> None:
    """A NUL in a column's name: most often UTF-16 that is read as UTF-8.

    Raises:
        ManifestError: there is one.
    """
    header = "".join(names)
    if "\0" in header:
        hint = utf16_hint(big_endian=header.startswith("\0"))
        raise ManifestError(f"{path}: the names of its columns hold NUL characters; {hint}")


def utf16_hint(big_endian: bool) -> str:
    """What to say of NUL characters where none should be."""
    order = "be" if big_endian else "le"
    return f'if it is UTF-16 without a byte order mark, set manifest.encoding = "utf-16-{order}"'
