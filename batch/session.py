"""One `restyle run` from the lock to the summary: estimate, confirm, run, write the results. Assembly.

Everything that a run opens is opened here, in the order of need, and closed in reverse.
"""

from __future__ import annotations

import platform
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeVar

import anyio
import anyio.to_thread

from batch.config import Settings, parse_duration, window_bounds
from batch.directory import RunDirectory, config_of
from batch.errors import ConfigError, ExitCode, StoppedEarly, StorageError
from batch.estimate import Estimate, estimate
from batch.journal.database import JournalDatabase
from batch.journal.records import Counts
from batch.journal.states import State
from batch.journal.writer import JournalWriter, open_journal
from batch.manifest.images import SourceImages
from batch.manifest.opening import ManifestSource, keep, located, open_manifest, with_columns
from batch.manifest.planner import Planner
from batch.manifest.reader import Manifest
from batch.money import Budget
from batch.results.export import Export, identity_of, loading_sink
from batch.results.totals import Totals
from batch.run.admission import Admission, StopCause, StopRequest
from batch.run.context import Policy, RunContext
from batch.run.images import ImageFolder
from batch.run.interfaces import Observer
from batch.run.observers import JsonLog, ObserverGroup, ProgressCounter
from batch.run.pacing import bucket_for
from batch.run.reconcile import Reconciler
from batch.run.runner import Report, Runner
from batch.run.verdicts import REPEAT_SECONDS, Idempotency
from batch.run.window import Window
from batch.session_signals import SessionSignals, in_order
from batch.system.descriptors import Allowance, described, require
from batch.system.open_files import allowance
from batch.targets import Connection, TargetProfile, check_faults, open_hints, open_target, profile_of
from batch.types import Job, JsonObject
from batch.version import tool_version

__all__ = ["Plan", "RunRequest", "Summary", "estimate_of", "open_planner", "run_session"]

T = TypeVar("T")

_EXAMPLES = 3
"""Error types with an example in the summary; `errors` has all of them."""
_TO_COLLECT = (State.INTENDED, State.ACCEPTED, State.ANSWERED, State.COLLECTABLE)
_START_FILES = 24
"""Descriptors that a run needs before it opens a connection."""
_AUTO_GUESS = 16
"""Assumed concurrent jobs in a plan if the window is adaptive."""
_SHOW_WAITS_EVERY = 2.0
"""Seconds between two updates of what open jobs wait for."""


class Plan(NamedTuple):
    """A plan of a run; shown before it starts."""

    profile: TargetProfile
    manifest: Manifest
    estimate: Estimate
    spent_usd: float = 0.0
    """Spent by earlier sessions of the same run directory."""
    refusal: str = ""
    """Why a run in that directory would be refused (its config differs), and how to proceed; empty if it would not."""


@dataclass(frozen=True, slots=True)
class RunRequest:
    """The user's request, besides the settings."""

    manifest: str | Path | ManifestSource
    out: Path
    settings: Settings
    retry_failed: bool = False
    new_config: bool = False
    collect_only: bool = False
    """Settle and collect earlier submits; submit nothing new."""
    signals: bool = False
    """Whether SIGINT and SIGTERM stop the run gracefully; requires the main thread of the process."""
    observer: Observer = field(default_factory=Observer)
    tally: ProgressCounter = field(default_factory=ProgressCounter)
    confirm: Callable[[Plan], bool] | None = None
    """Called with the plan; False ends the run before anything is submitted."""


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended; `summary.json` has the same contents."""

    exit_code: ExitCode
    rows: int
    done: int
    failed: int
    unknown: int
    pending: int
    skipped: int
    errors: dict[str, int]
    """Failed rows by error type, the most frequent first."""
    examples: dict[str, tuple[int, str]]
    """For the three most frequent error types: the first row with it, and its message."""
    flagged_images: int
    """Images that the safety checker flagged."""
    collectable: int
    """Failed jobs that are paid for: the next run asks for their answers or images again, free."""
    ended: int
    """Jobs that finished or failed in this session."""
    spent_usd: float
    """Spent by this session; `spent_total_usd` is spent by all sessions of this run directory."""
    spent_total_usd: float
    reserved_usd: float
    """Reserved for jobs in flight or unknown."""
    seconds: float
    stopped: str | None
    reason: str
    started_at: str
    results: Path
    images: Path | None
    target: str

    def to_json(self) -> JsonObject:
        """Return the summary as JSON values."""
        return {
            "exit_code": int(self.exit_code),
            "status": self.exit_code.name.lower(),
            "rows": self.rows,
            "done": self.done,
            "failed": self.failed,
            "unknown": self.unknown,
            "pending": self.pending,
            "skipped": self.skipped,
            "errors": dict(self.errors),
            "examples": {name: {"row": row, "message": text} for name, (row, text) in self.examples.items()},
            "flagged_images": self.flagged_images,
            "collectable": self.collectable,
            "ended": self.ended,
            "spent_usd": round(self.spent_usd, 6),
            "spent_total_usd": round(self.spent_total_usd, 6),
            "reserved_usd": round(self.reserved_usd, 6),
            "seconds": round(self.seconds, 3),
            "stopped": self.stopped,
            "reason": self.reason,
            "started_at": self.started_at,
            "ended_at": _timestamp(),
            "results": str(self.results),
            "images": None if self.images is None else str(self.images),
            "target": self.target,
        }


async def run_session(request: RunRequest) -> Summary:
    """Run a manifest, or resume a run; see `batch.api.run`."""
    return await in_order(partial(_located_session, request), request.observer, wanted=request.signals)


async def _located_session(request: RunRequest, signals: SessionSignals) -> Summary:
    async with located(request.manifest, request.settings) as source:
        return await _session(request, source, signals)


async def _session(request: RunRequest, source: ManifestSource, signals: SessionSignals) -> Summary:
    allowed = allowance()
    require(allowed, _START_FILES)
    settings, directory = request.settings, RunDirectory(request.out)
    profile, began, started_at = profile_of(settings), time.monotonic(), _timestamp()
    manifest = await _in_thread(partial(open_manifest, source, settings))
    await _in_thread(partial(open_planner, manifest, settings, None))  # a wrong column fails before a folder exists
    if not request.collect_only:  # collecting may not need an endpoint
        await _in_thread(partial(check_faults, settings))
    directory.prepare()
    with directory.locked(started_at), _summary_on_disk_error(directory, started_at):
        directory.check_config(settings, accept=request.new_config)
        lost = await _in_thread(directory.lost_journal)
        async with open_journal(directory.journal, version=tool_version(), lost=lost) as journal:
            planner = await _in_thread(partial(open_planner, manifest, settings, journal.file))
            before = await journal.counts()
            again = request.retry_failed
            found = await _in_thread(partial(estimate_of, planner, settings, profile, journal.file, retry_failed=again))
            plan = Plan(profile, manifest, found, before.spent_usd)
            _require_consent(plan, request)
            if source.is_spooled:
                source = await _in_thread(partial(keep, source, directory.root))
                manifest = await _in_thread(partial(open_manifest, source, settings))
                planner = await _in_thread(partial(open_planner, manifest, settings, journal.file))
            identity = await _in_thread(partial(identity_of, manifest, settings))
            directory.write_run(_run_facts(identity, manifest, source, request, profile, started_at))
            await signals.begin()
            projection = Export(planner, manifest, settings, journal.file, identity)
            report: Report | None = None
            cut_off: BaseException | None = None
            try:
                report = await _run_jobs(request, directory, journal, projection, plan, before, signals, allowed)
            except BaseException as error:
                if isinstance(error, Exception):
                    raise
                cut_off = error  # asyncio cancels all tasks of a closing loop: the results are still written
                report = _report_of(request.tally, signals)
                await journal.settled()
            signals.over()
            after, totals = await journal.to_the_end(partial(_write_results, projection, directory))
    summary = _summary(request, directory, report, totals, before, after, began, started_at)
    directory.write_summary(summary.to_json())
    if cut_off is not None:
        raise cut_off
    return summary


def _write_results(projection: Export, directory: RunDirectory) -> tuple[Counts, Totals]:
    """Write the results from the journal."""
    counts = projection.file.counts()
    return counts, projection.refresh(directory.results, counts.by_state)


def _report_of(tally: ProgressCounter, signals: SessionSignals) -> Report:
    """Return the report of a run that was cancelled before it could report."""
    stopping = signals.first or StopRequest(StopCause.CANCELLED, "every task of the event loop was cancelled")
    return Report(tally.done, tally.failed, tally.held, stopping)


@contextmanager
def _summary_on_disk_error(directory: RunDirectory, started_at: str) -> Iterator[None]:
    """Write `summary.json` if a disk error stopped the run, so that its reader does not see an older end."""
    try:
        yield
    except StorageError as error:
        code = error.exit_code
        facts: JsonObject = {"exit_code": int(code), "status": code.name.lower(), "stopped": "storage"}
        with suppress(StorageError):
            directory.write_summary({**facts, "reason": str(error), "started_at": started_at, "ended_at": _timestamp()})
        raise


def open_planner(manifest: Manifest, settings: Settings, file: JournalDatabase | None) -> Planner:
    """Return the manifest's planner; with a journal the hashes of local images are kept between runs."""
    images = SourceImages(manifest.folder, settings.limits.max_image_megapixels, file)
    return Planner(manifest, with_columns(manifest, settings), images)


def estimate_of(
    planner: Planner, settings: Settings, profile: TargetProfile, file: JournalDatabase | None, *, retry_failed: bool
) -> Estimate:
    """Read the manifest once: counts, problems, cost. A plan shows them, a run does them."""
    wanted = settings.limits.max_in_flight
    at_once = wanted if isinstance(wanted, int) else _guess(window_bounds(wanted))
    return estimate(
        planner,
        None if file is None else file.find,
        profile.price,
        at_once,
        profile.service_seconds,
        profile.slots,
        retry_failed=retry_failed,
        lost_before=time.time() - _collect_seconds(settings),
    )


def _collect_seconds(settings: Settings) -> float:
    """Return how long a paid answer is asked for again: at most as long as its files are kept."""
    return min(settings.limits.collect_for, settings.target.keep_files or settings.limits.collect_for)


def _guess(bounds: tuple[int, int] | None) -> int:
    return _AUTO_GUESS if bounds is None else max(bounds[0], min(_AUTO_GUESS, bounds[1]))


# --- confirmation -----------------------------------------------------------------------------------------


def _require_consent(plan: Plan, request: RunRequest) -> None:
    """Require consent before money is spent: a confirmed plan, or a budget.

    Raises:
        ConfigError: a paid run without consent.
        StoppedEarly: the plan was rejected.
    """
    if request.confirm is not None:
        if not request.confirm(plan):
            raise StoppedEarly("nothing was submitted: the plan was not confirmed")
    elif (
        plan.profile.paid
        and plan.estimate.to_do
        and not request.collect_only
        and request.settings.limits.budget_usd is None
    ):
        raise ConfigError(
            f"this run would cost up to ${plan.estimate.dollars_at_most:,.2f}; pass yes=True (--yes) or set a budget"
        )


# --- running ----------------------------------------------------------------------------------------------


async def _run_jobs(
    request: RunRequest,
    directory: RunDirectory,
    journal: JournalWriter,
    projection: Export,
    plan: Plan,
    before: Counts,
    signals: SessionSignals,
    allowed: Allowance,
) -> Report | None:
    """Run the jobs; None if there is nothing to do, and nothing was opened."""
    settings, found = request.settings, plan.estimate
    to_do = 0 if request.collect_only else found.to_do
    is_open = any(before.by_state.get(state) for state in _TO_COLLECT)
    if not (is_open or before.by_state.get(State.UNKNOWN) or to_do):
        return None
    await _in_thread(projection.outdate)
    with JsonLog(directory.log) as log:
        observer = ObserverGroup(request.tally, request.observer, log)
        observer.expected(to_do + found.in_flight + found.collectable, found.done)
        observer.happened("spent", usd=0.0, total_usd=before.spent_usd)
        observer.happened("session", number=journal.session, target=plan.profile.name, to_do=to_do)
        async with (
            open_target(
                settings, directory.endpoint, version=tool_version(), run_name=directory.root.absolute().name
            ) as target,
            open_hints(settings, target, version=tool_version()) as hints,
        ):
            rng, share = Random(), target.share
            observer.happened(
                "open_files",
                reason=described(allowed, share.connections + share.hints),
                allowed=allowed.allowed,
                before=allowed.before,
                connections=share.connections + share.hints,
                bounded=share.is_bounded,
            )
            megapixels = settings.limits.max_image_megapixels
            images = ImageFolder(directory.root, limit_megapixels=megapixels, threads=share.files)
            context = RunContext(
                service=target.client,
                journal=journal,
                images=images,
                observer=observer,
                admission=_admission(settings, plan.profile, before, observer, rng),
                policy=_policy(request, target),
                now=time.time,
                rng=rng,
            )
            runner = Runner(
                context,
                polls=bucket_for(plan.profile.polls_per_second),
                hints=hints,
                reconciler=_reconciler(target, journal, observer, rng),
            )
            jobs = _no_jobs() if request.collect_only else _jobs(projection.planner)
            with loading_sink(), signals.stopping(runner):
                async with _showing_waits(runner, observer, directory):
                    return await runner.run(jobs)


@asynccontextmanager
async def _showing_waits(runner: Runner, observer: Observer, directory: RunDirectory) -> AsyncIterator[None]:
    """While the block lasts, report regularly what open jobs wait for, to observers and to `restyle status`."""
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_show_waits, runner, observer, directory)
        try:
            yield
        except Exception as error:  # the task group would wrap it
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _show_waits(runner: Runner, observer: Observer, directory: RunDirectory) -> None:
    was_shown = False
    while True:
        await anyio.sleep(_SHOW_WAITS_EVERY)
        now = time.time()
        overview = runner.waits.overview(now)
        if overview.stages or was_shown:
            observer.happened("waiting", **overview.to_json())
            facts: JsonObject | None = {"at": now, **overview.to_json()} if overview.stages else None
            await anyio.to_thread.run_sync(partial(directory.note_waits, facts), abandon_on_cancel=True)
        was_shown = bool(overview.stages)


async def _jobs(planner: Planner) -> AsyncGenerator[Sequence[Job], None]:
    """Yield the manifest's jobs in batches; each is read when the previous one is used up."""
    batches = planner.batches()
    while (batch := await _in_thread(partial(next, batches, None))) is not None:
        yield [item.job for item in batch.items if item.job is not None]


async def _no_jobs() -> AsyncGenerator[Sequence[Job], None]:
    for batch in list[Sequence[Job]]():
        yield batch


def _admission(
    settings: Settings, profile: TargetProfile, before: Counts, observer: Observer, rng: Random
) -> Admission:
    limits = settings.limits
    return Admission(
        window=_window(limits.max_in_flight, profile),
        budget=Budget(limits.budget_usd, spent=before.spent_usd, reserved=before.reserved_usd),
        price=profile.price,
        submits=bucket_for(profile.submits_per_second),
        observer=observer,
        rng=rng,
    )


def _window(at_once: int | str, profile: TargetProfile) -> Window:
    if isinstance(at_once, int):
        return Window(at_once)
    low, high = window_bounds(at_once) or (2, profile.window_ceiling)
    return Window(max(low, min(profile.window_start, high)), floor=low, ceiling=high)


def _reconciler(target: Connection, journal: JournalWriter, observer: Observer, rng: Random) -> Reconciler | None:
    """Return the reconciler; None if a repeated submit returns the request of the first one."""
    if target.idempotency is Idempotency.REPLAY:
        return None
    repeated_for = REPEAT_SECONDS if target.idempotency is Idempotency.REJECT else 0.0
    return Reconciler(target.client, journal, observer, time.time, rng, repeated_for=repeated_for)


def _policy(request: RunRequest, target: Connection) -> Policy:
    settings = request.settings
    limits = settings.limits
    failures = limits.max_failures or ""
    bounded = target.bounds_starts and target.idempotency is Idempotency.NONE
    _, _, after = limits.on_unknown.partition("=")
    seconds = parse_duration(after) if after else None
    return Policy(
        download=settings.output.download,
        attempts=limits.attempts,
        idempotency=target.idempotency,
        start_timeout=limits.start_timeout if bounded else None,
        file_seconds=settings.target.keep_files,
        retry_failed=request.retry_failed,
        collect_only=request.collect_only,
        resubmit_unknown_after=seconds if isinstance(seconds, float) else None,
        drain=limits.drain,
        collect_for=_collect_seconds(settings),
        deadline=limits.deadline,
        max_failures=int(failures) if failures and not failures.endswith("%") else None,
        max_failure_share=float(failures[:-1]) / 100 if failures.endswith("%") else None,
        keeps_results=target.keeps_results,
        target=settings.target.name,
    )


# --- the end ----------------------------------------------------------------------------------------------


def _run_facts(
    identity: JsonObject,
    manifest: Manifest,
    source: ManifestSource,
    request: RunRequest,
    profile: TargetProfile,
    started_at: str,
) -> JsonObject:
    place = {} if source.folder is None else {"folder": str(source.folder)}
    return {
        "restyle_version": tool_version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",  # `platform()` starts a process
        "last_started_at": started_at,
        "target": profile.name,
        "manifest": {"source": str(manifest.source.resolve()), **place, **identity},
        "config": config_of(request.settings),
    }


def _summary(
    request: RunRequest,
    directory: RunDirectory,
    report: Report | None,
    totals: Totals,
    before: Counts,
    after: Counts,
    began: float,
    started_at: str,
) -> Summary:
    stopping = None if report is None else report.stopped
    return Summary(
        exit_code=_exit_code(totals, stopping),
        rows=totals.rows,
        done=totals.done,
        failed=totals.failed,
        unknown=totals.unknown,
        pending=totals.pending,
        skipped=totals.skipped,
        errors=dict(totals.errors.most_common()),
        examples={name: totals.examples[name] for name, _ in totals.errors.most_common(_EXAMPLES)},
        flagged_images=totals.flagged,
        collectable=after.by_state.get(State.COLLECTABLE, 0),
        ended=0 if report is None else report.done + report.failed,
        spent_usd=after.spent_usd - before.spent_usd,
        spent_total_usd=after.spent_usd,
        reserved_usd=after.reserved_usd,
        seconds=time.monotonic() - began,
        stopped=None if stopping is None else str(stopping.why),
        reason="" if stopping is None else stopping.reason,
        started_at=started_at,
        results=directory.results,
        images=directory.images if request.settings.output.download else None,
        target=request.settings.target.name,
    )


def _exit_code(totals: Totals, stopping: StopRequest | None) -> ExitCode:
    if stopping is not None:
        if stopping.why is StopCause.ACCOUNT:
            return ExitCode.ACCOUNT_REFUSED
        return ExitCode.BAD_INPUT if stopping.why is StopCause.TARGET else ExitCode.STOPPED_EARLY
    if totals.unknown or totals.pending:
        return ExitCode.STOPPED_EARLY
    return ExitCode.SOME_FAILED if totals.failed else ExitCode.COMPLETE


def _timestamp() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


async def _in_thread(work: Callable[[], T]) -> T:
    return await anyio.to_thread.run_sync(work)
