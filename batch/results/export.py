"""Manifest and journal as one table, `results.parquet`: made again only when it would show something else. Assembly.

Everything here blocks, and is for a worker thread.
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
"""The journal's note of what `results.parquet` shows, and the totals of it; empty while it may be behind."""
_LOAD_AFTER = 1.0
"""Seconds after which the first jobs are on their way."""


def identity_of(manifest: Manifest, settings: Settings) -> JsonObject:
    """What the results are made from, besides the journal."""
    config = orjson.dumps(config_of(settings), option=orjson.OPT_SORT_KEYS)
    return {"fingerprint": manifest.fingerprint(), "rows": manifest.rows, "config": content_hash(config)}


@dataclass(frozen=True, slots=True)
class Export:
    """The results of one run directory."""

    planner: Planner
    manifest: Manifest
    settings: Settings
    file: JournalDatabase
    identity: JsonObject

    def outdate(self) -> None:
        """From now on the journal may be ahead of the table."""
        self.file.note(_NOTE, "")

    def refresh(self, path: Path, jobs: Mapping[State, int]) -> Totals:
        """Write the table, unless it is there and was noted to show all of this already.

        `jobs` are the journal's counts, as a check on the note: should the journal be ahead of it, this shows.
        """
        shown = {**self.identity, "jobs": {str(state): count for state, count in jobs.items()}}
        mark = orjson.dumps(shown, option=orjson.OPT_SORT_KEYS).decode() + "\n"
        noted = self.file.noted(_NOTE) or ""
        if path.exists() and noted.startswith(mark) and b'"examples"' in noted.encode():  # else of an older version
            return _totals_of(noted.removeprefix(mark))
        totals = self.write(path)
        kept = orjson.dumps(totals._asdict(), option=orjson.OPT_NON_STR_KEYS).decode()
        self.file.note(_NOTE, mark + kept)
        return totals

    def write(self, path: Path) -> Totals:
        """Write the table. Free, and as often as one likes; the journal is only read."""
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
    """Refuse a place where an export cannot be, or had better not be, before anything is read.

    Raises:
        ConfigError: it has another format's name, is a folder, or its folder is not there.
    """
    try:
        _check_place(path)
    except OSError as error:  # a name that is too long
        raise ConfigError(f"{path} cannot be written: {error.strerror}; name another place") from error


def require_apart(path: Path, manifest: Manifest) -> None:
    """Refuse a place among the files that the results are made from.

    Raises:
        ConfigError: it is one of them, or would be one the next time.
    """
    if path.exists() and any(path.samefile(file) for file in manifest.files):
        raise ConfigError(f"{path} is the manifest, which the results are made from; name another file with -o")
    if manifest.source.is_dir() and path.parent.resolve().is_relative_to(manifest.source.resolve()):
        raise ConfigError(f"{path} would be a part of the manifest {manifest.source}; name another folder with -o")


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file in it with -o, like {path / 'results.parquet'}")
    if path.suffix.lower() not in {".parquet", ".pq"}:
        raise ConfigError(
            f"{path} does not end in .parquet, and the results are Parquet: there are lists and structs in them. Name"
            f' a .parquet file; python -c "import polars; polars.read_parquet({str(path.with_suffix(".parquet"))!r})'
            f'.write_ndjson({str(path.with_suffix(".jsonl"))!r})" makes lines of JSON of it'
        )
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}; make it, or name another place")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written: nothing may be written in {path.parent}; name another place")


def _totals_of(kept: str) -> Totals:
    fields = orjson.loads(kept)
    examples = {name: (row, message) for name, (row, message) in fields["examples"].items()}
    return Totals(**{**fields, "errors": Counter(fields["errors"]), "examples": examples})


def _load_sink() -> None:
    with suppress(Exception):  # whatever is in the way, too many open files say: it is loaded again when it is needed
        import_module("batch.results.writer")


@contextmanager
def loading_sink() -> Iterator[None]:
    """Load what writes the results while jobs are under way: it takes 0.2 s, which would come on top at the end."""
    timer = Timer(_LOAD_AFTER, _load_sink)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
