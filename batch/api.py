"""The library: plan, run, status, export, audit and cancel, as coroutines and as plain functions.

    from batch.api import plan_sync, run_sync
    print(plan_sync("manifests/demo.csv").estimate.render())
    summary = run_sync("manifests/demo.csv", "out/demo")

The plain functions also work inside a running event loop (a notebook): they run in their own thread. There, Ctrl-C is
raised after they have ended, see `run`.
Every command of `batch.cli.commands` is one of these calls. Settings are those of the config file: pass `config` (a
path) or `settings` nested like the file, `settings={"input": {"strength": 0.8}}`, or both.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, ParamSpec, TypeVar

import anyio
import anyio.to_thread

from batch.audit.report import AuditReport
from batch.config import Settings, load_settings
from batch.directory import RunDirectory
from batch.errors import ConfigError, ExitCode, RunDirectoryError, RunLocked
from batch.fal.protocol import names_fal
from batch.journal.database import JournalDatabase
from batch.journal.records import Counts
from batch.journal.states import State
from batch.journal.writer import open_journal
from batch.manifest.opening import ManifestSource, located, open_manifest
from batch.results.export import Export, identity_of, require_apart, require_place
from batch.results.totals import Totals
from batch.run.cancellation import Cancelled, cancel_open
from batch.run.interfaces import Observer
from batch.run.observers import ProgressCounter, pause_in
from batch.run.waits import Overview
from batch.session import Plan, RunRequest, Summary, estimate_of, open_planner, run_session
from batch.system.paths import at_home
from batch.system.sync_call import BlockingCall
from batch.targets import TargetProfile, check_faults, open_target, profile_of
from batch.targets import live_price as ask_live_price
from batch.types import JsonObject
from batch.version import tool_version

__all__ = [
    "AuditReport",
    "Cancelled",
    "Plan",
    "Status",
    "Summary",
    "audit",
    "audit_sync",
    "cancel",
    "cancel_sync",
    "event_loop",
    "export",
    "export_sync",
    "plan",
    "plan_sync",
    "reconcile",
    "reconcile_sync",
    "run",
    "run_sync",
    "status",
    "status_sync",
]

P = ParamSpec("P")
T = TypeVar("T")


async def plan(
    manifest: str | Path,
    out: str | Path | None = None,
    *,
    config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    live_price: bool = False,
    retry_failed: bool = False,
) -> Plan:
    """Return what a run would do and cost. Spends nothing, writes nothing, and sends nothing except for a live price.

    Args:
        manifest: CSV, TSV, JSON, JSONL, Parquet or Arrow file; a folder or glob of Parquet or Arrow files; a folder of
            images; a dataset saved with `save_to_disk`; `-` for standard input.
        out: run directory of an earlier run, to count what is already done there. If its config differs, it is counted
            too, and `Plan.refusal` says why a run would be refused.
        config: TOML file.
        settings: nested like the file; overrides it.
        live_price: ask the target for its current price and use it. A run does not: it uses the configured or built-in
            price.
        retry_failed: count like a run that retries failed jobs.

    Raises:
        ConfigError, ManifestError, RunDirectoryError: the message says what to do.
        AccountRefused, StoppedEarly: could not fetch the live price.
    """
    resolved = _resolve(config, settings)
    live = None
    if live_price:
        live = await ask_live_price(resolved, version=tool_version(), now=partial(datetime.now, UTC))
    profile = profile_of(resolved, live)
    run_directory = None if out is None else Path(at_home(out))
    async with located(at_home(manifest), resolved) as source:
        return await anyio.to_thread.run_sync(
            partial(_plan, source, resolved, profile, run_directory, retry_failed=retry_failed)
        )


async def run(
    manifest: str | Path,
    out: str | Path,
    *,
    config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    yes: bool = False,
    retry_failed: bool = False,
    new_config: bool = False,
    observer: Observer | None = None,
    tally: ProgressCounter | None = None,
    confirm: Callable[[Plan], bool] | None = None,
    signals: bool = False,
) -> Summary:
    """Run a manifest, or resume a run. Calling it again submits nothing that was accepted before.

    Args:
        manifest: as for `plan`.
        out: the run directory, created if missing.
        config: TOML file.
        settings: nested like the file; overrides it.
        yes: agree to the cost of a paid run; without it a paid run needs a budget or `confirm`.
        retry_failed: retry jobs that failed in earlier runs.
        new_config: accept that the run directory was created with another configuration.
        observer: receives events.
        tally: counts during the run, for your own display.
        confirm: called with the plan; False ends the run before anything is submitted.
        signals: stop gracefully on SIGINT and SIGTERM and return the summary; in a process's main thread only.

    Raises:
        InputError: config, manifest or run directory are invalid; nothing was submitted.
        StoppedEarly: the plan was not confirmed, or a disk could not be written.
        RunLocked: another process uses this run directory.

    A cancelled run stops submitting at once, collects jobs in flight for `limits.drain`, writes the results and then
    raises the cancellation; a second cancellation ends the collecting. Ctrl-C in `run_sync` does the same and raises
    `KeyboardInterrupt` at the end.
    """
    request = RunRequest(
        manifest=at_home(manifest),
        out=Path(at_home(out)),
        settings=_resolve(config, settings),
        retry_failed=retry_failed,
        new_config=new_config,
        signals=signals,
        observer=observer or Observer(),
        tally=tally or ProgressCounter(),
        confirm=confirm or ((lambda _: True) if yes else None),
    )
    return await run_session(request)


@dataclass(frozen=True, slots=True)
class Status:
    """State of a run directory according to its journal; `running` is False also for a run that was killed."""

    counts: Counts
    done_per_minute: float | None
    """Rate of the last session; None before anything ended."""
    target: str
    manifest: str
    running: bool
    waits: Overview | None = None
    """The waits of open jobs, as the run recorded them; None without a running run, or before its first record."""
    waits_age_seconds: float = 0.0
    """Age of that record."""
    paused_until: float | None = None
    """Unix seconds; the run submits nothing until then, because the target asked for it or does not answer."""

    def to_json(self) -> JsonObject:
        """Return the status as JSON values."""
        counts = self.counts
        return {
            "jobs": {str(state): counts.by_state.get(state, 0) for state in State},
            "spent_usd": round(counts.spent_usd, 6),
            "reserved_usd": round(counts.reserved_usd, 6),
            "done_per_minute": self.done_per_minute,
            "oldest_open_at": counts.oldest_open_at,
            "target": self.target,
            "manifest": self.manifest,
            "running": self.running,
            "waits": None
            if self.waits is None
            else {**self.waits.to_json(), "age_seconds": round(self.waits_age_seconds, 1)},
            "paused_until": self.paused_until,
        }


async def status(out: str | Path) -> Status:
    """Return counts by state, spend, rate, the oldest open request and what open jobs wait for; also during a run.

    Raises:
        RunDirectoryError: the directory has no run.
    """
    return await anyio.to_thread.run_sync(_status, RunDirectory(Path(at_home(out))))


async def export(out: str | Path, to: str | Path | None = None, *, manifest: str | Path | None = None) -> Totals:
    """Rebuild the results from the journal and the manifest; free, and repeatable.

    Args:
        out: the run directory.
        to: another file than its `results.parquet`; its name ends in .parquet.
        manifest: the current path of the manifest, if it has moved.

    Raises:
        RunDirectoryError: the directory has no run. ManifestError: the manifest is missing; pass its path.
        ConfigError: `to` is not a valid path for a results table.
    """
    directory = RunDirectory(Path(at_home(out)))
    directory.require()
    settings = _settings_of(directory, contacts_target=False)
    async with located(_manifest_of(directory, manifest), settings) as source:
        return await anyio.to_thread.run_sync(partial(_export, directory, settings, source, to))


async def audit(out: str | Path, *, repair: bool = False) -> AuditReport:
    """Compare journal, results, images and, if the key allows it, the target's bills.

    Without `repair` it writes nothing and takes no lock; it reads every image. `AuditReport.add_up` says whether
    everything agrees.

    Args:
        out: the run directory.
        repair: first download stored images again that are missing or damaged on disk, free; `AuditReport.repair` has
            the outcome.

    Raises:
        RunDirectoryError: the directory has no run. RunLocked: it is running; audit it after it has ended.
        ConfigError, StorageError: during a repair: the key is missing, or the disk refused.
    """
    directory = RunDirectory(Path(at_home(out)))
    directory.require()
    if directory.is_locked():
        raise RunLocked(f"{directory.root} is in use by a run; audit it after the run has ended")
    from batch.audit.checks import audited  # imports pyarrow, which slows the start of a run

    settings, repair_facts = _settings_of(directory), None
    if repair:
        from batch.audit.repair import repaired

        with directory.locked("restyle audit"):
            repair_facts = await repaired(directory, settings, version=tool_version(), rng=Random())
    books = await audited(directory, settings, version=tool_version(), now=time.time())
    return books if repair_facts is None else replace(books, repair=repair_facts)


async def reconcile(out: str | Path, *, manifest: str | Path | None = None, signals: bool = False) -> Summary:
    """Settle submits of unknown outcome, and collect what is open; submit nothing.

    Args:
        out: the run directory.
        manifest: the current path of the manifest, if it has moved; the results are rewritten from it.
        signals: as for `run`.

    Raises:
        RunDirectoryError: the directory has no run. RunLocked: another process uses it.
    """
    directory = RunDirectory(Path(at_home(out)))
    directory.require()
    request = RunRequest(
        manifest=_manifest_of(directory, manifest),
        out=directory.root,
        settings=_settings_of(directory),
        collect_only=True,
        signals=signals,
    )
    return await run_session(request)


async def cancel(out: str | Path, *, told: Callable[[Cancelled], None] | None = None) -> Cancelled:
    """Ask the target to cancel every open request of a run that is not running, many concurrently.

    A cancel is a request: a job that is already executing may finish and be billed. The next `run` reads how each
    request ended: a cancelled job then counts as failed, and runs again only with `retry_failed`. Jobs that were not
    sent yet remain to do. The call may be cancelled and repeated at any time. The callback receives the counts so far,
    after each answer.

    Raises:
        RunDirectoryError: the directory has no run. RunLocked: it is running; stop it first.
        AccountRefused: the target refused the key.
    """
    directory = RunDirectory(Path(at_home(out)))
    directory.require()
    settings = _settings_of(directory)
    with directory.locked("restyle cancel"):
        async with (
            open_journal(directory.journal, version=tool_version(), lost=directory.lost_journal()) as journal,
            open_target(settings, directory.endpoint, version=tool_version()) as target,
        ):
            return await cancel_open(target.client, journal, Random(), told)


def _plan(
    source: ManifestSource, settings: Settings, profile: TargetProfile, out: Path | None, *, retry_failed: bool
) -> Plan:
    opened = open_manifest(source, settings)
    check_faults(settings)
    file, refusal = None, ""
    if out is not None:
        directory = RunDirectory(out)
        directory.check_place()
        refusal = _refusal(directory, settings)
        if directory.has_begun():
            file = JournalDatabase.open_read_only(directory.journal)
    try:
        planner = open_planner(opened, settings, None)
        spent = 0.0 if file is None else file.counts().spent_usd
        found = estimate_of(planner, settings, profile, file, retry_failed=retry_failed)
        return Plan(profile, opened, found, spent, refusal)
    finally:
        if file is not None:
            file.close()


def _refusal(directory: RunDirectory, settings: Settings) -> str:
    """Return why a run there would need `new_config`; empty if it would not.

    Raises:
        RunDirectoryError: it would be refused even with `new_config`.
    """
    directory.check_config(settings, accept=True)
    try:
        directory.check_config(settings, accept=False)
    except RunDirectoryError as error:
        return str(error)
    return ""


def _status(directory: RunDirectory) -> Status:
    directory.require()
    facts = directory.read_run() or {}
    file = JournalDatabase.open_read_only(directory.journal)
    try:
        counts, rate = file.counts(), _rate(file)
    finally:
        file.close()
    manifest, running = facts.get("manifest"), directory.is_locked()
    waits, waits_age = _waits_of(directory) if running else (None, 0.0)
    return Status(
        counts=counts,
        done_per_minute=rate,
        target=str(facts.get("target", "")),
        manifest=str(manifest.get("source", "")) if isinstance(manifest, dict) else "",
        running=running,
        waits=waits,
        waits_age_seconds=waits_age,
        paused_until=pause_in(directory.log, time.time()) if running else None,
    )


def _waits_of(directory: RunDirectory) -> tuple[Overview | None, float]:
    """Return what open jobs wait for, and the age of that record, as written by the running run."""
    note = directory.read_waits()
    at = None if note is None else note.get("at")
    if note is None or not isinstance(at, int | float):
        return None, 0.0
    overview = Overview.of_json(note)
    return (overview if overview.stages else None), max(0.0, time.time() - at)


def _rate(file: JournalDatabase) -> float | None:
    """Return the jobs done per minute during the last session."""
    sessions = file.sessions()
    if not sessions:
        return None
    last = sessions[-1]
    finished = file.finished_since(last.started_at)
    if finished.count < 2 or finished.last_at <= last.started_at:
        return None
    return finished.count / (finished.last_at - last.started_at) * 60.0


def _export(directory: RunDirectory, settings: Settings, source: ManifestSource, to: str | Path | None) -> Totals:
    to = None if to is None else Path(at_home(to))
    if to is not None:
        require_place(to)
    opened = open_manifest(source, settings)
    if to is not None:
        require_apart(to, opened)
    file = JournalDatabase.open_read_only(directory.journal)
    try:
        planner = open_planner(opened, settings, None)
        projection = Export(planner, opened, settings, file, identity_of(opened, settings))
        return projection.write(directory.results if to is None else to)
    finally:
        file.close()


def _resolve(config: str | Path | None, settings: Mapping[str, Any] | None) -> Settings:
    return load_settings(None if config is None else Path(config), dict(settings or {}))


def _manifest_of(directory: RunDirectory, given: str | Path | None) -> str | Path | ManifestSource:
    """Return the manifest's path: the given one, else the one of the last run, or the copy of its standard input."""
    stored = (directory.read_run() or {}).get("manifest")
    facts = stored if isinstance(stored, dict) else {}
    source, folder = (at_home(given) if given else None) or facts.get("source"), facts.get("folder")
    if not given and source and folder:
        return ManifestSource(directory.root / Path(str(source)).name, Path(str(folder)))
    if not source:
        raise RunDirectoryError(f"{directory.run_file} does not name the manifest; pass it with --manifest")
    return str(source)


def _settings_of(directory: RunDirectory, *, contacts_target: bool = True) -> Settings:
    """Return the configuration that the run directory was last used with.

    Raises:
        ConfigError: it belongs to another version; or the target is to be contacted, and is refused by this version.
    """
    config = (directory.read_run() or {}).get("config")
    if not isinstance(config, dict):
        raise RunDirectoryError(f"{directory.run_file} has no config; run the `restyle run` command again")
    target = config.get("target")
    name = target.get("name") if isinstance(target, dict) else None
    if isinstance(target, dict) and isinstance(name, str) and name != "fal" and names_fal(name):
        if contacts_target:
            raise ConfigError(
                f"the target of {directory.root} is a URL of one of fal's own hosts, which is not supported; continue"
                f" with `restyle run MANIFEST -o {directory.root} --target fal`, which collects what is paid for"
            )
        config = {**config, "target": {**target, "name": "fal"}}
    try:
        return Settings.model_validate(config)
    except ValueError as error:
        raise ConfigError(f"{directory.run_file} has a config of another version of restyle: {error}") from error


# --- plain functions --------------------------------------------------------------------------------------


def _blocking(
    function: Callable[P, Awaitable[T]], sentence: Callable[[T], str] = lambda _: "interrupted"
) -> Callable[P, T]:
    """Return the function without `await`: it runs in its own thread and event loop, see `batch.system.sync_call`."""
    name = getattr(function, "__name__", "call")

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        started = BlockingCall(partial(function, *args, **kwargs), sentence, signals=bool(kwargs.get("signals")))
        return started.result(f"restyle {name}", event_loop())

    call.__name__ = f"{name}_sync"
    call.__doc__ = f"`{name}` without `await`.\n\n{function.__doc__}"
    return call


def _interrupted(summary: Summary) -> str:
    """Return the message of a KeyboardInterrupt after a run that stopped gracefully."""
    rest = "nothing is left to do" if summary.exit_code is ExitCode.COMPLETE else "repeat the call to continue"
    return f"{summary.done} of {summary.rows} rows are done, the results are written; {rest}"


def event_loop() -> dict[str, Any]:
    """Return options for `anyio.run`: uvloop if it is installed."""
    try:
        import uvloop  # noqa: F401 - only to see whether it is installed
    except ImportError:
        return {}
    return {"use_uvloop": True}


plan_sync = _blocking(plan)
run_sync = _blocking(run, _interrupted)
status_sync = _blocking(status)
export_sync = _blocking(export)
audit_sync = _blocking(audit)
reconcile_sync = _blocking(reconcile, _interrupted)
cancel_sync = _blocking(cancel)
