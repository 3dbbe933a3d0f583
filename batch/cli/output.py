"""The display of a run: its plan, its progress and its summary.

Results go to standard output, progress to standard error; with `--log-format json` both are JSON lines.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import orjson

from batch.api import Cancelled, Plan, Summary
from batch.errors import ConfigError
from batch.estimate import Estimate, counted, render_note, render_problems
from batch.run.interfaces import Observer
from batch.run.observers import CountBar, PlainLines, ProgressBar, ProgressCounter
from batch.system import signals

__all__ = ["CancelDisplay", "age", "ahead", "announce", "cancelled", "conclude", "confirmed", "display_for"]

_MESSAGE_SHOWN = 160
"""Characters of an example's message."""
_LINE_SECONDS = 30.0
_KINDS_SHOWN = 5
"""Error types shown at the end of a run; `summary.json` has all of them."""


def display_for(tally: ProgressCounter, *, quiet: bool, log_format: str) -> tuple[Observer, Callable[[], None]]:
    """Return the observer that displays a run, and a function to call at the end."""
    if log_format == "json":
        return PlainLines(tally, sys.stderr, as_json=True), lambda: None
    if quiet:
        return Observer(), lambda: None
    if sys.stderr.isatty():
        bar = ProgressBar(tally, sys.stderr)
        return bar, bar.close
    return PlainLines(tally, sys.stderr), lambda: None


def announce(found: Plan, manifest: str, *, quiet: bool, log_format: str) -> None:
    """Print the plan: as text on standard output, or as the first JSON line on standard error."""
    estimate = found.estimate
    if log_format == "json":
        line = {
            "action": "plan",
            "message": found.profile.headline,
            "target": found.profile.name,
            "manifest_notes": list(found.manifest.notes),
            **estimate.to_json(),
        }
        print(orjson.dumps(line).decode(), file=sys.stderr, flush=True)
    elif not quiet:
        print(found.profile.headline, flush=True)
        for note in found.manifest.notes:
            print(render_note(note), flush=True)
        print(estimate.render() if found.profile.paid else _short(estimate), flush=True)
        if estimate.problem_count:
            print(render_problems(manifest, estimate.problems, estimate.problem_count), flush=True)


def confirmed(found: Plan, *, yes: bool, budget: float | None, is_piped: bool = False) -> bool:
    """Ask whether a paid run may start, unless `yes` or a budget answers; with a piped manifest, refuse."""
    estimate = found.estimate
    if not found.profile.paid or yes or not estimate.to_do or budget is not None:
        return True
    bounds = f"about ${estimate.dollars:,.2f} (at most ${estimate.dollars_at_most:,.2f})"
    cost = f"{bounds} for {counted(estimate.to_do, 'job')}"
    if not sys.stdin.isatty():
        reason = " (standard input is the manifest, so restyle cannot ask)" if is_piped else ""
        raise ConfigError(f"this run would cost {cost}; add --yes or --budget USD{reason}")
    try:
        with signals.at_once():
            answer = input(f"This costs {cost}. Continue? [y/N] ")
    except EOFError:  # Ctrl-D
        return False
    return answer.strip().lower() in {"y", "yes"}


def _short(estimate: Estimate) -> str:
    parts = [counted(estimate.rows, "row"), f"{counted(estimate.to_do, 'job')} to do"]
    parts += [f"{estimate.retried:,} of them failed before"] if estimate.retried else []
    parts += [f"{estimate.done:,} done before"] if estimate.done else []
    parts += [f"{estimate.failed:,} failed before"] if estimate.failed else []
    parts += [f"{estimate.collectable:,} paid for and collected again, free"] if estimate.collectable else []
    parts += [f"{estimate.in_flight:,} sent before"] if estimate.in_flight else []
    parts += [counted(estimate.duplicates, "duplicate")] if estimate.duplicates else []
    parts += [f"{estimate.cells:,} cells per row"] if estimate.cells > 1 else []
    return ", ".join(parts)


def conclude(summary: Summary, *, quiet: bool, log_format: str) -> None:
    """Print how the run ended and where its files are."""
    facts = summary.to_json()
    if log_format == "json":
        print(orjson.dumps(facts).decode())
        return
    counts = ", ".join(
        f"{facts[name]:,} {name}" for name in ("done", "failed", "unknown", "pending", "skipped") if facts[name]
    )
    money = f", ${summary.spent_usd:,.2f} spent" if summary.spent_usd else ""
    held = f" (reserved for unknown and open requests: ${summary.reserved_usd:,.2f})" if summary.reserved_usd else ""
    if quiet:
        print(f"{facts['status']}: {counts or '0 rows'}{money}{held} in {summary.seconds:.1f} s -> {summary.results}")
        return
    print(f"{counts or '0 rows'}{money}{held} in {summary.seconds:.1f} s")
    if summary.flagged_images:
        print(f"{counted(summary.flagged_images, 'image')} flagged as NSFW (column has_nsfw_concepts)")
    if summary.errors:
        _explain_failures(summary)
    if summary.stopped:
        print(f"stopped early ({summary.stopped}): {summary.reason}; run the same command to resume")
    if summary.unknown:
        open_too = " (open requests included)" if summary.pending else ""
        cost = f", ${summary.reserved_usd:,.2f} at most{open_too}" if summary.reserved_usd else ""
        print(
            f"{counted(summary.unknown, 'submit')} of unknown outcome, not repeated: each may have been paid for{cost};"
            f" `restyle reconcile {summary.results.parent}` or the next run looks them up"
        )
    print(f"results   {summary.results}")
    if summary.images is not None:
        print(f"images    {summary.images}")


def _explain_failures(summary: Summary) -> None:
    print(f"failed with: {_commonest(summary.errors)}")
    for name, (row, message) in summary.examples.items():
        print(f"  {name}, for example row {row}: {_in_one_line(message)}")
    if summary.collectable:
        print(
            f"paid for: {counted(summary.collectable, 'failed job')}; run the same command to fetch their results and"
            " images again, free"
        )
    if summary.failed > summary.collectable:
        print("--retry-failed submits failed jobs again; fix invalid rows in the manifest")


def _in_one_line(message: str) -> str:
    text = " ".join(message.split())
    return text if len(text) <= _MESSAGE_SHOWN else text[: _MESSAGE_SHOWN - 1] + "…"


def cancelled(found: Cancelled) -> str:
    """Return the outcome of a cancel by kind, and what happens next."""
    asked = f"{counted(found.open, 'open request')}: {counted(found.requested, 'cancellation')} requested"
    lines = [
        f"{asked}, {found.too_late:,} too late, {found.not_found:,} not found, {found.unanswered:,} without an answer"
    ]
    if found.not_found:
        lines.append("not found: the target does not know these requests (any more); the next run marks them as failed")
    if found.left:
        lines.append(f"{counted(found.left, 'request')} without an answer; run the same command again to retry them")
    if found.open:
        lines.append(
            "`restyle run` reads how they ended: a cancelled request becomes a failed row (client_cancelled), which"
            " only --retry-failed submits again"
        )
    return "\n".join(lines)


class CancelDisplay:
    """The progress of a cancel on standard error: a bar on a terminal, elsewhere a line every 30 s."""

    def __init__(self) -> None:
        self.last = Cancelled()
        """The most recent counts."""
        self._bar: CountBar | None = None
        self._next = time.monotonic() + _LINE_SECONDS

    def show(self, found: Cancelled) -> None:
        """Show the counts so far."""
        self.last = found
        if sys.stderr.isatty():
            self._bar = self._bar or CountBar(found.open, "request", sys.stderr)
            self._bar.at(found.asked)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + _LINE_SECONDS
            print(f"{found.asked:,} of {counted(found.open, 'open request')} asked", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the bar and leave its last state on screen."""
        if self._bar is not None:
            self._bar.close()


def _commonest(errors: Mapping[str, int]) -> str:
    """Return the five most common error types with their counts, and how many more there are."""
    named = list(errors.items())[:_KINDS_SHOWN]
    words = ", ".join(f"{count:,} {name}" for name, count in named)
    kinds, rows = len(errors) - len(named), sum(errors.values()) - sum(count for _, count in named)
    return words + (f" and {counted(kinds, 'other kind')} ({counted(rows, 'row')})" if kinds else "")


def ahead(at: float) -> str:
    """Return the time until which a pause lasts, and the remaining minutes."""
    minutes, seconds = divmod(max(0, round(at - time.time())), 60)
    return f"until {datetime.fromtimestamp(at, UTC):%H:%M:%S} UTC, for another {minutes} min {seconds} s"


def age(at: float) -> str:
    """Return how long ago an instant was."""
    seconds = max(0.0, time.time() - at)
    return f"{seconds / 3600:.1f} h ago" if seconds >= 3600 else f"{seconds:.0f} s ago"
