"""Export of manifest and journal to `results.parquet`, rebuilt only if its content would change. Assembly.

All functions block and are meant for a worker thread.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Timer

import orjson

from batch.config import Settings
from batch.directory import config_of
from batch.errors import ConfigError
from batch.journal.database import JournalDatabase
from batch.journal.states import State
from batch.manifest.hashing import content_hash
from batch.manifest.planner import Planner
from batch.manifest.reader import Manifest
from batch.results.totals import Totals
from batch.types import JsonObject
from batch.version import tool_version

__all__ = ["Export", "identity_of", "loading_sink", "require_apart", "require_place"]

_NOTE = "projected"
"""Name of the journal's note with the content mark and totals of `results.parquet`; empty while the table may be
outdated."""
_LOAD_AFTER = 1.0
"""Delay in seconds; by then the first jobs are in flight."""


def identity_of(manifest: Manifest, settings: Settings) -> JsonObject:
    """Return the identity of the results' inputs, except the journal."""
    config = orjson.dumps(config_of(settings), option=orjson.OPT_SORT_KEYS)
    return {"fingerprint": manifest.fingerprint(), "rows": manifest.rows, "config": content_hash(config)}


@dataclass(frozen=True, slots=True)
class Export:
    """The export of one run directory."""

    planner: Planner
    manifest: Manifest
    settings: Settings
    file: JournalDatabase
    identity: JsonObject

    def outdate(self) -> None:
        """Mark the table as outdated before the journal changes."""
        self.file.note(_NOTE, "")

    def refresh(self, path: Path, jobs: Mapping[State, int]) -> Totals:
        """Write the table, unless the note says that it already shows this state.

        `jobs` are the journal's counts. They check the note: if the journal is ahead of it, the counts differ.
        """
        shown = {**self.identity, "jobs": {str(state): count for state, count in jobs.items()}}
        mark = orjson.dumps(shown, option=orjson.OPT_SORT_KEYS).decode() + "\n"
        noted = self.file.noted(_NOTE) or ""
        if path.exists() and noted.startswith(mark) and b'"examples"' in noted.encode():  # missing in older versions
            return _totals_of(noted.removeprefix(mark))
        totals = self.write(path)
        kept = orjson.dumps(totals._asdict(), option=orjson.OPT_NON_STR_KEYS).decode()
        self.file.note(_NOTE, mark + kept)
        return totals

    def write(self, path: Path) -> Totals:
        """Write the table. Free and repeatable; the journal is only read."""
        from batch.results.writer import write_results  # with pyarrow; see `loading_sink`

        metadata = {
            "restyle_version": tool_version(),
            "python": platform.python_version(),
            "run_seed": self.settings.run_seed,
            "manifest": {"source": str(self.manifest.source), **self.identity},
            "config": config_of(self.settings),
        }
        return write_results(
            path,
            self.planner.batches(),
            self.file.outcomes_in_turn(),
            manifest_schema=self.manifest.schema.to_frame().to_arrow().schema,
            target=self.settings.target.name,
            on_bad_row=self.settings.manifest.on_bad_row,
            metadata={"restyle": orjson.dumps(metadata).decode()},
        )


def require_place(path: Path) -> None:
    """Refuse an unsuitable output path before anything is read.

    Raises:
        ConfigError: the path has another format's suffix, is a folder, or its folder is missing or read-only.
    """
    try:
        _check_place(path)
    except OSError as error:  # a name that is too long
        raise ConfigError(f"{path} cannot be written: {error.strerror}; use another path") from error


def require_apart(path: Path, manifest: Manifest) -> None:
    """Refuse an output path that is one of the export's input files.

    Raises:
        ConfigError: the path is part of the manifest, or would be part of it on the next run.
    """
    if path.exists() and any(path.samefile(file) for file in manifest.files):
        raise ConfigError(f"{path} is the manifest of this run; name another file with -o")
    if manifest.source.is_dir() and path.parent.resolve().is_relative_to(manifest.source.resolve()):
        raise ConfigError(f"{path} would become part of the manifest {manifest.source}; name another folder with -o")


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file with -o, for example {path / 'results.parquet'}")
    if path.suffix.lower() not in {".parquet", ".pq"}:
        raise ConfigError(
            f"{path} does not end in .parquet, the only output format (results contain lists and structs). Name a"
            f' .parquet file; to get JSON lines: python -c "import polars; polars.read_parquet('
            f'{str(path.with_suffix(".parquet"))!r}).write_ndjson({str(path.with_suffix(".jsonl"))!r})"'
        )
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}; create it or use another path")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written: {path.parent} is read-only; use another path")


def _totals_of(kept: str) -> Totals:
    fields = orjson.loads(kept)
    examples = {name: (row, message) for name, (row, message) in fields["examples"].items()}
    return Totals(**{**fields, "errors": Counter(fields["errors"]), "examples": examples})


def _load_sink() -> None:
    with suppress(Exception):  # for example too many open files: `write` imports it again
        import_module("batch.results.writer")


@contextmanager
def loading_sink() -> Iterator[None]:
    """Import the writer while jobs are in flight: it takes 0.2 s, which would delay the end of the run."""
    timer = Timer(_LOAD_AFTER, _load_sink)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
