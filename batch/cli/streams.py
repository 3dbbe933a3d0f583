"""Standard output and standard error of the command.

A reader that has gone (`| head`), a full disk behind a redirection or a closed stream loses text, never the run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, TextIO, cast

from batch.errors import ExitCode, StorageError

__all__ = ["SafeStream", "fail", "fill_closed", "print_result", "safe_stream", "why_lost"]


class SafeStream:
    """A text stream whose writes never fail. After the first failed write it is silent, and `lost` has the error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Write the text; return its length, also after a failure."""
        if self.lost is None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # the terminal's or log's encoding lacks a character of a file name
                encoding = self._stream.encoding
                self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except OSError as error:
                self.lost = error
        return len(text)

    def flush(self) -> None:
        """Flush the stream; drop its buffer if the write fails."""
        if self.lost is None:
            try:
                self._stream.flush()
            except OSError as error:
                self.lost = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def fill_closed() -> None:
    """Open /dev/null for each closed standard stream.

    Otherwise the next file gets its number, and an event loop that takes it for a stream aborts the process.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def safe_stream(stream: TextIO | None) -> TextIO:
    """Wrap `sys.stdout` or `sys.stderr`; None (a closed stream) becomes /dev/null."""
    return cast(TextIO, SafeStream(stream if stream is not None else Path(os.devnull).open("w", encoding="utf-8")))


def why_lost(stream: TextIO | None) -> str | None:
    """Return why text was lost; None if all of it was written or its reader has gone."""
    lost = getattr(stream, "lost", None)
    return None if lost is None or isinstance(lost, BrokenPipeError) else str(lost.strerror or lost)


def print_result(text: str) -> None:
    """Print the result of a command to standard output.

    Raises:
        StorageError: standard output is a file and the disk is full.
    """
    print(text, flush=True)
    if reason := why_lost(sys.stdout):
        raise StorageError(f"cannot write to standard output ({reason}); the output is incomplete")


def fail(message: str, code: ExitCode) -> ExitCode:
    """Print an error message to standard error, and return the exit code."""
    print(f"restyle: {message}", file=sys.stderr)
    return code
