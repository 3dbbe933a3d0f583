"""What every format of a manifest has for its reader. Pure but for polars types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

import polars as pl

from batch.errors import ManifestError
from batch.manifest.ports import Half

__all__ = ["BATCH_BYTES", "BATCH_ROWS", "Chunk", "Format", "refuse_twins"]

BATCH_ROWS = 4096
BATCH_BYTES = 32 * 2**20
"""Of text; rows with data URIs are long."""


class Chunk(NamedTuple):
    """Some consecutive rows, the lines on which they start where the format has lines, and what no frame can hold."""

    frame: pl.DataFrame
    lines: list[int] | None
    halves: Mapping[int, Half] = MappingProxyType({})


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
