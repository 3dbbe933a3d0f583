"""What an audit found: checks with their numbers and examples, as a table and as JSON. Pure.

Owns the words for what adds up and what does not. Refuses to know where the numbers come from (`batch.audit.checks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from batch.types import Json, JsonObject

__all__ = ["EXAMPLES", "AuditReport", "Check", "Mismatch", "Remark", "Repair"]

EXAMPLES = 10
"""How many examples of one mismatch are shown."""


@dataclass(slots=True)
class Mismatch:
    """One way in which something does not add up; counted as it is met."""

    what: str
    """A sentence without its number: `done jobs whose image is missing`."""
    advice: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def met(self, example: str, times: int = 1) -> None:
        """Count it; the first ten are kept."""
        self.count += times
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)

    def to_json(self) -> JsonObject:
        """Plain JSON values."""
        return {"what": self.what, "count": self.count, "advice": self.advice, "examples": list(self.examples)}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    sum: str
    """The numbers in words."""
    mismatches: tuple[Mismatch, ...] = ()
    """Those that were looked for; one that was never met has the count 0."""
    compared: bool = True
    """False: it could not be looked at, and `sum` says why. That is no error."""

    @property
    def wrong(self) -> int:
        """Everything that does not add up here."""
        return sum(mismatch.count for mismatch in self.mismatches)

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.compared:
            return "not compared"
        return "does not add up" if self.wrong else "adds up"


@dataclass(frozen=True, slots=True)
class Remark:
    """Something to know that is no error."""

    text: str
    count: int
    examples: tuple[str, ...] = ()


@dataclass(slots=True)
class Repair:
    """What came of fetching missing and damaged images again."""

    fetched: int = 0
    unavailable: list[str] = field(default_factory=list)
    """Those that could not be had: path, job and why."""

    def to_json(self) -> JsonObject:
        """Plain JSON values."""
        lost: list[Json] = [*self.unavailable]
        return {"fetched": self.fetched, "unavailable": lost}

    def render(self) -> str:
        """A line, and one for each image that is not available."""
        lines = [f"repair        {self.fetched:,} images fetched again, {len(self.unavailable):,} not available"]
        return "\n".join([*lines, *(f"  {lost}" for lost in self.unavailable)])


@dataclass(frozen=True, slots=True)
class AuditReport:
    """A whole audit."""

    run: str
    """The run directory."""
    target: str
    counts: dict[str, int | float]
    """Numbers by name, for a machine."""
    checks: Sequence[Check]
    remarks: Sequence[Remark] = ()
    repair: Repair | None = None
    """What came of fetching images again, where that was asked for."""

    @property
    def add_up(self) -> bool:
        """Whether every check that could be made went well."""
        return not any(check.wrong for check in self.checks)

    def to_json(self) -> JsonObject:
        """Plain JSON values."""
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
        """A table, then each mismatch with its examples, then what else was seen."""
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
