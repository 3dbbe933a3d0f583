"""Totals of a results table. Separate from `writer`, so that displaying them does not load pyarrow. Pure."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

__all__ = ["Totals"]


class Totals(NamedTuple):
    """Totals of the written table."""

    rows: int
    done: int
    failed: int
    unknown: int
    pending: int
    skipped: int
    errors: Counter[str]
    """Number of failed rows by error type."""
    cost_usd: float
    """Sum over the rows: a job that serves several rows counts once per row."""
    flagged: int = 0
    """Number of images flagged by the safety checker."""
    examples: dict[str, tuple[int, str]] = {}  # noqa: RUF012 - never changed
    """The first failed row of each error type, with its message."""
