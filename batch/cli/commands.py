"""The commands of `restyle`: each parses its flags, calls one function of `batch.api` and prints the result.

Results go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import orjson
from cyclopts import App, Parameter

from batch.cli.options import DISPLAY, JOBS, JobFlags
from batch.cli.process import run_call
from batch.cli.serve import serve
from batch.cli.streams import print_result
from batch.errors import ExitCode
from batch.version import tool_version

if TYPE_CHECKING:
    from batch.session import Plan

__all__ = ["STDIN", "app"]

T = TypeVar("T")

app = App(
    name="restyle",
    help="Restyle whole datasets of images with FLUX.1 [dev] image-to-image: pay once, lose nothing, know the cost"
    " first, reproduce every result.",
    help_format="plaintext",
    version=tool_version,
    suppress_keyboard_interrupt=False,  # it would end with 130 and say nothing
    help_epilogue="Exit codes: 0 complete, 1 unexpected error, 2 invalid input, 3 some rows failed, 4 stopped early and"
    " resumable, 5 another run holds the lock, 6 the account was refused.",
)

_MANIFEST = (
    "CSV, TSV, JSON, JSONL, Parquet or Arrow file; a folder or glob of Parquet or Arrow files; a folder of images;"
    " - for standard input"
)
STDIN = "/dev/stdin"
Manifest = Annotated[str, Parameter(help=_MANIFEST)]
Config = Annotated[Path | None, Parameter(["--config", "-c"], help="TOML file; examples in configs/", group=JOBS)]
_NO_FLAGS = JobFlags()
RunDir = Annotated[Path, Parameter(help="run directory, as given to `restyle run -o`")]
Quiet = Annotated[bool, Parameter(["--quiet", "-q"], negative="", help="print one line at the end", group=DISPLAY)]
Json = Annotated[bool, Parameter(negative="", help="print JSON", group=DISPLAY)]


@app.command
def plan(
    manifest: Manifest,
    /,
    *,
    out: Annotated[
        Path | None, Parameter(["--out", "-o"], help="run directory: count finished jobs there", group=JOBS)
    ] = None,
    config: Config = None,
    jobs: JobFlags = _NO_FLAGS,
    live_price: Annotated[
        bool, Parameter(negative="", help="fetch the current price from the target", group=JOBS)
    ] = False,
    retry_failed: Annotated[
        bool, Parameter(negative="", help="count failed rows of -o as jobs to do", group=JOBS)
    ] = False,
    json: Json = False,
) -> int:
    """Show what a run would do and cost. Sends nothing (except with --live-price) and costs nothing."""
    from batch import api
    from batch.estimate import render_note, render_problems

    flags = jobs.settings()
    found = run_call(
        lambda: api.plan(manifest, out, config=config, settings=flags, live_price=live_price, retry_failed=retry_failed)
    )
    if json:
        price = found.profile.price
        facts = {
            "target": found.profile.name,
            "price_as_of": None if price is None else price.as_of.isoformat(),
            "price_is_live": found.profile.live,
            "spent_usd": found.spent_usd,
            "refusal": found.refusal or None,
            "manifest_notes": list(found.manifest.notes),
            **found.estimate.to_json(),
        }
        print_result(orjson.dumps(facts, option=orjson.OPT_INDENT_2).decode())
        return ExitCode.COMPLETE
    print_result(found.profile.headline)
    for note in found.manifest.notes:
        print_result(render_note(note))
    print_result(found.estimate.render())
    if found.spent_usd:
        print_result(f"spent so far ${found.spent_usd:,.2f}")
    if found.estimate.problem_count:
        print_result(render_problems(_name_of(found, manifest), found.estimate.problems, found.estimate.problem_count))
    if found.refusal:
        print_result(f"`restyle run` refuses this: {found.refusal}")
    return ExitCode.COMPLETE


@app.command
def run(
    manifest: Manifest,
    /,
    *,
    out: Annotated[Path, Parameter(["--out", "-o"], help="run directory; an existing one is resumed", group=JOBS)],
    config: Config = None,
    jobs: JobFlags = _NO_FLAGS,
    retry_failed: Annotated[bool, Parameter(negative="", help="retry failed rows", group=JOBS)] = False,
    new_config: Annotated[
        bool, Parameter(negative="", help="resume although the configuration has changed", group=JOBS)
    ] = False,
    yes: Annotated[
        bool, Parameter(["--yes", "-y"], negative="", help="accept the cost without asking", group=JOBS)
    ] = False,
    quiet: Quiet = False,
    log_format: Annotated[Literal["text", "json"], Parameter(help="format of progress lines", group=DISPLAY)] = "text",
) -> int:
    """Run a manifest, or resume a run. Re-running never pays twice."""
    from batch import api
    from batch.cli import output as screen
    from batch.run.observers import ProgressCounter

    flags = jobs.settings()
    tally = ProgressCounter()
    observer, close = screen.display_for(tally, quiet=quiet, log_format=log_format)

    def confirm(found: api.Plan) -> bool:
        screen.announce(found, _name_of(found, manifest), quiet=quiet, log_format=log_format)
        return screen.confirmed(found, yes=yes, budget=_budget(found), is_piped=manifest == STDIN)

    def _budget(found: api.Plan) -> float | None:
        from batch.config import load_settings

        return load_settings(config, flags).limits.budget_usd if found.profile.paid else None

    try:
        summary = run_call(
            lambda: api.run(
                manifest,
                out,
                config=config,
                settings=flags,
                retry_failed=retry_failed,
                new_config=new_config,
                observer=observer,
                tally=tally,
                confirm=confirm,
                signals=True,
            )
        )
    finally:
        close()
    screen.conclude(summary, quiet=quiet, log_format=log_format)
    return summary.exit_code


@app.command
def status(run_dir: RunDir, /, *, json: Json = False) -> int:
    """Show job counts by state, cost, rate, the oldest open request and what open jobs wait for."""
    from batch import api
    from batch.cli import output as screen
    from batch.run.waits import duration

    found = run_call(lambda: api.status(run_dir))
    facts = found.to_json()
    if json:
        print_result(orjson.dumps(facts, option=orjson.OPT_INDENT_2).decode())
        return ExitCode.COMPLETE
    print_result(f"{run_dir}: {'running' if found.running else 'not running'} (target {found.target})")
    counts = found.counts
    for state, count in counts.by_state.items():
        if count:
            print_result(f"{state:<12}{count:>12,}")
    if counts.spent_usd or counts.reserved_usd:
        print_result(f"{'spent':<12}{'$' + format(counts.spent_usd, ',.2f'):>12}")
        print_result(f"{'reserved':<12}{'$' + format(counts.reserved_usd, ',.2f'):>12}")
    if found.done_per_minute is not None:
        print_result(f"{'rate':<12}{found.done_per_minute:>12,.1f} jobs per minute")
    if found.paused_until is not None:
        print_result(f"submits are paused {screen.ahead(found.paused_until)}")
    if counts.oldest_open_at is not None:
        print_result(f"{'oldest open':<12}{screen.age(counts.oldest_open_at):>12}")
    if found.waits is not None:
        print_result(f"waiting, as of {duration(found.waits_age_seconds)} ago:")
        for name, jobs, rest in found.waits.lines():
            print_result(f"  {name:<18}{jobs:>4,} {rest}")
    return ExitCode.COMPLETE


@app.command
def export(
    run_dir: RunDir,
    /,
    *,
    out: Annotated[
        Path | None,
        Parameter(["--out", "-o"], help="output file (.parquet); default: results.parquet in the run directory"),
    ] = None,
    manifest: Annotated[str | None, Parameter(help="new location of the manifest, if it has moved")] = None,
) -> int:
    """Rebuild the results table from the journal and the manifest. Free."""
    from batch import api
    from batch.estimate import counted

    totals = run_call(lambda: api.export(run_dir, out, manifest=manifest))
    where, rows = out or run_dir / "results.parquet", counted(totals.rows, "row")
    print_result(f"{where}: {rows}, {totals.done:,} done, {totals.failed:,} failed, {totals.pending:,} pending")
    return ExitCode.COMPLETE


@app.command
def audit(
    run_dir: RunDir,
    /,
    *,
    repair: Annotated[bool, Parameter(negative="", help="download missing or damaged images again, free")] = False,
    json: Json = False,
) -> int:
    """Check that journal, results, images and bills agree; exit code 3 if they do not."""
    from batch import api

    books = run_call(lambda: api.audit(run_dir, repair=repair))
    if json:
        print_result(orjson.dumps(books.to_json(), option=orjson.OPT_INDENT_2).decode())
    else:
        print_result(f"{books.run}, target {books.target}")
        print_result(books.render())
    return ExitCode.COMPLETE if books.add_up else ExitCode.SOME_FAILED


@app.command
def cancel(run_dir: RunDir, /) -> int:
    """Ask the target to cancel open requests. The next run reads how each one ended."""
    from batch import api
    from batch.cli import output as screen

    display = screen.CancelDisplay()
    try:
        found = run_call(lambda: api.cancel(run_dir, told=display.show))
    except KeyboardInterrupt:
        display.close()
        if display.last.open:
            print_result(screen.cancelled(display.last))
        raise
    finally:
        display.close()
    print_result(screen.cancelled(found))
    return ExitCode.STOPPED_EARLY if found.left else ExitCode.COMPLETE


app.command(serve)


@app.command
def reconcile(
    run_dir: RunDir,
    /,
    *,
    manifest: Annotated[str | None, Parameter(help="new location of the manifest, if it has moved")] = None,
    quiet: Quiet = False,
) -> int:
    """Look up submits of unknown outcome and collect open results. Submits nothing."""
    from batch import api
    from batch.cli import output as screen

    summary = run_call(lambda: api.reconcile(run_dir, manifest=manifest, signals=True))
    screen.conclude(summary, quiet=quiet, log_format="text")
    return summary.exit_code


def _name_of(found: Plan, manifest: str) -> str:
    """Return the name of the file whose lines the problems count."""
    return str(found.manifest.place or ("standard input" if manifest == STDIN else manifest))
