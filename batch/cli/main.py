"""From a command line to an exit code: every foreseeable fault becomes one sentence on standard error."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import redirect_stderr, redirect_stdout

from cyclopts import CycloptsError

from batch.cli.commands import STDIN, app
from batch.cli.streams import fail, safe_stream
from batch.errors import ExitCode, RestyleError
from batch.system.descriptors import lacks_descriptor

__all__ = ["main"]

_COMMANDS = frozenset({"plan", "run", "status", "export", "audit", "reconcile", "cancel", "serve"})


def main(arguments: list[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    # Imports and jobs create few cycles: the default of one collection per 700 objects costs time for nothing.
    gc.set_threshold(50_000, 20, 100)
    with redirect_stdout(safe_stream(sys.stdout)), redirect_stderr(safe_stream(sys.stderr)):
        code = _code_of(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def _code_of(arguments: list[str] | None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    try:
        # Cyclopts reads a single hyphen as an option.
        words = [STDIN if word == "-" else word for word in words]
        return int(app(words, exit_on_error=False, print_error=False, result_action="return_value") or 0)
    except CycloptsError as error:
        text = " ".join(str(error).split())
        return fail(f"{text} (restyle {_command(arguments)}--help lists all options)", ExitCode.BAD_INPUT)
    except RestyleError as error:
        return fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return fail("interrupted; nothing durable is lost, run the same command to resume", ExitCode.STOPPED_EARLY)
    except Exception as error:
        if lacks_descriptor(error):
            return fail(
                "too many open files; raise the limit, for example with `ulimit -n 1024`, and run the command again",
                ExitCode.STOPPED_EARLY,
            )
        if os.environ.get("RESTYLE_DEBUG"):
            raise
        return fail(
            f"unexpected {type(error).__name__}: {_first_of(error)}. This is a bug in restyle; durable data is safe."
            " Set RESTYLE_DEBUG=1 to get a stack trace for a report",
            ExitCode.UNEXPECTED,
        )


def _command(arguments: list[str] | None) -> str:
    words = [word for word in (sys.argv[1:] if arguments is None else arguments) if not word.startswith("-")]
    return f"{words[0]} " if words and words[0] in _COMMANDS else ""


def _first_of(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
