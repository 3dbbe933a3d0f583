"""Copy a manifest from standard input to a file, because a manifest is read more than once. Edge."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import BinaryIO

from batch.errors import ManifestError, StorageError
from batch.manifest.file_kinds import HEAD_BYTES, IMAGES, kind_of, looks_like, suffixes_of

__all__ = ["spool"]

_USUAL = "csv"
_EXAMPLE = "cat m.csv | restyle run - -o out/run"


def spool(folder: Path, named: str | None) -> Path:
    """Copy standard input to a new file in `folder`, whose suffix is that of the format `named`, or CSV.

    Raises:
        ManifestError: standard input is a terminal, closed, empty, or recognizably in another format.
        StorageError: the disk is full.
    """
    stream = _standard_input()
    if named == IMAGES:
        raise ManifestError("--format images is for a folder of images, not for standard input")
    head = stream.read(HEAD_BYTES)
    if not head:
        raise ManifestError(f"standard input is empty; pipe a manifest in, for example: {_EXAMPLE}")
    seen = looks_like(head)
    if named is None and seen is not None:
        raise ManifestError(f"standard input is read as CSV but looks like {seen}; use --format {seen}")
    kind = kind_of(Path("-"), named or _USUAL, head)
    path = folder / f"stdin{suffixes_of(kind.name)[0]}{kind.packing}"
    try:
        with path.open("wb") as file:
            file.write(head)
            shutil.copyfileobj(stream, file)
    except OSError as error:
        advice = "free disk space, or set TMPDIR to a folder on a larger disk"
        raise StorageError(f"standard input cannot be written to {path} ({error.strerror}); {advice}") from error
    return path


def _standard_input() -> BinaryIO:
    if sys.stdin is None or sys.stdin.closed or not hasattr(sys.stdin, "buffer"):
        raise ManifestError("standard input is closed; name a manifest file")
    if sys.stdin.isatty():
        raise ManifestError(f"- reads the manifest from standard input, which is a terminal; for example: {_EXAMPLE}")
    return sys.stdin.buffer
