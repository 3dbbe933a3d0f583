"""The run directory: file locations, the lock, and the configuration that it belongs to. Edge: disk.

Owns the lock, `run.json` and `summary.json`. The journal, the results, the images and the log have their own writers;
this module only defines their paths.
"""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock, Timeout

from batch.config import Settings
from batch.errors import RunDirectoryError, RunLocked, StorageError
from batch.fal import protocol
from batch.system.durable import make_folders, write_file
from batch.types import Json, JsonObject

__all__ = ["RunDirectory", "write_whole"]

_DEFINING = ("manifest", "input", "sweep", "run_seed")
"""Settings that determine the jobs. Other settings, such as limits, may change from run to run."""

_LOCK_SECONDS = 0.3
"""Lock timeout; after it, another run is assumed to hold the directory."""


class RunDirectory:
    """The directory named by `-o`. Nothing is created before `prepare`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.results = root / "results.parquet"
        self.journal = root / "journal.db"
        self.run_file = root / "run.json"
        self.summary_file = root / "summary.json"
        self.log = root / "log.jsonl"
        self.images = root / "images"
        self.endpoint = root / "endpoint"
        self._lock_file, self._owner_file = root / ".lock", root / ".owner.json"
        self._waits_file = root / ".waits.json"

    def __repr__(self) -> str:
        return f"<RunDirectory {self.root}>"

    def check_place(self) -> None:
        """Refuse a path that cannot be a run directory; it need not exist.

        Raises:
            RunDirectoryError: the path is a file, a folder with other content, or a run whose journal is lost.
        """
        if not self.journal.exists() and (lost := self.lost_journal()):
            raise RunDirectoryError(lost)
        if self.root.is_file():
            raise RunDirectoryError(f"{self.root} is a file; name a folder with -o")
        if (
            self.root.is_dir()
            and not self.journal.exists()
            and not self._lock_file.exists()
            and any(self.root.iterdir())
        ):
            raise RunDirectoryError(f"{self.root} is not empty and not a run directory; name an empty folder with -o")

    def prepare(self) -> None:
        """Create the directory.

        Raises:
            RunDirectoryError: the path is a file, a folder with other content, or not writable.
            StorageError: the disk is full.
        """
        self.check_place()
        try:
            make_folders(self.root)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            full = error.errno in {errno.ENOSPC, errno.EDQUOT}
            advice = "name another folder with -o"
            if self.journal.exists():  # in another folder every job would be submitted and paid for again
                advice = "make it writable: it records what was done and paid for"
            advice = f"free some space, or {advice}" if full else advice
            kind = StorageError if full else RunDirectoryError
            raise kind(f"{self.root} cannot be written ({error.strerror}); {advice}") from error

    def has_begun(self) -> bool:
        """Whether a journal exists or should exist; an interrupted first start leaves none."""
        return self.journal.exists() and (self.journal.stat().st_size > 0 or self.lost_journal() is not None)

    def lost_journal(self) -> str | None:
        """Return the error message if the journal of an earlier run is lost; None if no run has started here.

        Starting over silently would pay for every job again.
        """
        if not (self.run_file.exists() or self.results.exists()):  # the journal comes before both
            return None
        return (
            f"the journal {self.journal} is missing or empty, but this is the directory of an earlier run: only the"
            f" journal records what was submitted and paid for. Restore it, with its {self.journal.name}-wal if there"
            " was one, or name another folder with -o, where every job is submitted and paid for again"
        )

    def require(self) -> None:
        """Check that the directory contains a run.

        Raises:
            RunDirectoryError: there is no run, or its journal is lost.
        """
        if not self.journal.exists():
            none = f"there is no run in {self.root}; `restyle run MANIFEST -o {self.root}` starts one"
            raise RunDirectoryError(self.lost_journal() or none)

    @contextmanager
    def locked(self, started_at: str) -> Iterator[None]:
        """Lock the directory for this process. The kernel releases the lock of a dead process.

        Raises:
            RunLocked: another process holds the lock; the message names its host, process id and start.
        """
        # A timeout, because `is_locked` of a concurrent `restyle status` holds the lock for a moment.
        lock = FileLock(self._lock_file, timeout=_LOCK_SECONDS)
        try:
            lock.acquire(poll_interval=0.02)
        except Timeout:
            raise RunLocked(f"another run is active in {self.root} ({self._owner()}); wait for it or stop it") from None
        except OSError as error:
            raise StorageError(
                f"{self._lock_file} cannot be locked ({error.strerror}); check that the disk is writable"
            ) from error
        try:
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": started_at}
            write_whole(self._owner_file, orjson.dumps(owner))
            self.note_waits(None)  # left by a killed run
            yield
        finally:
            self._owner_file.unlink(missing_ok=True)
            self.note_waits(None)
            lock.release()

    def is_locked(self) -> bool:
        """Whether a process holds the lock now."""
        lock = FileLock(self._lock_file, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return True
        except OSError:  # a read-only disk: no run can be active on it
            return False
        lock.release()
        return False

    def _owner(self) -> str:
        try:
            owner = orjson.loads(self._owner_file.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return "owner unknown"
        return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"

    def note_waits(self, facts: JsonObject | None) -> None:
        """Replace or remove the note about what open jobs wait for. A disk error costs the note, not the run.

        Only the process that holds the lock may call this. The note is not durable: it serves `restyle status` while
        that process runs.
        """
        with suppress(OSError):
            if facts is None:
                self._waits_file.unlink(missing_ok=True)
                return
            temporary = self._waits_file.with_name(f"{self._waits_file.name}.part")
            temporary.write_bytes(orjson.dumps(facts))
            temporary.replace(self._waits_file)

    def read_waits(self) -> JsonObject | None:
        """Return the note of the active run, or None."""
        try:
            value = orjson.loads(self._waits_file.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return None
        return value if isinstance(value, dict) else None

    def read_run(self) -> JsonObject | None:
        """Return the content of `run.json`, or None if it is missing.

        Raises:
            RunDirectoryError: the file is unreadable.
        """
        try:
            value = orjson.loads(self.run_file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, orjson.JSONDecodeError) as error:
            raise RunDirectoryError(f"{self.run_file} cannot be read ({error}); name another folder with -o") from error
        return value if isinstance(value, dict) else None

    def check_config(self, settings: Settings, *, accept: bool) -> None:
        """Refuse a configuration that would create other jobs than this directory's, unless accepted.

        Raises:
            RunDirectoryError: the configuration differs (the message says how), or the target is another kind, which is
                never accepted: results of different services do not belong in one table.
        """
        before = self.read_run()
        config = before.get("config") if before is not None else None
        if not isinstance(config, dict):
            return
        now = config_of(settings)
        kinds = [_kind(_part(c, "target").get("name")) for c in (config, now)]
        app = [_part(c, "target").get("app") for c in (config, now)]
        if kinds[0] != kinds[1] or app[0] != app[1]:
            raise RunDirectoryError(
                f"{self.root} was made with target {kinds[0]} ({app[0]}), not {kinds[1]} ({app[1]});"
                " results of different services do not mix: name another folder with -o"
            )
        different = list(_differences({n: config.get(n) for n in _DEFINING}, {n: now[n] for n in _DEFINING}))
        engines = [_part(c, "target").get("engine") for c in (config, now)]
        if kinds[1] == "local" and engines[0] != engines[1]:
            different.append(f"target.engine was {engines[0]!r}, is {engines[1]!r}")
        if different and not accept:
            raise RunDirectoryError(
                f"{self.root} was made with another config: {'; '.join(different)}."
                " Use the old config, name another folder with -o, or accept the new config with --new-config"
            )

    def write_run(self, facts: JsonObject) -> None:
        """Replace `run.json`."""
        write_whole(self.run_file, orjson.dumps(facts, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))

    def write_summary(self, facts: JsonObject) -> None:
        """Replace `summary.json`: one line, for scripts that run after a cron job."""
        write_whole(self.summary_file, orjson.dumps(facts, option=orjson.OPT_APPEND_NEWLINE))


def config_of(settings: Settings) -> dict[str, Any]:
    """Return the resolved configuration as JSON values. It contains no secret: the API key is not a setting."""
    return settings.model_dump(mode="json")


def write_whole(path: Path, data: bytes) -> None:
    """Replace a small file; after a power cut it is the old one or the new one, never half of one.

    Raises:
        StorageError: the disk refused.
    """
    try:
        write_file(path, data, sync_name=False)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror}); free some space or make it writable, then run again"
        ) from error


def _kind(target: Json) -> Json:
    """Return `local`, `fal` or `a URL`. Runs of version 0.1 may name a fal host by its URL; that counts as fal."""
    if target in {"local", "fal"}:
        return target
    return "fal" if isinstance(target, str) and protocol.names_fal(target) else "a URL"


def _part(config: JsonObject, name: str) -> JsonObject:
    part = config.get(name)
    return part if isinstance(part, dict) else {}


def _differences(before: Json, now: Json, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(name), now.get(name), f"{path}.{name}" if path else name)
    elif before != now:
        yield f"{path} was {before!r}, is {now!r}"
