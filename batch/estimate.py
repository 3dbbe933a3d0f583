"""What a plan adds up to, before any money moves: jobs, duplicates, problems, megapixels, dollars, hours. Pure."""

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
"""Those of the keys that the journal knows; asked for a few thousand at a time."""

SHOWN_PROBLEMS = 20
_MERGE_JOBS = 65_536
_FIND_JOBS = 4096
_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """The sum of a plan. Megapixels, dollars and hours are those of the jobs that are still to do."""

    rows: int
    bad_rows: int
    """Rows that cannot become a job, or not in every cell."""
    cells: int
    jobs: int
    """Distinct ones, finished ones included."""
    duplicates: int
    """Rows x cells that are the same job as an earlier one: asked twice, paid once."""
    done: int
    failed: int
    """Failed in an earlier run, and not taken up again."""
    collectable: int
    """Failed in an earlier run, but paid for: their answers or images are asked for again, free."""
    in_flight: int
    """Sent in an earlier run, their end not known: paid already, or held."""
    to_do: int
    retried: int
    """Those to do that failed in an earlier run: none, unless it is asked for."""
    megapixels: float
    """Where the size of the source is known; every image of `num_images` counts."""
    unknown_sizes: int
    """Images whose size is not known; each is counted as `UNKNOWN_MEGAPIXELS`."""
    price_per_megapixel: float
    dollars: float
    """By the megapixels as they are."""
    dollars_at_most: float
    """What a budget has to hold: each image rounded up to whole megapixels, as reservations are."""
    max_in_flight: int
    at_once: int
    """Jobs that are executed at once: no more than are in flight, nor than the target has slots."""
    service_seconds: float
    hours: float
    problem_count: int
    problems: tuple[Problem, ...]
    """The first of them."""

    def to_json(self) -> JsonObject:
        """All fields as plain JSON values."""
        return asdict(self) | {"problems": [asdict(problem) for problem in self.problems]}

    def render(self) -> str:
        """The estimate as aligned plain text; problems are listed by `render_problems`."""
        dollars = f"${self.dollars:,.2f} at ${self.price_per_megapixel:g} a megapixel"
        if self.dollars_at_most:
            dollars += f", at most ${self.dollars_at_most:,.2f} if every image is rounded up"
        if self.unknown_sizes and self.price_per_megapixel:
            dollars += (
                f"; {counted(self.unknown_sizes, 'unknown size')} taken as {UNKNOWN_MEGAPIXELS:g} megapixels each"
            )
        collect = ("collect", f"{self.collectable:,} failed before and paid for: asked for again, free")
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
    """A note on how the manifest is read, aligned with an estimate."""
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
    """Run through the whole plan once and add it up.

    Memory is 8 bytes a distinct job (three times that for a moment while they are merged): jobs are told apart by
    the first 64 bits of their keys. The odds that any two of n jobs are taken for one are n**2 / 2**65, one in
    400,000 for ten million; the run itself compares whole keys.

    Args:
        planner: what is planned.
        find: what the journal knows; None where there is none yet.
        price: what the target charges; None where nothing costs anything.
        max_in_flight: jobs at once, at least 1.
        service_seconds: how long one job takes.
        slots: how many the target executes at once, where that is known.
        retry_failed: whether what failed in an earlier run is to do again, and costs again.
        lost_before: instant in Unix seconds. A request that ended before it and could not be collected counts as
            failed: the target may not keep it any more.

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
    """Running sums; a job counts when its key is seen for the first time."""

    def __init__(self, find: Find | None, price: Price | None, *, retry_failed: bool, lost_before: float) -> None:
        self._find, self._price, self._retry_failed = find, price, retry_failed
        self._lost_before = lost_before
        self.reserved = 0.0
        # Of the jobs that were not merged yet; the jobs themselves may carry images and are let go.
        self._keys: list[JobKey] = []
        self._images: list[int] = []
        self._sizes: list[float | None] = []
        self.seen = pl.DataFrame(schema={"half": pl.UInt64})
        """First halves of the keys, sorted."""
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
        halves = pl.Series("half", [int(key[:16], 16) for key in self._keys], pl.UInt64)
        distinct = halves.to_frame().with_row_index("place").unique("half", keep="first").sort("half")
        new = distinct.filter(~_among(distinct["half"], self.seen["half"]))
        self._count(new["place"].to_list())
        self.seen = self.seen.merge_sorted(new.select("half"), "half")
        self._keys, self._images, self._sizes = [], [], []

    def _count(self, new: list[int]) -> None:
        """Add up the jobs at these places: their states, and the images of those to do."""
        to_do = new if self._find is None else list(self._unheard(new, self._find))
        self.states[State.PENDING] += len(to_do)
        alike = Counter((self._sizes[place], self._images[place]) for place in to_do)
        for (size, images), count in alike.items():
            if size is None:
                self.unknown_sizes += images * count
            else:
                self.megapixels += size * images * count
            if self._price is not None:
                self.reserved += self._price.reservation(size, images) * count

    def _unheard(self, new: list[int], find: Find) -> Iterator[int]:
        """Those whose job is still to do; the states of the others are counted."""
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
    """For each value whether it is one of those that lie in order."""
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
    """`1 row`, `0 rows`, `2,000 rows`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def render_problems(name: str, problems: Iterable[Problem], total: int) -> str:
    """`file:line column: message`, one a line, at most 20, and always how many there are in all.

    A manifest without lines shows the row, counted from 0. Empty text where there are none.
    """
    lines = []
    for problem in list(problems)[:SHOWN_PROBLEMS]:
        place = f"row {problem.row}" if problem.line is None else f"{problem.line}"
        lines.append(f"{name}:{place} {problem.column}: {problem.message}")
    if not total:
        return ""
    rest = total - len(lines)
    return "\n".join([*lines, counted(total, "problem") + (f", {rest:,} more not shown" if rest > 0 else "")])
