"""Whether a run adds up: journal, results, images and bills held against each other. Assembly.

Reads only, page by page, and takes no lock; what it has to remember lies in a temporary database (`run.scratch`). What
was found is a value (`run.books`). The bills are the target's word, everything else is ours.
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
_FUZZ_USD = 1e-6
"""Of one sum; sums of a million floats are granted more."""
_HASHED_AT_ONCE = 4
_COLUMNS = ["job_key", "status", "request_id", "cost_usd", "images.list.element.sha256"]
_Row = TypeVar("_Row", AuditedJob, AuditedRequest)


async def audited(directory: RunDirectory, settings: Settings, *, version: str, now: float) -> AuditReport:
    """Look at all of a run that does not work at present.

    Args:
        directory: of the run.
        settings: the configuration that it was last used with: its target is asked for bills.
        version: for the platform's access log.
        now: Unix seconds.

    Raises:
        RunDirectoryError: no journal, or none of ours. StorageError: a disk refused.
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
    """What the run directory itself says."""

    checks: list[Check]
    remarks: list[Remark]
    counts: dict[str, int | float]
    since: float
    """When the first session began, Unix seconds."""


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
    """All rows of the journal that a paged reader gives."""
    last = 0
    while page := read(last, _PAGE):
        yield page
        last = page[-1].id


# --- requests and money -----------------------------------------------------------------------------------


def _requests(file: JournalDatabase, scratch: AuditTables) -> int:
    """Remember every request that ended, of whatever attempt; how many ended without a result."""
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
    unaccounted = Mismatch("submits are accepted and nothing else is known of them", "this journal is damaged")
    if odd := abs(accepted - done - lost - still):
        unaccounted.met(f"{accepted:,} accepted, {done + lost + still:,} accounted for", odd)
    shared = Mismatch("request ids belong to several jobs", "one of the jobs shows another's image: please report")
    rows = scratch.rows("shared_requests", [EXAMPLES])
    for request_id, job, times, _ in rows:
        shared.met(f"request {request_id}: {times} jobs, {job} is one")
    shared.count = rows[0][-1] if rows else 0
    words = f"{accepted:,} accepted = {done:,} collected + {lost:,} ended without a result + {still:,} open"
    return Check("submits", words, (jobs.uncollected, shared, unaccounted))


def _money(jobs: _JobTotals, spent: float, counted: float, ended: int) -> Check:
    fuzz = _FUZZ_USD * max(1, ended) ** 0.5
    sessions = Mismatch("sums of the sessions and of the jobs differ", "this journal is damaged: please report")
    if abs(spent - jobs.cost_usd) > fuzz:
        sessions.met(f"sessions ${spent:,.6f}, jobs ${jobs.cost_usd:,.6f}")
    requests = Mismatch("jobs cost less than their requests", "this journal is damaged: please report")
    if jobs.cost_usd < counted - fuzz:
        requests.met(f"jobs ${jobs.cost_usd:,.6f}, requests ${counted:,.6f}")
    written_off = max(0.0, jobs.cost_usd - counted)
    rest = f", ${written_off:,.2f} of it for unknown submits that were given up" if written_off > fuzz else ""
    words = f"${spent:,.2f} spent by the sessions = ${jobs.cost_usd:,.2f} cost of the jobs{rest}"
    return Check("money", words, (sessions, requests))


# --- jobs and their images ------------------------------------------------------------------------------


class _JobTotals:
    """Adds up the journal's jobs, page by page, and verifies the images of those that are done."""

    def __init__(self, directory: RunDirectory, scratch: AuditTables) -> None:
        self._root, self._scratch = directory.root, scratch
        self._threads = ThreadPoolExecutor(_HASHED_AT_ONCE, thread_name_prefix="hash")
        self.states: Counter[State] = Counter()
        self.cost_usd = self.reserved_usd = 0.0
        self._verified = self._verified_bytes = self._kept_away = 0
        self.uncollected = Mismatch(
            "accepted requests are not collected", "`restyle run` with the same command collects them"
        )
        self._unknown = Mismatch(
            "submits have no known outcome and may have been paid for",
            "`restyle reconcile` looks them up; see limits.on_unknown",
        )
        self._unstored = Mismatch("jobs are done without a stored answer", "this journal is damaged: please report")
        self._missing = Mismatch("images are missing", "`restyle audit --repair` fetches them again, free")
        self._damaged = Mismatch(
            "images have another size or SHA-256 than when they were stored",
            "a file was changed or the disk failed: `restyle audit --repair` fetches them again, free",
        )
        self._collectable = Mismatch(
            "failed jobs are paid for, and their answers or images could not be read",
            "`restyle run` with the same command asks for them again, free",
        )
        self._stray = Mismatch("reservations belong to no open submit", "this journal is damaged: please report")
        self._unasked = Mismatch("finished jobs are asked for by no row of results.parquet (any more)", "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    @property
    def open(self) -> int:
        """Accepted, and not collected yet."""
        return sum(self.states[state] for state in (State.ACCEPTED, State.ANSWERED, State.COLLECTABLE))

    def take(self, page: list[AuditedJob]) -> None:
        """One page of the journal."""
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
        """Read each file once, however many jobs show it."""
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
        """Submits that nobody knows the outcome of."""
        return Check("unknown", f"{self._unknown.count:,} submits of unknown outcome", (self._unknown,))

    def answers_check(self) -> Check:
        """Every done job has its answer and all of its images noted."""
        return Check("answers", f"{self.states[State.DONE]:,} jobs done", (self._unstored, self._collectable))

    def images_check(self) -> Check:
        """Size and hash of every file that a done job refers to."""
        away = f"; {self._kept_away:,} were not downloaded" if self._kept_away else ""
        words = f"{self._verified:,} files read again, {self._verified_bytes / 1e6:,.1f} MB{away}"
        return Check("images", words, (self._missing, self._damaged))

    def reservations_check(self) -> Check:
        """Money is set aside for open submits only."""
        return Check("reservations", f"${self.reserved_usd:,.2f} for open and unknown submits", (self._stray,))

    def unasked(self) -> Remark:
        """Jobs of rows that have left the manifest: no error."""
        return Remark(self._unasked.what, self._unasked.count, tuple(self._unasked.examples))


def _has_its_images(job: AuditedJob) -> bool:
    return job.promised is not None and job.images is not None and len(job.images) == job.promised


def _name(job: AuditedJob) -> str:
    return f"job {job.key}" + (f", request {job.request_id}" if job.request_id else "")


def _orphans(directory: RunDirectory, scratch: AuditTables) -> Remark:
    """Files in `images/` that no done job refers to: of a run that was killed, or not ours."""
    found = Mismatch("files in images/ belong to no finished job; they may be deleted", "")
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
    """Row by row: the state, request, cost and images that the journal has."""
    advice = "`restyle export` writes it anew, for free"
    absent = Mismatch("results.parquet cannot be read", advice)
    strangers = Mismatch("rows show jobs that the journal does not know", f"is it the journal of these rows? {advice}")
    behind = Mismatch("rows differ from the journal", advice)
    rows = 0
    try:
        with pq.ParquetFile(directory.results, pre_buffer=False) as table:
            for batch in table.iter_batches(_PAGE, columns=_COLUMNS):
                rows += len(batch)
                _compare(batch.to_pylist(), file, scratch, strangers, behind)
    except (OSError, pa.ArrowException, KeyError) as error:
        if file.jobs_after(0, 1):
            absent.met(str(error).splitlines()[0][:200])
    return Check("results", f"{rows:,} rows of results.parquet", (absent, strangers, behind))


def _compare(
    rows: list[dict[str, object]], file: JournalDatabase, scratch: AuditTables, strangers: Mismatch, behind: Mismatch
) -> None:
    keys = [JobKey(str(row["job_key"])) for row in rows if row["job_key"] is not None]
    known = file.jobs_of(list(dict.fromkeys(keys)))
    scratch.add_shown(known)
    for row in rows:
        key, status = row["job_key"], row["status"]
        job = known.get(JobKey(str(key)))
        if key is None or (job is None and status == "pending"):
            continue  # a row that cannot work, or one that no run has come to yet
        if job is None:
            strangers.met(f"job {key}: {status}")
        elif (told := _differences(row, job)) != "":
            behind.met(f"job {key}: {told}")


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
