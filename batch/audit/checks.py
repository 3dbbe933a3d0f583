"""The audit of a run: compares journal, results, images and bills. Assembly.

Reads page by page, writes nothing to the run and takes no lock; intermediate data is in a temporary database
(`audit.tables`). The findings are plain values (`audit.report`). The bills come from the target, everything else from
the run directory.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import anyio.to_thread
import pyarrow as pa
import pyarrow.parquet as pq

from batch.audit.billing import charges_check, gather_bills
from batch.audit.report import EXAMPLES, AuditReport, Check, Mismatch, Remark
from batch.audit.tables import AuditRequest, AuditTables
from batch.config import Settings
from batch.directory import RunDirectory
from batch.journal.database import AuditedJob, AuditedRequest, JournalDatabase
from batch.journal.states import OPEN, TERMINAL, State
from batch.results.schema import status_of
from batch.run.images import sum_of
from batch.targets import profile_of
from batch.types import JobKey, StoredImage

__all__ = ["audited"]

_PAGE = 1000
_DAMAGED_JOURNAL = "the journal is damaged; please report this"
_FUZZ_USD = 1e-6
"""Tolerance of one sum; it grows with the number of summands."""
_HASHED_AT_ONCE = 4
_COLUMNS = ["job_key", "status", "request_id", "cost_usd", "images.list.element.sha256"]
_Row = TypeVar("_Row", AuditedJob, AuditedRequest)


async def audited(directory: RunDirectory, settings: Settings, *, version: str, now: float) -> AuditReport:
    """Audit a run that is not running.

    Args:
        directory: the run directory.
        settings: the last configuration of the run; its target is asked for bills.
        version: the tool version, for the platform's access log.
        now: Unix seconds.

    Raises:
        RunDirectoryError: the journal is missing or not a restyle journal. StorageError: a disk refused.
    """
    in_thread = anyio.to_thread.run_sync
    with AuditTables() as scratch:
        own = await in_thread(partial(_own_books, directory, scratch))
        why = await gather_bills(settings, scratch, version, own.since, now)
        priced = profile_of(settings).price is not None
        charges, foreign = await in_thread(partial(charges_check, scratch, why, now, priced=priced))
        if not why:
            ((charged, usd),) = scratch.rows("count_bills")
            own.counts.update(charged=charged, charged_usd=round(usd, 6))
    remarks = [remark for remark in (*own.remarks, foreign) if remark is not None and remark.count]
    return AuditReport(str(directory.root), settings.target.name, own.counts, [*own.checks, charges], remarks)


class _LocalChecks(NamedTuple):
    """Findings from the run directory alone."""

    checks: list[Check]
    remarks: list[Remark]
    counts: dict[str, int | float]
    since: float
    """Start of the first session, Unix seconds."""


def _own_books(directory: RunDirectory, scratch: AuditTables) -> _LocalChecks:
    file = JournalDatabase.open_read_only(directory.journal)
    try:
        results = _results(directory, file, scratch)
        with _JobTotals(directory, scratch) as jobs:
            for page in _pages(file.jobs_after):
                jobs.take(page)
        lost = _requests(file, scratch)
        sessions = file.sessions()
    finally:
        file.close()
    ((accepted, ended, counted),) = scratch.rows("count_requests")
    spent = sum(session.spent_usd for session in sessions)
    checks = [
        _submits(jobs, scratch, accepted, lost),
        jobs.unknown_check(),
        jobs.answers_check(),
        jobs.images_check(),
        _money(jobs, spent, counted, ended),
        jobs.reservations_check(),
        results,
    ]
    counts: dict[str, int | float] = {
        "jobs": jobs.states.total(),
        "accepted": accepted,
        "collected": jobs.states[State.DONE],
        "ended_without_result": lost,
        "open": jobs.open,
        "unknown": jobs.states[State.UNKNOWN] + jobs.states[State.INTENDED],
        "spent_usd": round(spent, 6),
        "reserved_usd": round(jobs.reserved_usd, 6),
        "sessions": len(sessions),
    }
    remarks = [_orphans(directory, scratch), jobs.unasked()]
    return _LocalChecks(checks, remarks, counts, min((session.started_at for session in sessions), default=0.0))


def _pages(read: Callable[[int, int], list[_Row]]) -> Iterator[list[_Row]]:
    """Yield all rows of a paged reader of the journal."""
    last = 0
    while page := read(last, _PAGE):
        yield page
        last = page[-1].id


# --- requests and money -----------------------------------------------------------------------------------


def _requests(file: JournalDatabase, scratch: AuditTables) -> int:
    """Store every request that ended, of any attempt. Return how many ended without a result."""
    lost = 0
    for page in _pages(file.ended_after):
        known = [one for one in page if one.request_id is not None]
        lost += sum(one.failed for one in known)
        scratch.add_requests(
            AuditRequest(str(one.request_id), one.job_key, one.cost_usd or 0.0, one.billable_units, one.at)
            for one in known
        )
    return lost


def _submits(jobs: _JobTotals, scratch: AuditTables, accepted: int, lost: int) -> Check:
    done, still = jobs.states[State.DONE], jobs.open
    unaccounted = Mismatch("accepted submits are unaccounted for", "the journal is damaged")
    if odd := abs(accepted - done - lost - still):
        unaccounted.met(f"{accepted:,} accepted, {done + lost + still:,} accounted for", odd)
    shared = Mismatch("request ids belong to several jobs", "a job shows the image of another job; please report this")
    rows = scratch.rows("shared_requests", [EXAMPLES])
    for request_id, job, times, _ in rows:
        shared.met(f"request {request_id}: {times} jobs, including {job}")
    shared.count = rows[0][-1] if rows else 0
    words = f"{accepted:,} accepted = {done:,} collected + {lost:,} ended without a result + {still:,} open"
    return Check("submits", words, (jobs.uncollected, shared, unaccounted))


def _money(jobs: _JobTotals, spent: float, counted: float, ended: int) -> Check:
    fuzz = _FUZZ_USD * max(1, ended) ** 0.5
    sessions = Mismatch("sums of the sessions and of the jobs differ", _DAMAGED_JOURNAL)
    if abs(spent - jobs.cost_usd) > fuzz:
        sessions.met(f"sessions ${spent:,.6f}, jobs ${jobs.cost_usd:,.6f}")
    requests = Mismatch("sums of the jobs are less than those of their requests", _DAMAGED_JOURNAL)
    if jobs.cost_usd < counted - fuzz:
        requests.met(f"jobs ${jobs.cost_usd:,.6f}, requests ${counted:,.6f}")
    written_off = max(0.0, jobs.cost_usd - counted)
    rest = f", including ${written_off:,.2f} for abandoned submits of unknown outcome" if written_off > fuzz else ""
    words = f"${spent:,.2f} spent by the sessions = ${jobs.cost_usd:,.2f} cost of the jobs{rest}"
    return Check("money", words, (sessions, requests))


# --- jobs and their images ------------------------------------------------------------------------------


class _JobTotals:
    """Sums over the journal's jobs, page by page; also verifies the images of finished jobs."""

    def __init__(self, directory: RunDirectory, scratch: AuditTables) -> None:
        self._root, self._scratch = directory.root, scratch
        self._threads = ThreadPoolExecutor(_HASHED_AT_ONCE, thread_name_prefix="hash")
        self.states: Counter[State] = Counter()
        self.cost_usd = self.reserved_usd = 0.0
        self._verified = self._verified_bytes = self._kept_away = 0
        self.uncollected = Mismatch(
            "accepted requests are not collected", "run the same `restyle run` command to collect them"
        )
        self._unknown = Mismatch(
            "submits have an unknown outcome and may have been paid for",
            "`restyle reconcile` looks them up; see limits.on_unknown",
        )
        self._unstored = Mismatch("jobs are done without a stored answer", _DAMAGED_JOURNAL)
        self._missing = Mismatch("images are missing", "`restyle audit --repair` downloads them again, free")
        self._damaged = Mismatch(
            "images differ from their stored size or SHA-256",
            "a file was changed or the disk failed; `restyle audit --repair` downloads them again, free",
        )
        self._collectable = Mismatch(
            "failed jobs are paid for, but their answers or images could not be read",
            "run the same `restyle run` command to request them again, free",
        )
        self._stray = Mismatch("reservations have no open submit", _DAMAGED_JOURNAL)
        self._unasked = Mismatch("finished jobs have no row in results.parquet (any more)", "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    @property
    def open(self) -> int:
        """Number of jobs that are accepted and not collected yet."""
        return sum(self.states[state] for state in (State.ACCEPTED, State.ANSWERED, State.COLLECTABLE))

    def take(self, page: list[AuditedJob]) -> None:
        """Add one page of the journal."""
        shown = self._scratch.shown([job.key for job in page])
        self._scratch.add_requests(AuditRequest(job.request_id, job.key) for job in page if job.request_id is not None)
        images: list[tuple[JobKey, StoredImage]] = []
        for job in page:
            self._count(job)
            if job.state in TERMINAL and job.key not in shown:
                self._unasked.met(job.key)
            if job.state is State.DONE and not _has_its_images(job):
                self._unstored.met(_name(job))
            if job.state in {State.DONE, State.COLLECTABLE}:
                known = [(job.key, image) for image in job.images or ()]
                images += [one for one in known if one[1].path is not None or job.state is State.DONE]
        self._look_at(images)

    def _count(self, job: AuditedJob) -> None:
        self.states[job.state] += 1
        self.cost_usd += job.cost_usd or 0.0
        self.reserved_usd += job.reserved_usd
        if job.state in {State.ACCEPTED, State.ANSWERED}:
            self.uncollected.met(_name(job))
        elif job.state is State.COLLECTABLE:
            self._collectable.met(_name(job))
        elif job.state in {State.INTENDED, State.UNKNOWN}:
            self._unknown.met(f"{_name(job)}, ${job.reserved_usd:,.4f} reserved")
        if job.reserved_usd and job.state not in OPEN:
            self._stray.met(f"{_name(job)}: {job.state}, ${job.reserved_usd:,.4f}")

    def _look_at(self, images: list[tuple[JobKey, StoredImage]]) -> None:
        """Verify each file once, however many jobs show it."""
        self._kept_away += sum(image.path is None for _, image in images)
        by_path = {image.path: (key, image) for key, image in images if image.path is not None}
        known = self._scratch.files(list(by_path))
        fresh = [(key, image) for path, (key, image) in by_path.items() if path not in known]
        self._scratch.add_files(path for path in by_path if path not in known)
        sums = self._threads.map(sum_of, [self._root / str(image.path) for _, image in fresh])
        for (key, image), found in zip(fresh, sums, strict=True):
            if found is None:
                self._missing.met(f"{image.path} of job {key}")
            elif (image.file_size is not None and found[0] != image.file_size) or found[1] != image.sha256:
                self._damaged.met(f"{image.path} of job {key}: {found[0]:,} bytes, sha256 {found[1][:16]}…")
            else:
                self._verified, self._verified_bytes = self._verified + 1, self._verified_bytes + found[0]

    def unknown_check(self) -> Check:
        """Return the check of submits with unknown outcome."""
        return Check("unknown", f"{self._unknown.count:,} submits of unknown outcome", (self._unknown,))

    def answers_check(self) -> Check:
        """Return the check that every finished job has its answer and all of its images recorded."""
        return Check("answers", f"{self.states[State.DONE]:,} jobs done", (self._unstored, self._collectable))

    def images_check(self) -> Check:
        """Return the check of size and hash of every file of a finished job."""
        away = f"; {self._kept_away:,} were not downloaded" if self._kept_away else ""
        words = f"{self._verified:,} files verified, {self._verified_bytes / 1e6:,.1f} MB{away}"
        return Check("images", words, (self._missing, self._damaged))

    def reservations_check(self) -> Check:
        """Return the check that only open submits have a reservation."""
        return Check("reservations", f"${self.reserved_usd:,.2f} for open and unknown submits", (self._stray,))

    def unasked(self) -> Remark:
        """Return the remark about jobs whose rows have left the manifest."""
        return Remark(self._unasked.what, self._unasked.count, tuple(self._unasked.examples))


def _has_its_images(job: AuditedJob) -> bool:
    return job.promised is not None and job.images is not None and len(job.images) == job.promised


def _name(job: AuditedJob) -> str:
    return f"job {job.key}" + (f", request {job.request_id}" if job.request_id else "")


def _orphans(directory: RunDirectory, scratch: AuditTables) -> Remark:
    """Find files in `images/` that no finished job refers to: left by a killed run, or foreign."""
    found = Mismatch("files in images/ belong to no finished job and may be deleted", "")
    waiting: list[str] = []

    def look() -> None:
        known = scratch.files(waiting)
        for path in waiting:
            if path not in known:
                found.met(path)
        waiting.clear()

    for folder, _, names in os.walk(directory.images):
        for name in names:
            path = Path(folder, name).relative_to(directory.root).as_posix()
            waiting.append(os.fsencode(path).decode("utf-8", "replace"))
            if len(waiting) >= _PAGE:
                look()
    look()
    return Remark(found.what, found.count, tuple(found.examples))


# --- the results table ------------------------------------------------------------------------------------


def _results(directory: RunDirectory, file: JournalDatabase, scratch: AuditTables) -> Check:
    """Compare state, request, cost and images of each row with the journal."""
    advice = "`restyle export` rebuilds it, free"
    absent = Mismatch("results.parquet cannot be read", advice)
    unknown = Mismatch("rows show jobs that are not in the journal", f"check that both are of the same run; {advice}")
    behind = Mismatch("rows differ from the journal", advice)
    rows = 0
    try:
        with pq.ParquetFile(directory.results, pre_buffer=False) as table:
            for batch in table.iter_batches(_PAGE, columns=_COLUMNS):
                rows += len(batch)
                _compare(batch.to_pylist(), file, scratch, unknown, behind)
    except (OSError, pa.ArrowException, KeyError) as error:
        if file.jobs_after(0, 1):
            absent.met(str(error).splitlines()[0][:200])
    return Check("results", f"{rows:,} rows of results.parquet", (absent, unknown, behind))


def _compare(
    rows: list[dict[str, object]], file: JournalDatabase, scratch: AuditTables, unknown: Mismatch, behind: Mismatch
) -> None:
    keys = [JobKey(str(row["job_key"])) for row in rows if row["job_key"] is not None]
    known = file.jobs_of(list(dict.fromkeys(keys)))
    scratch.add_shown(known)
    for row in rows:
        key, status = row["job_key"], row["status"]
        job = known.get(JobKey(str(key)))
        if key is None or (job is None and status == "pending"):
            continue  # an invalid row, or one that no run has reached yet
        if job is None:
            unknown.met(f"job {key}: {status}")
        elif (difference := _differences(row, job)) != "":
            behind.met(f"job {key}: {difference}")


def _differences(row: dict[str, object], job: AuditedJob) -> str:
    said, true = row["status"], status_of(job.state)
    if said != true:
        return f"{said} in the results, {true} in the journal"
    if row["request_id"] != job.request_id:
        return f"request {row['request_id']} in the results, {job.request_id} in the journal"
    if row["cost_usd"] != job.cost_usd:
        return f"cost {row['cost_usd']} in the results, {job.cost_usd} in the journal"
    images = row["images"] if isinstance(row["images"], list) else []
    if job.state is State.DONE and [image["sha256"] for image in images] != [one.sha256 for one in job.images or ()]:
        return "other images than in the journal"
    return ""
