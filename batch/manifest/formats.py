"""What every format of a manifest has for its reader. Pure but for polars types."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import polars as pl

from batch.errors import ManifestError

__all__ = ["Chunk", "Format", "refuse_twins"]


class Chunk(NamedTuple):
    """Some consecutive rows, and the lines on which they start where the format has lines."""

    frame: pl.DataFrame
    lines: list[int] | None


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
