"""The interface of manifest formats. Pure except for polars types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

import polars as pl

from batch.errors import ManifestError
from batch.manifest.types import LoneSurrogate

__all__ = [
    "BATCH_BYTES",
    "BATCH_ROWS",
    "Chunk",
    "Dialect",
    "Format",
    "refuse_duplicate_columns",
    "refuse_nul",
    "utf16_hint",
]

BATCH_ROWS = 4096
BATCH_BYTES = 32 * 2**20
"""Approximate maximum size of a batch of text; rows with data URIs are long."""


class Dialect(NamedTuple):
    """The settings for reading a manifest."""

    separator: str | None = None
    """Separator of CSV and TSV; None: detected from the header."""
    encoding: str | None = None
    """A Python codec; None: UTF-8. A byte order mark takes precedence."""
    needed: frozenset[str] = frozenset()
    """Names of the columns that the settings use."""
    format: str | None = None
    """Format of the file or folder; None: detected from file names."""
    image: str = "image_url"
    """Name of the image column of a folder of images."""


class Chunk(NamedTuple):
    """Consecutive rows, their line numbers (None if the format has no lines) and their lone surrogates by index."""

    frame: pl.DataFrame
    lines: list[int] | None
    surrogates: Mapping[int, LoneSurrogate] = MappingProxyType({})


class Format(Protocol):
    """The contents of a manifest; `chunks` can be called repeatedly.

    An optional attribute `has_lines` says whether rows have line numbers; without it the kind of file decides.
    """

    schema: pl.Schema
    rows: int

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yield all rows in order, at most `size` at a time."""


def refuse_duplicate_columns(path: Path, names: list[str]) -> None:
    """Refuse duplicate column names.

    Raises:
        ManifestError: a name occurs more than once.
    """
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ManifestError(f"{path} has more than one column {', '.join(map(repr, duplicates))}; rename all but one")


def refuse_nul(path: Path, names: list[str]) -> None:
    """Refuse NUL characters in column names, usually the result of reading UTF-16 as UTF-8.

    Raises:
        ManifestError: a name contains a NUL character.
    """
    header = "".join(names)
    if "\0" in header:
        hint = utf16_hint(big_endian=header.startswith("\0"))
        raise ManifestError(f"{path}: its column names contain NUL characters; {hint}")


def utf16_hint(big_endian: bool) -> str:
    """Return the advice for text with unexpected NUL characters."""
    order = "be" if big_endian else "le"
    return f'if it is UTF-16 without a byte order mark, set manifest.encoding = "utf-16-{order}"'
