"""What a results table adds up to. Apart from `sink`, so that who only shows it need not load pyarrow. Pure."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

__all__ = ["Totals"]


class Totals(NamedTuple):
    """What the written table holds."""

    rows: int
    done: int
    failed: int
    unknown: int
    pending: int
    skipped: int
    errors: Counter[str]
    """Failed rows by error type."""
    cost_usd: float
    """Sum over the rows: a job that serves several rows counts with each of them."""
    flagged: int = 0
    """Images that the safety checker flagged."""
    examples: dict[str, tuple[int, str]] = {}  # noqa: RUF012 - never changed
    """For each error type the first row with it, and its message."""
