"""The `restyle` command: parse, call one function of `batch.api`, print, exit code. Decides nothing else.

Results go to standard output, progress and errors to standard error. A foreseeable fault is one sentence;
anything else is a defect of ours, exit code 1, and says how to report it.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import anyio
import orjson
from cyclopts import App, CycloptsError, Group, Parameter

from batch.cli.options import DISPLAY, JOBS, JobFlags
from batch.cli.streams import outlet, why_lost
from batch.errors import ConfigError, ExitCode, RestyleError, StorageError
from batch.system import signals as interrupts
from batch.system.descriptors import lacks_descriptor, require
from batch.system.open_files import allowance
from batch.system.paths import at_home
from batch.version import tool_version

if TYPE_CHECKING:
    from batch.session import Plan

__all__ = ["app", "main"]

T = TypeVar("T")

app = App(
    name="restyle",
    help="Restyle whole datasets of pictures through FLUX.1 [dev] image-to-image. Pay once, lose nothing, know the"
    " cost first, get the same result again.",
    help_format="plaintext",
    version=tool_version,
    suppress_keyboard_interrupt=False,  # it would end with 130 and say nothing
    help_epilogue="Exit codes: 0 complete, 1 unexpected error, 2 wrong input, 3 some rows failed, 4 stopped early and"
    " resumable, 5 another run holds the lock, 6 the account was refused.",
)

_MANIFEST = (
    "CSV, TSV, JSON, JSONL, Parquet or Arrow file; a folder or glob of Parquet or Arrow files; a folder of images;"
    " - for standard input"
)
_STDIN = "/dev/stdin"
Manifest = Annotated[str, Parameter(help=_MANIFEST)]
Config = Annotated[Path | None, Parameter(["--config", "-c"], help="TOML file; examples in configs/", group=JOBS)]
_NO_FLAGS = JobFlags()
RunDir = Annotated[Path, Parameter(help="the folder that `restyle run -o` named")]
Quiet = Annotated[bool, Parameter(["--quiet", "-q"], negative="", help="one line at the end", group=DISPLAY)]
Json = Annotated[bool, Parameter(negative="", help="as JSON", group=DISPLAY)]


@app.command
def plan(
    manifest: Manifest,
    /,
    *,
    out: Annotated[
        Path | None, Parameter(["--out", "-o"], help="run directory: count what is done there", group=JOBS)
    ] = None,
    config: Config = None,
    jobs: JobFlags = _NO_FLAGS,
    live_price: Annotated[
        bool, Parameter(negative="", help="ask the target for its present price; else nothing is sent", group=JOBS)
    ] = False,
    retry_failed: Annotated[
        bool, Parameter(negative="", help="count failed rows of -o as to do again", group=JOBS)
    ] = False,
    json: Json = False,
) -> int:
    """Show what a run would do and cost. Spends nothing, and sends nothing but for --live-price."""
    from batch import api
    from batch.estimate import render_note, render_problems

    flags = jobs.settings()
    found = _run(
        lambda: api.plan(manifest, out, config=config, settings=flags, live_price=live_price, retry_failed=retry_failed)
    )
    if json:
        price = found.terms.price
        facts = {
            "target": found.terms.name,
            "price_as_of": None if price is None else price.as_of.isoformat(),
            "price_is_live": found.terms.live,
            "spent_usd": found.spent_usd,
            "refusal": found.refusal or None,
            "manifest_notes": list(found.manifest.notes),
            **found.survey.to_json(),
        }
        _print(orjson.dumps(facts, option=orjson.OPT_INDENT_2).decode())
        return ExitCode.COMPLETE
    _print(found.terms.headline)
    for note in found.manifest.notes:
        _print(render_note(note))
    _print(found.survey.render())
    if found.spent_usd:
        _print(f"spent so far ${found.spent_usd:,.2f}")
    if found.survey.problem_count:
        _print(render_problems(_name_of(found, manifest), found.survey.problems, found.survey.problem_count))
    if found.refusal:
        _print(f"`restyle run` would refuse this: {found.refusal}")
    return ExitCode.COMPLETE


@app.command
def run(
    manifest: Manifest,
    /,
    *,
    out: Annotated[Path, Parameter(["--out", "-o"], help="run directory; the same one goes on", group=JOBS)],
    config: Config = None,
    jobs: JobFlags = _NO_FLAGS,
    retry_failed: Annotated[bool, Parameter(negative="", help="take failed rows up again", group=JOBS)] = False,
    new_config: Annotated[
        bool, Parameter(negative="", help="go on although the configuration has changed", group=JOBS)
    ] = False,
    yes: Annotated[bool, Parameter(["--yes", "-y"], negative="", help="agree to the cost", group=JOBS)] = False,
    quiet: Quiet = False,
    log_format: Annotated[Literal["text", "json"], Parameter(help="of progress lines", group=DISPLAY)] = "text",
) -> int:
    """Do it, or go on with it: the same command again never pays twice."""
    from batch import api
    from batch.cli import output as screen
    from batch.run.observers import Tally

    flags = jobs.settings()
    tally = Tally()
    observer, close = screen.display_for(tally, quiet=quiet, log_format=log_format)

    def confirm(found: api.Plan) -> bool:
        screen.announce(found, _name_of(found, manifest), quiet=quiet, log_format=log_format)
        return screen.confirmed(found, yes=yes, budget=_budget(found), is_piped=manifest == _STDIN)

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
    screen.conclude(summary, quiet=quiet, log_format=log_format)
    return summary.exit_code


@app.command
def status(run_dir: RunDir, /, *, json: Json = False) -> int:
    """Show counts by state, spend, rate, the oldest open request and what open jobs wait for."""
    from batch import api
    from batch.cli import output as screen
    from batch.run.waits import duration

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
    if found.paused_until is not None:
        _print(f"submits pause {screen.ahead(found.paused_until)}")
    if counts.oldest_open_at is not None:
        _print(f"{'oldest open':<12}{screen.age(counts.oldest_open_at):>12}")
    if found.waits is not None:
        _print(f"waiting, as of {duration(found.waits_age_seconds)} ago:")
        for name, jobs, rest in found.waits.lines():
            _print(f"  {name:<18}{jobs:>4,} {rest}")
    return ExitCode.COMPLETE


@app.command
def export(
    run_dir: RunDir,
    /,
    *,
    out: Annotated[
        Path | None, Parameter(["--out", "-o"], help="write this .parquet file instead of results.parquet")
    ] = None,
    manifest: Annotated[str | None, Parameter(help="where the manifest is now, if it has moved")] = None,
) -> int:
    """Rebuild the results from the journal and the manifest; free, as often as you like."""
    from batch import api
    from batch.estimate import counted

    totals = _run(lambda: api.export(run_dir, out, manifest=manifest))
    where, rows = out or run_dir / "results.parquet", counted(totals.rows, "row")
    _print(f"{where}: {rows}, {totals.done:,} done, {totals.failed:,} failed, {totals.pending:,} pending")
    return ExitCode.COMPLETE


@app.command
def audit(
    run_dir: RunDir,
    /,
    *,
    repair: Annotated[
        bool, Parameter(negative="", help="fetch images that are missing or damaged on disk again, free")
    ] = False,
    json: Json = False,
) -> int:
    """Show whether journal, results, images and bills add up; exit code 3 where they do not."""
    from batch import api

    books = _run(lambda: api.audit(run_dir, repair=repair))
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
    from batch.cli import output as screen

    display = screen.CancelDisplay()
    try:
        found = _run(lambda: api.cancel(run_dir, told=display.show))
    except KeyboardInterrupt:
        display.close()
        if display.last.open:
            _print(screen.cancelled(display.last))
        raise
    finally:
        display.close()
    _print(screen.cancelled(found))
    return ExitCode.STOPPED_EARLY if found.left else ExitCode.COMPLETE


FLUX = Group("Engine flux", sort_key=4)


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class FluxFlags:
    """What the engine `flux` runs, and where; `batch.server.engines.flux.options` checks them."""

    model: Annotated[str | None, Parameter(help="folder with FLUX.1 [dev], or its hub id", group=FLUX)] = None
    devices: Annotated[
        str | None,
        Parameter(help="a worker with the whole model each: cuda:0,cuda:1 (default cuda:0) or cpu", group=FLUX),
    ] = None
    safety_checker: Annotated[
        str | None, Parameter(help="folder or hub id; without one nothing is checked", group=FLUX)
    ] = None
    quantize: Annotated[
        Literal["fp8"] | None, Parameter(help="compute in 8 bits: faster, half the memory", group=FLUX)
    ] = None
    offload: Annotated[
        Literal["none", "model", "sequential"] | None,
        Parameter(help="keep what does not work just now in main memory, for small cards", group=FLUX),
    ] = None
    warm_up: Annotated[
        str | None, Parameter(help="sizes rendered at the start: 1024x1024,768x1344 or none", group=FLUX)
    ] = None


_NO_FLUX = FluxFlags()


@app.command
def serve(
    *,
    host: Annotated[str, Parameter(help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="0 takes any free one")] = 8787,
    engine: Annotated[Literal["preview", "echo", "flux"], Parameter(help="what executes requests")] = "preview",
    flux: FluxFlags = _NO_FLUX,
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
    from batch.server.engines.flux.options import FluxOptions
    from batch.server.http.auth import load_keys
    from batch.server.serve import ServeOptions, run_server

    _begin()
    faults, keys, tls_cert, tls_key = (path and at_home(path) for path in (faults, keys, tls_cert, tls_key))
    if new_key is not None:
        return _new_key(keys, new_key)
    options = ServeOptions(
        data_dir=at_home(data_dir), host=host, port=port, engine=engine, slots=slots,
        service_time=_seconds("--service-time", service_time), price_usd=price, faults=faults,
        keys=load_keys(keys, os.environ), allow_private=allow_private,
        retention=_seconds("--retention", retention), tls_cert=tls_cert, tls_key=tls_key,
        flux=FluxOptions.of_flags(**asdict(flux)),
    )  # fmt: skip
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    run_server(options, ready=lambda url: print(f"serving {engine} at {url}  (Ctrl-C stops)", flush=True))
    return ExitCode.COMPLETE


@app.command
def reconcile(
    run_dir: RunDir,
    /,
    *,
    manifest: Annotated[str | None, Parameter(help="where the manifest is now, if it has moved")] = None,
    quiet: Quiet = False,
) -> int:
    """Settle submits whose outcome is unknown and collect what is open; submits nothing."""
    from batch import api
    from batch.cli import output as screen

    summary = _run(lambda: api.reconcile(run_dir, manifest=manifest, signals=True))
    screen.conclude(summary, quiet=quiet, log_format="text")
    return summary.exit_code


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command line and say how it went; its exit code."""
    # Imports and jobs make few circles: the collector need not look for them after every 700 objects.
    gc.set_threshold(50_000, 20, 100)
    with redirect_stdout(outlet(sys.stdout)), redirect_stderr(outlet(sys.stderr)):
        code = _code_of(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def _code_of(arguments: list[str] | None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    try:
        # Cyclopts takes a single hyphen for an option.
        words = [_STDIN if word == "-" else word for word in words]
        return int(app(words, exit_on_error=False, print_error=False, result_action="return_value") or 0)
    except CycloptsError as error:
        text = " ".join(str(error).split())
        return _fail(f"{text} (restyle {_command(arguments)}--help shows what there is)", ExitCode.BAD_INPUT)
    except RestyleError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing that was durable is lost, the same command goes on", ExitCode.STOPPED_EARLY)
    except Exception as error:
        if lacks_descriptor(error):
            return _fail(
                "too many open files; raise the limit, for example with `ulimit -n 1024`, and run the command again",
                ExitCode.STOPPED_EARLY,
            )
        if os.environ.get("RESTYLE_DEBUG"):
            raise
        return _fail(
            f"unexpected {type(error).__name__}: {_first_of(error)}. This is a defect of restyle; what was durable is"
            " safe. RESTYLE_DEBUG=1 shows the trace for a report",
            ExitCode.UNEXPECTED,
        )


# --- between parsing and printing -------------------------------------------------------------------------


def _run(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    from batch.api import event_loop

    _begin()
    try:
        return anyio.run(call, backend_options=event_loop())
    except BaseExceptionGroup as group:
        raise _single(group) from group


def _begin() -> None:
    """All modules are here: the collector works again, but not through them, and signals are taken again.

    Raises:
        InputError: too few files may be open for any command.
    """
    require(allowance(), _LEAST_FILES)
    # Else a quarter of a large plan would go into walking through what was imported again and again.
    gc.freeze()
    gc.enable()  # `batch.__main__` has both wait until here
    interrupts.take()


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


_LEAST_FILES = 12
"""Descriptors of an event loop and of a file or two; without them it fails in ways that say nothing."""
_COMMANDS = frozenset({"plan", "run", "status", "export", "audit", "reconcile", "cancel", "serve"})


def _new_key(path: Path | None, name: str) -> int:
    """The key alone goes to standard output, for a script to catch; it is shown this once."""
    import secrets

    from batch.server.http.auth import add_key

    if path is None:
        return _fail(f"--new-key {name} needs --keys FILE, where its hash is kept", ExitCode.BAD_INPUT)
    _print(add_key(path, name, secrets.token_urlsafe(32)))
    print(f"kept as a hash in {path}; give the key to {name} as FAL_KEY, it cannot be shown again", file=sys.stderr)
    return ExitCode.COMPLETE


def _seconds(flag: str, text: str) -> float:
    """A duration of `serve`, which has no settings that would name its place.

    Raises:
        ConfigError: it is none.
    """
    from batch.config import parse_duration

    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from error
    assert isinstance(seconds, float), "of a text"
    return seconds


def _command(arguments: list[str] | None) -> str:
    words = [word for word in (sys.argv[1:] if arguments is None else arguments) if not word.startswith("-")]
    return f"{words[0]} " if words and words[0] in _COMMANDS else ""


def _name_of(found: Plan, manifest: str) -> str:
    """What the lines of problems are counted in."""
    return str(found.manifest.place or ("standard input" if manifest == _STDIN else manifest))


def _print(text: str) -> None:
    """Print what a command was asked for.

    Raises:
        StorageError: it goes into a file, and the disk is full.
    """
    print(text, flush=True)
    if reason := why_lost(sys.stdout):
        raise StorageError(f"standard output cannot be written ({reason}); what it shows is incomplete")


def _fail(message: str, code: ExitCode) -> ExitCode:
    print(f"restyle: {message}", file=sys.stderr)
    return code
