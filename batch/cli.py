"""The `restyle` command: parse, call one function of `batch.api`, print, exit code. Decides nothing else.

Results go to standard output, progress and errors to standard error. A foreseeable fault is one sentence;
anything else is a defect of ours, exit code 1, and says how to report it.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import anyio
import orjson
from cyclopts import App, CycloptsError, Group, Parameter

from batch.errors import ExitCode, RestyleError
from batch.version import tool_version

__all__ = ["app", "main"]

T = TypeVar("T")

app = App(
    name="restyle",
    help="Restyle whole datasets of pictures through FLUX.1 [dev] image-to-image. Pay once, lose nothing, know the"
    " cost first, get the same result again.",
    help_format="plaintext",
    version=tool_version,
    help_epilogue="Exit codes: 0 complete, 1 unexpected error, 2 wrong input, 3 some rows failed, 4 stopped early and"
    " resumable, 5 another run holds the lock, 6 the account was refused.",
)

_jobs = Group("What to do", sort_key=1)
_limits = Group("Limits", sort_key=2)
_display = Group("Display", sort_key=3)

Manifest = Annotated[str, Parameter(help="CSV, TSV, JSONL or Parquet file, or a folder or glob of Parquet files")]
Config = Annotated[Path | None, Parameter(["--config", "-c"], help="TOML file; examples in configs/", group=_jobs)]
Target = Annotated[str | None, Parameter(help="local (default, costs nothing), fal, or a URL", group=_jobs)]
InFlight = Annotated[str | None, Parameter(help="jobs at once: auto (default) or a number", group=_limits)]
Rows = Annotated[int | None, Parameter(help="only the first N rows of the manifest", group=_limits)]
OnBadRow = Annotated[
    Literal["fail", "skip"] | None,
    Parameter(help="what a row that cannot work becomes: a failed row (default) or a skipped one", group=_jobs),
]
RunDir = Annotated[Path, Parameter(help="the folder that `restyle run -o` named")]
Quiet = Annotated[bool, Parameter(["--quiet", "-q"], negative="", help="one line at the end", group=_display)]
Json = Annotated[bool, Parameter(negative="", help="as JSON", group=_display)]


@app.command
def plan(
    manifest: Manifest,
    /,
    *,
    out: Annotated[
        Path | None, Parameter(["--out", "-o"], help="run directory: count what is done there", group=_jobs)
    ] = None,
    config: Config = None,
    target: Target = None,
    max_in_flight: InFlight = None,
    limit: Rows = None,
    on_bad_row: OnBadRow = None,
    live_price: Annotated[
        bool, Parameter(negative="", help="ask the target for its present price; else nothing is sent", group=_jobs)
    ] = False,
    json: Json = False,
) -> int:
    """Show what a run would do and cost. Spends nothing, and sends nothing but for --live-price."""
    from batch import api
    from batch.manifest.survey import render_problems

    flags = _flags(target=target, max_in_flight=max_in_flight, limit=limit, on_bad_row=on_bad_row)
    found = _run(lambda: api.plan(manifest, out, config=config, settings=flags, live_price=live_price))
    if json:
        price = found.terms.price
        facts = {
            "target": found.terms.name,
            "price_as_of": None if price is None else price.as_of.isoformat(),
            "price_is_live": found.terms.live,
            "spent_usd": found.spent_usd,
            **found.survey.to_json(),
        }
        _print(orjson.dumps(facts, option=orjson.OPT_INDENT_2).decode())
        return ExitCode.COMPLETE
    _print(found.terms.headline)
    _print(found.survey.render())
    if found.spent_usd:
        _print(f"spent so far ${found.spent_usd:,.2f}")
    if found.survey.problem_count:
        _print(render_problems(str(manifest), found.survey.problems, found.survey.problem_count))
    return ExitCode.COMPLETE


@app.command
def run(
    manifest: Manifest,
    /,
    *,
    out: Annotated[Path, Parameter(["--out", "-o"], help="run directory; the same one goes on", group=_jobs)],
    config: Config = None,
    target: Target = None,
    engine: Annotated[
        Literal["preview", "echo"] | None, Parameter(help="of the embedded endpoint", group=_jobs)
    ] = None,
    service_time: Annotated[
        str | None, Parameter(help="of the embedded echo engine, for rehearsals: 2s", group=_jobs)
    ] = None,
    slots: Annotated[int | None, Parameter(help="what the embedded endpoint does at once", group=_jobs)] = None,
    faults: Annotated[
        str | None, Parameter(help="rehearse failures: a faults file for the embedded endpoint", group=_jobs)
    ] = None,
    max_in_flight: InFlight = None,
    rate: Annotated[str | None, Parameter(help="submits a second, for instance 5/s", group=_limits)] = None,
    budget: Annotated[float | None, Parameter(help="US dollars that may be spent in all", group=_limits)] = None,
    deadline: Annotated[str | None, Parameter(help="stop in time to be over after so long: 50m", group=_limits)] = None,
    max_failures: Annotated[
        str | None, Parameter(help="stop when more fail: a number or a percentage", group=_limits)
    ] = None,
    limit: Rows = None,
    retry_failed: Annotated[bool, Parameter(negative="", help="take failed rows up again", group=_jobs)] = False,
    new_config: Annotated[
        bool, Parameter(negative="", help="go on although the configuration has changed", group=_jobs)
    ] = False,
    download: Annotated[bool | None, Parameter(help="keep the result pictures (default: yes)", group=_jobs)] = None,
    on_bad_row: OnBadRow = None,
    yes: Annotated[bool, Parameter(["--yes", "-y"], negative="", help="agree to the cost", group=_jobs)] = False,
    quiet: Annotated[
        bool, Parameter(["--quiet", "-q"], negative="", help="one line at the end", group=_display)
    ] = False,
    log_format: Annotated[Literal["text", "json"], Parameter(help="of progress lines", group=_display)] = "text",
) -> int:
    """Do it, or go on with it: the same command again never pays twice."""
    from batch import api
    from batch.run.observe import Tally

    flags = _flags(
        target=target, engine=engine, service_time=service_time, slots=slots, faults=faults,
        max_in_flight=max_in_flight, rate=rate, budget=budget, deadline=deadline, max_failures=max_failures,
        limit=limit, download=download, on_bad_row=on_bad_row,
    )  # fmt: skip
    tally = Tally()
    observer, close = _display_for(tally, quiet=quiet, log_format=log_format)

    def confirm(found: api.Plan) -> bool:
        _announce(found, str(manifest), quiet=quiet, log_format=log_format)
        return _confirmed(found, yes=yes, budget=_budget(found))

    def _budget(found: api.Plan) -> float | None:
        from batch.config import load_settings

        return load_settings(config, flags).limits.budget_usd if found.terms.paid else None

    try:
        summary = _run(
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
    _conclude(summary, quiet=quiet, log_format=log_format)
    return summary.exit_code


@app.command
def status(run_dir: RunDir, /, *, json: Json = False) -> int:
    """Show counts by state, spend, rate and the oldest open request of a run."""
    from batch import api

    found = _run(lambda: api.status(run_dir))
    facts = found.to_json()
    if json:
        _print(orjson.dumps(facts, option=orjson.OPT_INDENT_2).decode())
        return ExitCode.COMPLETE
    _print(f"{run_dir}: {'a run works here' if found.running else 'no run works here'}, target {found.target}")
    counts = found.counts
    for state, count in counts.by_state.items():
        if count:
            _print(f"{state:<12}{count:>12,}")
    if counts.spent_usd or counts.reserved_usd:
        _print(f"{'spent':<12}{'$' + format(counts.spent_usd, ',.2f'):>12}")
        _print(f"{'reserved':<12}{'$' + format(counts.reserved_usd, ',.2f'):>12}")
    if found.done_per_minute is not None:
        _print(f"{'rate':<12}{found.done_per_minute:>12,.1f} jobs a minute")
    if counts.oldest_open_at is not None:
        _print(f"{'oldest open':<12}{_age(counts.oldest_open_at):>12}")
    return ExitCode.COMPLETE


@app.command
def export(
    run_dir: RunDir,
    /,
    *,
    out: Annotated[Path | None, Parameter(["--out", "-o"], help="write here instead of results.parquet")] = None,
    manifest: Annotated[str | None, Parameter(help="where the manifest is now, if it has moved")] = None,
) -> int:
    """Rebuild the results from the journal and the manifest; free, as often as you like."""
    from batch import api

    totals = _run(lambda: api.export(run_dir, out, manifest=manifest))
    where = out or run_dir / "results.parquet"
    _print(f"{where}: {totals.rows:,} rows, {totals.done:,} done, {totals.failed:,} failed, {totals.pending:,} pending")
    return ExitCode.COMPLETE


@app.command
def audit(run_dir: RunDir, /, *, json: Json = False) -> int:
    """Show whether journal, results, pictures and bills add up; exit code 3 where they do not."""
    from batch import api

    books = _run(lambda: api.audit(run_dir))
    if json:
        _print(orjson.dumps(books.to_json(), option=orjson.OPT_INDENT_2).decode())
    else:
        _print(f"{books.run}, target {books.target}")
        _print(books.render())
    return ExitCode.COMPLETE if books.add_up else ExitCode.SOME_FAILED


@app.command
def cancel(run_dir: RunDir, /) -> int:
    """Ask the target to cancel what is still open; the next run reads how each request ended."""
    from batch import api

    found = _run(lambda: api.cancel(run_dir))
    _print(
        f"{found.asked:,} open requests: {found.requested:,} cancellations requested, {found.too_late:,} too late,"
        f" {found.unanswered:,} without an answer; `restyle run` collects how they ended"
    )
    return ExitCode.COMPLETE


@app.command
def serve(
    *,
    host: Annotated[str, Parameter(help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="0 takes any free one")] = 8787,
    engine: Annotated[Literal["preview", "echo"], Parameter(help="what executes requests")] = "preview",
    data_dir: Annotated[Path, Parameter(help="queue and files live here")] = Path("restyle-data"),
    slots: Annotated[int | None, Parameter(help="requests executed at once")] = None,
    service_time: Annotated[str, Parameter(help="of the echo engine: 2s")] = "0",
    price: Annotated[float, Parameter(help="US dollars a megapixel, as its platform API tells it")] = 0.0,
    faults: Annotated[Path | None, Parameter(help="commit the faults of this file on purpose")] = None,
    keys: Annotated[Path | None, Parameter(help="file with the keys of those who may ask")] = None,
    retention: Annotated[str, Parameter(help="how long finished results and files stay: 30d")] = "30d",
    tls_cert: Annotated[Path | None, Parameter(help="PEM file of a certificate: https instead of http")] = None,
    tls_key: Annotated[Path | None, Parameter(help="PEM file of its key")] = None,
    new_key: Annotated[str | None, Parameter(help="add a key of that name to the keys file, show it and end")] = None,
    allow_private: Annotated[
        bool, Parameter(negative="", help="fetch from, and call, loopback and private addresses too")
    ] = False,
) -> int:
    """Run the endpoint on this machine: the same API as fal's, nothing to pay."""
    from batch.config import parse_duration
    from batch.server.keys import load_keys
    from batch.server.serve import ServeOptions, run_server

    if new_key is not None:
        return _new_key(keys, new_key)
    try:
        seconds, kept = parse_duration(service_time), parse_duration(retention)
    except ValueError as error:
        return _fail(str(error), ExitCode.BAD_INPUT)
    assert isinstance(seconds, float)
    assert isinstance(kept, float)
    options = ServeOptions(
        data_dir=data_dir, host=host, port=port, engine=engine, slots=slots, service_time=seconds,
        price_usd=price, faults=faults, keys=load_keys(keys, os.environ), allow_private=allow_private,
        retention=kept, tls_cert=tls_cert, tls_key=tls_key,
    )  # fmt: skip
    run_server(options, ready=lambda url: _print(f"serving {engine} at {url}  (Ctrl-C stops)", flush=True))
    return ExitCode.COMPLETE


@app.command
def reconcile(
    run_dir: RunDir,
    /,
    *,
    manifest: Annotated[str | None, Parameter(help="where the manifest is now, if it has moved")] = None,
    quiet: Annotated[
        bool, Parameter(["--quiet", "-q"], negative="", help="one line at the end", group=_display)
    ] = False,
) -> int:
    """Settle submits whose outcome is unknown and collect what is open; submits nothing."""
    from batch import api

    summary = _run(lambda: api.reconcile(run_dir, manifest=manifest, signals=True))
    _conclude(summary, quiet=quiet, log_format="text")
    return summary.exit_code


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `restyle` script."""
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        text = " ".join(str(error).split())
        code = _fail(f"{text} (restyle {_command(arguments)}--help shows what there is)", ExitCode.BAD_INPUT)
    except RestyleError as error:
        code = _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _fail("interrupted; nothing that was durable is lost, the same command goes on", ExitCode.STOPPED_EARLY)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `restyle plan | head` is no error
        code = ExitCode.COMPLETE
    except Exception as error:
        if os.environ.get("RESTYLE_DEBUG"):
            raise
        code = _fail(
            f"unexpected {type(error).__name__}: {_first_of(error)}. This is a defect of restyle; what was durable is"
            " safe. RESTYLE_DEBUG=1 shows the trace for a report",
            ExitCode.UNEXPECTED,
        )
    sys.exit(int(code or 0))


# --- between parsing and printing -------------------------------------------------------------------------


def _run(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    from batch.api import event_loop

    # What was imported stays: a quarter of a large plan would go into walking through it again and again. Jobs
    # make few circles, so the collector may look for them more rarely than for every 700 objects.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    try:
        return anyio.run(call, backend_options=event_loop())
    except BaseExceptionGroup as group:
        raise _single(group) from group


def _single(error: BaseException) -> BaseException:
    """The first of our own errors in a group, else its first error."""
    leaves = list(_leaves(error))
    ours = [leaf for leaf in leaves if isinstance(leaf, RestyleError)]
    return (ours or leaves)[0]


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]


def _first_of(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


_COMMANDS = frozenset({"plan", "run", "status", "export", "audit", "reconcile", "cancel", "serve"})
_PLACES = {
    "target": ("target", "name"),
    "engine": ("target", "engine"),
    "service_time": ("target", "service_time"),
    "slots": ("target", "slots"),
    "faults": ("target", "faults"),
    "max_in_flight": ("limits", "max_in_flight"),
    "rate": ("limits", "submits_per_second"),
    "budget": ("limits", "budget_usd"),
    "deadline": ("limits", "deadline"),
    "max_failures": ("limits", "max_failures"),
    "limit": ("limits", "rows"),
    "download": ("output", "download"),
    "on_bad_row": ("manifest", "on_bad_row"),
}
"""Where each flag stands in the configuration."""


def _flags(**given: Any) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        if value is not None:
            section, key = _PLACES[name]
            plain = value.removesuffix("/s") if name == "rate" else value
            nested.setdefault(section, {})[key] = plain
    return nested


def _display_for(tally: Any, *, quiet: bool, log_format: str) -> tuple[Any, Callable[[], None]]:
    from batch.run.observe import PlainLines, ProgressBar
    from batch.run.ports import Observer

    if log_format == "json":
        return PlainLines(tally, sys.stderr, as_json=True), lambda: None
    if quiet:
        return Observer(), lambda: None
    if sys.stderr.isatty():
        bar = ProgressBar(tally, sys.stderr)
        return bar, bar.close
    return PlainLines(tally, sys.stderr), lambda: None


def _announce(found: Any, manifest: str, *, quiet: bool, log_format: str) -> None:
    """Say what is about to happen: to a person on standard output, to a machine as the first of its log lines."""
    from batch.manifest.survey import render_problems

    survey = found.survey
    if log_format == "json":
        line = {"action": "plan", "message": found.terms.headline, "target": found.terms.name, **survey.to_json()}
        print(orjson.dumps(line).decode(), file=sys.stderr, flush=True)
    elif not quiet:
        _print(found.terms.headline, flush=True)
        _print(survey.render() if found.terms.paid else _short(survey), flush=True)
        if survey.problem_count:
            _print(render_problems(manifest, survey.problems, survey.problem_count), flush=True)


def _confirmed(found: Any, *, yes: bool, budget: float | None) -> bool:
    """Ask where it costs money and nobody agreed yet."""
    from batch.errors import ConfigError

    survey = found.survey
    if not found.terms.paid or yes or not survey.to_do or budget is not None:
        return True
    cost = f"about ${survey.dollars:,.2f} for {survey.to_do:,} jobs"
    if not sys.stdin.isatty():
        raise ConfigError(f"this run would cost {cost}; say --yes, or set --budget USD")
    return input(f"This costs {cost}. Go on? [y/N] ").strip().lower() in {"y", "yes"}


def _short(survey: Any) -> str:
    parts = [f"{survey.rows:,} rows", f"{survey.to_do:,} jobs to do"]
    parts += [f"{survey.done:,} done before"] if survey.done else []
    parts += [f"{survey.duplicates:,} duplicates"] if survey.duplicates else []
    parts += [f"{survey.cells:,} cells a row"] if survey.cells > 1 else []
    return ", ".join(parts)


def _conclude(summary: Any, *, quiet: bool, log_format: str) -> None:
    facts = summary.to_json()
    if log_format == "json":
        _print(orjson.dumps(facts).decode())
        return
    counts = ", ".join(
        f"{facts[name]:,} {name}" for name in ("done", "failed", "unknown", "pending", "skipped") if facts[name]
    )
    money = f", ${summary.spent_usd:,.2f} spent" if summary.spent_usd else ""
    held = f" (reserved for unknown and open requests: ${summary.reserved_usd:,.2f})" if summary.reserved_usd else ""
    if quiet:
        _print(f"{facts['status']}: {counts or '0 rows'}{money}{held} in {summary.seconds:.1f} s -> {summary.results}")
        return
    _print(f"{counts or '0 rows'}{money}{held} in {summary.seconds:.1f} s")
    if summary.errors:
        commonest = ", ".join(f"{count:,} {name}" for name, count in list(summary.errors.items())[:5])
        _print(f"failed with: {commonest}")
    if summary.stopped:
        _print(f"stopped early ({summary.stopped}): {summary.reason}; the same command goes on")
    if summary.unknown:
        open_too = " (with what is open)" if summary.pending else ""
        cost = f", ${summary.reserved_usd:,.2f} at most{open_too}" if summary.reserved_usd else ""
        _print(
            f"{summary.unknown:,} submits have no known outcome and were not repeated: each may have been paid for{cost};"
            f" `restyle reconcile {summary.results.parent}` or the next run settles what it can"
        )
    _print(f"results   {summary.results}")
    if summary.images is not None:
        _print(f"pictures  {summary.images}")


def _new_key(path: Path | None, name: str) -> int:
    """The key alone goes to standard output, for a script to catch; it is shown this once."""
    import secrets

    from batch.server.keys import add_key

    if path is None:
        return _fail(f"--new-key {name} needs --keys FILE, where its hash is kept", ExitCode.BAD_INPUT)
    _print(add_key(path, name, secrets.token_urlsafe(32)))
    print(f"kept as a hash in {path}; give the key to {name} as FAL_KEY, it cannot be shown again", file=sys.stderr)
    return ExitCode.COMPLETE


def _age(at: float) -> str:
    import time

    seconds = max(0.0, time.time() - at)
    return f"{seconds / 3600:.1f} h ago" if seconds >= 3600 else f"{seconds:.0f} s ago"


def _command(arguments: list[str] | None) -> str:
    words = [word for word in (sys.argv[1:] if arguments is None else arguments) if not word.startswith("-")]
    return f"{words[0]} " if words and words[0] in _COMMANDS else ""


def _print(text: str, *, flush: bool = False) -> None:
    print(text, flush=flush)


def _fail(message: str, code: ExitCode) -> ExitCode:
    print(f"restyle: {message}", file=sys.stderr)
    return code
