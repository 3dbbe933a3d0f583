"""From rows and cells to jobs: every input resolved, every key known, nothing sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import polars as pl

from batch.model import Job, Problem

__all__ = ["Planned", "PlannedBatch"]


class Planned(NamedTuple):
    """One manifest row x cell: either a job, or the problem that keeps it from being one."""

    row: int
    cell: str
    job: Job | None
    problem: Problem | None


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """Some consecutive manifest rows with everything that is planned for them."""

    first_row: int
    frame: pl.DataFrame
    """The manifest's own columns, unchanged, one line a row."""
    items: list[Planned]
    """Row by row, within a row cell by cell: `len(frame) * cells` of them."""
