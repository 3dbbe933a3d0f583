"""Standard output and standard error of the command. Edge: terminal; knows no library.

A reader that has gone (`| head`), a full disk behind a redirection or a closed stream costs the text, never the run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, TextIO, cast

from batch.errors import ExitCode, StorageError

__all__ = ["SafeStream", "fail", "fill_closed", "print_result", "safe_stream", "why_lost"]


class SafeStream:
    """A text stream whose writes never fail; from the first refused one on it is silent, and `lost` says why."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Its length, also where nothing is written any more."""
        if self.lost is None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # a terminal, or a log, that knows fewer characters than a file name has
                encoding = self._stream.encoding
                self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except OSError as error:
                self.lost = error
        return len(text)

    def flush(self) -> None:
        """What the stream still holds is given up where it is refused."""
        if self.lost is None:
            try:
                self._stream.flush()
            except OSError as error:
                self.lost = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def fill_closed() -> None:
    """Put nowhere in the place of each standard stream that is closed.

    Else the next file gets its number, and a loop that takes such a number for a stream aborts the process.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def safe_stream(stream: TextIO | None) -> TextIO:
    """Wrap `sys.stdout` or `sys.stderr`; None, which is what Python has for a closed one, becomes nowhere."""
    return cast(TextIO, SafeStream(stream if stream is not None else Path(os.devnull).open("w", encoding="utf-8")))


def why_lost(stream: TextIO | None) -> str | None:
    """What became of text that somebody still waits for; None where all went out, or where its reader left."""
    lost = getattr(stream, "lost", None)
    return None if lost is None or isinstance(lost, BrokenPipeError) else str(lost.strerror or lost)


def print_result(text: str) -> None:
    """Print the result of a command to standard output.

    Raises:
        StorageError: it goes into a file, and the disk is full.
    """
    print(text, flush=True)
    if reason := why_lost(sys.stdout):
        raise StorageError(f"standard output cannot be written ({reason}); what it shows is incomplete")


def fail(message: str, code: ExitCode) -> ExitCode:
    """Print an error message to standard error, and return the exit code."""
    print(f"restyle: {message}", file=sys.stderr)
    return code
