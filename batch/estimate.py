"""Estimate a plan before anything is spent: jobs, duplicates, problems, megapixels, dollars, hours. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import polars as pl

from batch.journal.records import KnownJob
from batch.journal.states import OPEN, State
from batch.manifest.planner import Checked, Planner
from batch.money import UNKNOWN_MEGAPIXELS, Price
from batch.types import JobKey, JsonObject, Problem

__all__ = ["Estimate", "Find", "counted", "estimate", "render_note", "render_problems"]

Find: TypeAlias = Callable[[Sequence[JobKey]], Mapping[JobKey, KnownJob]]
"""Returns the journal's records of the given keys that it knows; called with a few thousand keys at a time."""

SHOWN_PROBLEMS = 20
_MERGE_JOBS = 65_536
_FIND_JOBS = 4096
_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """The totals of a plan. Megapixels, dollars and hours cover only the jobs that are still to do."""

    rows: int
    bad_rows: int
    """Rows that cannot become a job in every cell."""
    cells: int
    jobs: int
    """Distinct jobs, including finished ones."""
    duplicates: int
    """Rows x cells that give the same job as an earlier one; it runs and is paid for once."""
    done: int
    failed: int
    """Jobs that failed in an earlier run and will not be retried."""
    collectable: int
    """Jobs that failed in an earlier run after they were paid for: their results are fetched again for free."""
    in_flight: int
    """Jobs submitted in an earlier run whose outcome is unknown: already paid for, or held."""
    to_do: int
    retried: int
    """Jobs to do that failed in an earlier run; 0 unless retries are requested."""
    megapixels: float
    """Total for sources of known size; each of `num_images` counts."""
    unknown_sizes: int
    """Number of images of unknown size; each counts as `UNKNOWN_MEGAPIXELS`."""
    price_per_megapixel: float
    dollars: float
    """Cost by exact megapixels."""
    dollars_at_most: float
    """Cost with each image rounded up to whole megapixels, as in reservations: the budget must cover this."""
    max_in_flight: int
    at_once: int
    """Jobs that execute concurrently: limited by `max_in_flight` and by the target's slots."""
    service_seconds: float
    hours: float
    problem_count: int
    problems: tuple[Problem, ...]
    """The first `SHOWN_PROBLEMS` problems."""

    def to_json(self) -> JsonObject:
        """Return all fields as plain JSON values."""
        return asdict(self) | {"problems": [asdict(problem) for problem in self.problems]}

    def render(self) -> str:
        """Return the estimate as aligned plain text, without the list of problems (see `render_problems`)."""
        dollars = f"${self.dollars:,.2f} at ${self.price_per_megapixel:g} a megapixel"
        if self.dollars_at_most:
            dollars += f", at most ${self.dollars_at_most:,.2f} if every image is rounded up"
        if self.unknown_sizes and self.price_per_megapixel:
            dollars += (
                f"; {counted(self.unknown_sizes, 'unknown size')} taken as {UNKNOWN_MEGAPIXELS:g} megapixels each"
            )
        collect = ("collect", f"{self.collectable:,} failed but paid for: results are fetched again for free")
        lines = [
            ("rows", f"{self.rows:,}" + (f", {self.bad_rows:,} of them bad" if self.bad_rows else "")),
            ("cells", f"{self.cells:,} a row"),
            ("jobs", f"{self.jobs:,} distinct, {counted(self.duplicates, 'duplicate')}"),
            ("done", f"{self.done:,}"),
            ("failed", f"{self.failed:,}"),
            *([collect] if self.collectable else []),
            ("in flight", f"{self.in_flight:,}"),
            ("to do", f"{self.to_do:,}" + (f", {self.retried:,} of them failed before" if self.retried else "")),
            ("megapixels", f"{self.megapixels:,.1f} known, {counted(self.unknown_sizes, 'image')} of unknown size"),
            ("cost", dollars),
            ("time", f"{_duration(self.hours)}, {self.at_once:,} at once, {self.service_seconds:g} s each"),
            ("problems", f"{self.problem_count:,}"),
        ]
        return "\n".join(f"{name:<12}{text}" for name, text in lines)


def render_note(note: str) -> str:
    """Return a note about the manifest, aligned with a rendered estimate."""
    return f"{'manifest':<12}{note}"


def estimate(
    planner: Planner,
    find: Find | None,
    price: Price | None,
    max_in_flight: int,
    service_seconds: float,
    slots: int | None = None,
    *,
    retry_failed: bool = False,
    lost_before: float = -math.inf,
) -> Estimate:
    """Iterate over the plan once and compute its totals.

    Jobs are identified by the first 64 bits of their keys, which takes 8 bytes of memory per distinct job (24 bytes
    briefly during a merge). The probability that any two of n jobs collide is n**2 / 2**65, about 1 in 400,000 for ten
    million jobs. The run itself compares whole keys.

    Args:
        planner: the plan.
        find: lookup in the journal; None without a journal.
        price: the target's price; None if the target is free.
        max_in_flight: maximum jobs in flight, at least 1.
        service_seconds: duration of one job.
        slots: jobs that the target executes concurrently; None if unknown.
        retry_failed: count jobs that failed in an earlier run as to do, at full cost.
        lost_before: Unix time in seconds. A request that ended earlier and was not collected counts as failed: the
            target may have deleted its result.

    Raises:
        ManifestError: the manifest can no longer be read.
    """
    tally = _JobCounts(find, price, retry_failed=retry_failed, lost_before=lost_before)
    for checked in planner.checked():
        tally.add(checked)
    tally.merge()
    to_do = tally.states[State.PENDING]
    at_once = max(1, min(max_in_flight, slots or max_in_flight))
    each = price.usd_per_megapixel if price is not None else 0.0
    dollars = (tally.megapixels + tally.unknown_sizes * UNKNOWN_MEGAPIXELS) * each
    return Estimate(
        rows=tally.rows,
        bad_rows=tally.bad_rows,
        cells=len(planner.cells),
        jobs=len(tally.seen),
        duplicates=tally.planned - len(tally.seen),
        done=tally.states[State.DONE],
        failed=tally.states[State.FAILED],
        collectable=tally.states[State.COLLECTABLE],
        in_flight=sum(tally.states[state] for state in OPEN),
        to_do=to_do,
        retried=tally.retried,
        megapixels=tally.megapixels,
        unknown_sizes=tally.unknown_sizes,
        price_per_megapixel=each,
        dollars=dollars,
        dollars_at_most=tally.reserved,
        max_in_flight=max_in_flight,
        at_once=at_once,
        service_seconds=service_seconds,
        hours=to_do * service_seconds / at_once / _HOUR,
        problem_count=tally.problem_count,
        problems=tuple(tally.problems),
    )


class _JobCounts:
    """Running totals; a job counts when its key first occurs."""

    def __init__(self, find: Find | None, price: Price | None, *, retry_failed: bool, lost_before: float) -> None:
        self._find, self._price, self._retry_failed = find, price, retry_failed
        self._lost_before = lost_before
        self.reserved = 0.0
        # Facts of jobs that are not merged yet. The jobs themselves are not kept: they may contain images.
        self._keys: list[JobKey] = []
        self._images: list[int] = []
        self._sizes: list[float | None] = []
        self.seen = pl.DataFrame(schema={"prefix": pl.UInt64})
        """First 64 bits of the keys, sorted."""
        self.rows = self.bad_rows = self.planned = self.retried = self.unknown_sizes = self.problem_count = 0
        self.megapixels = 0.0
        self.states = dict.fromkeys(State, 0)
        self.problems: list[Problem] = []

    def add(self, checked: Checked) -> None:
        self.rows += len(checked.batch.frame)
        self.bad_rows += len({problem.row for problem in checked.problems})
        self.problem_count += len(checked.problems)
        self.problems += checked.problems[: SHOWN_PROBLEMS - len(self.problems)]
        jobs = [item.job for item in checked.batch.items if item.job is not None]
        self.planned += len(jobs)
        self._keys += [job.key for job in jobs]
        self._images += [int(job.input["num_images"]) for job in jobs]  # type: ignore[arg-type]  # checked by the planner
        self._sizes += [job.megapixels for job in jobs]
        if len(self._keys) >= _MERGE_JOBS:
            self.merge()

    def merge(self) -> None:
        prefixes = pl.Series("prefix", [int(key[:16], 16) for key in self._keys], pl.UInt64)
        distinct = prefixes.to_frame().with_row_index("place").unique("prefix", keep="first").sort("prefix")
        new = distinct.filter(~_among(distinct["prefix"], self.seen["prefix"]))
        self._count(new["place"].to_list())
        self.seen = self.seen.merge_sorted(new.select("prefix"), "prefix")
        self._keys, self._images, self._sizes = [], [], []

    def _count(self, new: list[int]) -> None:
        """Count the states of the jobs at these places, and the images of those to do."""
        to_do = new if self._find is None else list(self._to_do(new, self._find))
        self.states[State.PENDING] += len(to_do)
        alike = Counter((self._sizes[place], self._images[place]) for place in to_do)
        for (size, images), count in alike.items():
            if size is None:
                self.unknown_sizes += images * count
            else:
                self.megapixels += size * images * count
            if self._price is not None:
                self.reserved += self._price.reservation(size, images) * count

    def _to_do(self, new: list[int], find: Find) -> Iterator[int]:
        """Yield the places of jobs that are still to do; count the states of the others."""
        for start in range(0, len(new), _FIND_JOBS):
            places = new[start : start + _FIND_JOBS]
            known = find([self._keys[place] for place in places])
            for place in places:
                job = known.get(self._keys[place])
                state = State.PENDING if job is None else self._state_of(job)
                again = state is State.FAILED and self._retry_failed
                self.retried += again
                if state is State.PENDING or again:
                    yield place
                else:
                    self.states[state] += 1

    def _state_of(self, job: KnownJob) -> State:
        lost = job.state is State.COLLECTABLE and (job.ended_at or 0.0) < self._lost_before
        return State.FAILED if lost else job.state


def _among(values: pl.Series, ordered: pl.Series) -> pl.Series:
    """Return for each value whether the sorted series contains it."""
    if ordered.is_empty():
        return pl.repeat(False, len(values), eager=True)
    places = ordered.search_sorted(values).clip(0, len(ordered) - 1)
    return ordered.gather(places) == values


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    if hours * 60 < 1:
        return f"{hours * 3600:.1f} seconds"
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 row`, `0 rows`, `2,000 rows`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def render_problems(name: str, problems: Iterable[Problem], total: int) -> str:
    """Return at most 20 problems as lines `file:line column: message`, then the total number.

    A manifest without lines shows the row, counted from 0. The text is empty if `total` is 0.
    """
    lines = []
    for problem in list(problems)[:SHOWN_PROBLEMS]:
        place = f"row {problem.row}" if problem.line is None else f"{problem.line}"
        lines.append(f"{name}:{place} {problem.column}: {problem.message}")
    if not total:
        return ""
    rest = total - len(lines)
    return "\n".join([*lines, counted(total, "problem") + (f", {rest:,} more not shown" if rest > 0 else "")])
