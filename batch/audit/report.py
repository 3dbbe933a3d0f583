"""Findings of an audit: checks with their numbers and examples, as a table and as JSON. Pure.

Owns the wording of the report. The numbers come from `batch.audit.checks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from batch.types import Json, JsonObject

__all__ = ["EXAMPLES", "AuditReport", "Check", "Mismatch", "Remark", "Repair"]

EXAMPLES = 10
"""Number of examples shown per mismatch."""


@dataclass(slots=True)
class Mismatch:
    """One kind of mismatch, counted as it occurs."""

    what: str
    """A sentence without its number, for example `images are missing`."""
    advice: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def met(self, example: str, times: int = 1) -> None:
        """Count a mismatch and keep the first ten examples."""
        self.count += times
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)

    def to_json(self) -> JsonObject:
        """Return plain JSON values."""
        return {"what": self.what, "count": self.count, "advice": self.advice, "examples": list(self.examples)}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    sum: str
    """The numbers, as a sentence."""
    mismatches: tuple[Mismatch, ...] = ()
    """The kinds that were checked; one without a finding has the count 0."""
    compared: bool = True
    """False if the check was not possible; `sum` then says why. This is not an error."""

    @property
    def wrong(self) -> int:
        """Number of mismatches of this check."""
        return sum(mismatch.count for mismatch in self.mismatches)

    @property
    def verdict(self) -> str:
        """The verdict, for the table."""
        if not self.compared:
            return "not compared"
        return "does not add up" if self.wrong else "adds up"


@dataclass(frozen=True, slots=True)
class Remark:
    """A finding that is not an error."""

    text: str
    count: int
    examples: tuple[str, ...] = ()


@dataclass(slots=True)
class Repair:
    """The result of downloading missing and damaged images again."""

    fetched: int = 0
    unavailable: list[str] = field(default_factory=list)
    """Images that are not available: path, job and reason."""

    def to_json(self) -> JsonObject:
        """Return plain JSON values."""
        lost: list[Json] = [*self.unavailable]
        return {"fetched": self.fetched, "unavailable": lost}

    def render(self) -> str:
        """Return a summary line and one line per image that is not available."""
        lines = [f"repair        {self.fetched:,} images downloaded again, {len(self.unavailable):,} not available"]
        return "\n".join([*lines, *(f"  {lost}" for lost in self.unavailable)])


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The report of an audit."""

    run: str
    """The run directory."""
    target: str
    counts: dict[str, int | float]
    """Numbers by name, for programs."""
    checks: Sequence[Check]
    remarks: Sequence[Remark] = ()
    repair: Repair | None = None
    """The result of the repair, if one was requested."""

    @property
    def add_up(self) -> bool:
        """Whether every possible check passed."""
        return not any(check.wrong for check in self.checks)

    def to_json(self) -> JsonObject:
        """Return plain JSON values."""
        checks: list[Json] = [
            {
                "name": check.name,
                "adds_up": (check.wrong == 0) if check.compared else None,
                "sum": check.sum,
                "mismatches": [mismatch.to_json() for mismatch in check.mismatches if mismatch.count],
            }
            for check in self.checks
        ]
        remarks: list[Json] = [
            {"text": remark.text, "count": remark.count, "examples": list(remark.examples)} for remark in self.remarks
        ]
        return {
            "run": self.run,
            "target": self.target,
            "adds_up": self.add_up,
            "counts": dict(self.counts),
            "checks": checks,
            "remarks": remarks,
            "repair": None if self.repair is None else self.repair.to_json(),
        }

    def render(self) -> str:
        """Return the table, then each mismatch with its examples, then the remarks."""
        lines = [] if self.repair is None else [self.repair.render(), ""]
        lines += [f"{check.name:<14}{check.verdict:<17}{check.sum}" for check in self.checks]
        for check in self.checks:
            for mismatch in check.mismatches:
                if mismatch.count:
                    lines += ["", f"{check.name}: {mismatch.count:,} {mismatch.what}; {mismatch.advice}"]
                    lines += _listed(mismatch.examples, mismatch.count)
        for remark in self.remarks:
            lines += ["", f"also: {remark.count:,} {remark.text}", *_listed(remark.examples, remark.count)]
        return "\n".join(lines)


def _listed(examples: Sequence[str], count: int) -> list[str]:
    rest = count - len(examples)
    return [f"  {example}" for example in examples] + ([f"  and {rest:,} more"] if rest > 0 and examples else [])
